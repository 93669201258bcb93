"""The account of one subscriber: what was decided to be lost, counted exactly, and told in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .events import StoredEvent
from .overflow import Lag, Limits


@dataclass(slots=True)
class Loss:
    """Neighbouring events that were never handed to ``send``.

    :param first, last: sequence numbers that bound them. :param after: the position before them.
    :param exceeded: ``events``, ``bytes`` or ``retention``. :param queued: the lag before the policy acted.
    :param policy: its name.
    """

    after: int
    exceeded: str
    queued: Lag
    policy: str
    first: int = 0
    last: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    by_type: Counter[str] = field(default_factory=Counter)

    def add(self, event: StoredEvent) -> None:
        """Count one event, in order."""
        self.first = self.first or event.seq
        self.last = event.seq
        self.dropped += 1
        self.dropped_bytes += len(event.payload)
        self.by_type[event.type] += 1

    def add_all(self, events: Iterable[StoredEvent]) -> None:
        """Count events, in order."""
        for event in events:
            self.add(event)

    def properties(self, limits: Limits, action: str, cursor: str) -> dict[str, Any]:
        """Properties of ``server.stream.lagged``."""
        return {
            "limit": limits.events,
            "limitBytes": limits.bytes,
            "exceeded": self.exceeded,
            "queued": self.queued.events,
            "queuedBytes": self.queued.bytes,
            "dropped": self.dropped,
            "droppedBytes": self.dropped_bytes,
            "first": self.first,
            "last": self.last,
            "byType": dict(self.by_type),
            "policy": self.policy,
            "action": action,
            "lastCursor": cursor,
        }
