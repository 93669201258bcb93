"""``python -m opencode_sse_plugin.cli``."""

import sys

from . import main

sys.exit(main())
