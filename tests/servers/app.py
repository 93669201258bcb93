"""The host that every server serves: a Starlette app with the stream installed; settings come from the environment."""

from __future__ import annotations

from starlette.applications import Starlette

from opencode_sse_plugin import EventBus, install
from opencode_sse_plugin.plugins import Plugins

app = Starlette()
install(app, EventBus(plugins=Plugins(discover=False)), authorize=None, publish=True)
