"""What tests of hosts and plugins import; works on asyncio and trio, and needs nothing beyond the core.

- :func:`stream` and :func:`request`: an in-memory HTTP client that really streams, with readers that are slow, stalled
  or cut (:class:`Pace`); :func:`lifespan` starts and stops an app.
- :func:`parse_frames`: the frames of a body, checked against the wire's rules.
- :class:`ManualClock`: time that a test moves by hand; :func:`settle` lets everything run that can.
- :class:`EventStoreContract`, :class:`OverflowPolicyContract`: the tests every event store and every overflow policy
  must pass (need pytest).
- :func:`fold`: what a client makes of the stream, to compare two; :class:`Traffic`: made-up opencode events.
- ``opencode_sse_plugin.testing.pytest_plugin``: fixtures, loaded where asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clock import ManualClock, settle
from .folding import State, fold
from .lifespan import lifespan
from .pace import Pace
from .stream import Ending, Response, StreamResponse, request, stream
from .traffic import Traffic
from .wire import Frame, parse_frame, parse_frames

if TYPE_CHECKING:
    from .contracts import EventStoreContract, LosslessPolicyContract, OverflowPolicyContract

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
    "OverflowPolicyContract",
    "LosslessPolicyContract",
    "fold",
    "State",
    "Traffic",
]


def __getattr__(name: str) -> object:
    # Late, so that this package can be used without pytest, and so that pytest can rewrite the contracts' assertions.
    if name in ("EventStoreContract", "OverflowPolicyContract", "LosslessPolicyContract"):
        from . import contracts

        return getattr(contracts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
