"""``memory://``: a ring bounded by events and bytes. Every start is a new epoch, since nothing outlives the process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ..events import StoredEvent
from ..ids import new_epoch
from ..settings import Settings
from . import KNOWN_MAX, Appended, Bounds, EpochStart, Evicted, Page, Retention, StoreListener, retention_of

DEFAULT_RETENTION: Final = Retention(10_000, 64 * 1024 * 1024)


class MemoryEventStore:
    """Keeps the newest events within ``retention``; always at least the newest one."""

    kind = "memory"

    def __init__(
        self, retention: Retention = DEFAULT_RETENTION, *, epoch: str = "", now: Callable[[], float] = time.monotonic
    ) -> None:
        self.retention = retention
        self._most, self._most_bytes, self._age = retention
        self._now = now
        #: By sequence number, so that a page costs the same wherever it begins.
        self._events: dict[int, StoredEvent] = {}
        self._times: deque[float] = deque()
        self._bytes = 0
        self._latest = 0
        self._known: dict[tuple[str, str], int] = {}
        self._epochs: tuple[EpochStart, ...] = (EpochStart(epoch or new_epoch(), 0),)
        self._listener: StoreListener | None = None

    async def open(self, listener: StoreListener) -> Bounds:
        self._listener = listener
        return await self.bounds()

    async def close(self) -> None:
        self._listener = None

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        return self.append_now(events)

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        """Store at once; see ``EventStore.append``."""
        known, held = self._known, self._events
        seqs: list[int] = []
        fresh: list[StoredEvent] = []
        for event in events:
            name = (event.id, event.type)
            if name in known:
                seqs.append(known[name])
                continue
            size = len(event.payload)
            # Without a call in between, so that nothing which interrupts leaves it half stored.
            self._latest = event.seq = known[name] = seq = self._latest + 1
            held[seq] = event
            self._bytes += size
            fresh.append(event)
            seqs.append(seq)
        if self._age is not None:
            self._times.extend([self._now()] * len(fresh))
        self._evict()
        if fresh and self._listener is not None:
            self._listener.visible(fresh)
        return Appended(seqs, len(events) - len(fresh))

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        self._evict()
        oldest = self._latest - len(self._events) + 1
        if after < oldest - 1:
            return Evicted(oldest)
        events: list[StoredEvent] = []
        size = 0
        for seq in range(after + 1, min(after + limit, self._latest) + 1):
            event = self._events[seq]
            size += len(event.payload)
            if events and size > max_bytes:
                break
            events.append(event)
        return Page(events, events[-1].seq if events else after)

    async def bounds(self) -> Bounds:
        self._evict()
        return Bounds(self._latest - len(self._events) + 1, self._latest, self._epochs)

    def begin_epoch(self, end: int) -> None:
        """Lose all history beyond ``end`` and go on under a new epoch, as a store does whose newest part was lost."""
        for seq in range(self._latest, max(end, self._latest - len(self._events)), -1):
            event = self._events.pop(seq)
            self._bytes -= event.size
            if self.retention.age is not None:
                self._times.pop()
            self._known.pop((event.id, event.type), None)
        self._latest = min(end, self._latest)
        self._epochs = (*self._epochs, EpochStart(new_epoch(), self._latest))
        if self._listener is not None:
            bounds = Bounds(self._latest - len(self._events) + 1, self._latest, self._epochs)
            self._listener.epoch_changed(bounds, self._latest)

    def statistics(self) -> dict[str, int]:
        """Bounds, events and bytes held; more than is visible yet."""
        count = len(self._events)
        return {"oldest": self._latest - count + 1, "latest": self._latest, "events": count, "bytes": self._bytes}

    def _evict(self) -> None:
        held = len(self._events)
        while (held > self._most or self._bytes > self._most_bytes) and held > 1:
            self._forget_oldest()
            held -= 1
        if self._age is not None:
            limit = self._now() - self._age
            while self._times and self._times[0] < limit:
                self._forget_oldest()
        while len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]

    def _forget_oldest(self) -> None:
        held, known = self._events, self._known
        seq = self._latest - len(held) + 1
        event = held.pop(seq)
        self._bytes -= len(event.payload)
        if self._age is not None:
            self._times.popleft()
        # A republished id may be known under a newer number by now.
        name = (event.id, event.type)
        if known.get(name) == seq:
            del known[name]


def open_memory(url: str, settings: Settings) -> MemoryEventStore:
    """Make the store of ``memory://`` with the retention of the settings."""
    return MemoryEventStore(retention_of(settings, DEFAULT_RETENTION))
