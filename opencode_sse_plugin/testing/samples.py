"""What a store is tried with: events of an exact size, and a listener that remembers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import anyio

from ..events import Event, StoredEvent
from ..stores import Bounds
from .connection import within

_numbers = count(1)


def stored_event(event: Event | None = None, *, id: str = "", type: str = "test.event", size: int = 0) -> StoredEvent:
    """An encoded event that no store has seen.

    :param event: by default one of ``type`` with a fresh id. :param size: of the payload in bytes, exactly, where it is
        more than the payload would have by itself.
    """
    if event is None:
        event = Event(type, {"pad": ""}, id=id or f"evt_{next(_numbers):026d}")
    stored = StoredEvent.encode(event)
    missing = size - stored.size
    if missing > 0:
        stored = StoredEvent.encode(Event(event.type, {"pad": "x" * missing}, id=event.id))
    return stored


def stored_events(number: int, size: int = 0) -> list[StoredEvent]:
    """So many of them."""
    return [stored_event(size=size) for _ in range(number)]


class RecordingListener:
    """A ``StoreListener`` that keeps what it is told."""

    def __init__(self) -> None:
        #: As if so many of the events told were not taken yet.
        self.waiting = 0
        self.events: list[StoredEvent] = []
        #: Where the events told go on after others that it missed.
        self.gaps: list[int] = []
        #: Each new epoch, as told.
        self.epochs: list[tuple[Bounds, int]] = []
        self._told = anyio.Event()

    def visible(self, events: Sequence[StoredEvent]) -> None:
        self.events.extend(events)
        self._wake()

    def missed(self, oldest: int) -> None:
        self.gaps.append(oldest)
        self._wake()

    def epoch_changed(self, bounds: Bounds, end: int) -> None:
        self.epochs.append((bounds, end))
        self._wake()

    @property
    def seqs(self) -> list[int]:
        """The numbers told, in the order they were told."""
        return [event.seq for event in self.events]

    async def until(self, seq: int, timeout: float) -> None:
        """Wait until this number was told. :raises TimeoutError: if it is not."""
        with within(timeout, f"the listener was not told event {seq}"):
            while not any(event.seq >= seq for event in self.events[-1:]):
                await self._told.wait()

    async def until_epoch(self, number: int, timeout: float) -> None:
        """Wait until so many new epochs were told. :raises TimeoutError: if they are not."""
        with within(timeout, f"the listener was not told of epoch change {number}"):
            while len(self.epochs) < number:
                await self._told.wait()

    def _wake(self) -> None:
        told, self._told = self._told, anyio.Event()
        told.set()
