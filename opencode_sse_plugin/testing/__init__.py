"""What tests of hosts and plugins import; works on asyncio and trio, and needs nothing beyond the core.

- :func:`stream` and :func:`request`: an in-memory HTTP client that really streams, with readers that are slow, stalled
  or cut (:class:`Pace`); :func:`lifespan` starts and stops an app.
- :func:`parse_frames`: the frames of a body, checked against the wire's rules.
- :class:`ManualClock`: time that a test moves by hand; :func:`settle` lets everything run that can.
- :class:`EventStoreContract`: the tests every event store must pass (needs pytest).
- ``opencode_sse_plugin.testing.pytest_plugin``: fixtures, loaded where asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clock import ManualClock, settle
from .lifespan import lifespan
from .pace import Pace
from .stream import Ending, Response, StreamResponse, request, stream
from .wire import Frame, parse_frame, parse_frames

if TYPE_CHECKING:
    from .contracts import EventStoreContract

__all__ = [
    "stream",
    "request",
    "lifespan",
    "StreamResponse",
    "Response",
    "Ending",
    "Pace",
    "Frame",
    "parse_frame",
    "parse_frames",
    "ManualClock",
    "settle",
    "EventStoreContract",
]


def __getattr__(name: str) -> object:
    # Late, so that this package can be used without pytest, and so that pytest can rewrite the contract's assertions.
    if name == "EventStoreContract":
        from .contracts import EventStoreContract

        return EventStoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
