"""What takes long is named in the log, with its duration: the event loop belongs to the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger("opencode_sse")

#: What holds the event loop for longer is named.
SLOW: Final = 0.1
#: What others only wait for is named after so long.
PATIENCE: Final = 0.5


@contextmanager
def timed(what: str, longer_than: float = SLOW) -> Iterator[None]:
    """Name what happens inside, if it takes longer than so many seconds; ``what`` goes on with the duration."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - begun
        if took > longer_than:
            logger.warning("%s %.2f s", what, took)
