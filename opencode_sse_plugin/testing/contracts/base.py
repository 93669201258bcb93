"""What an author of a store writes, what a store may promise, and what all tests of the contract use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import ClassVar, Final

import anyio
import anyio.lowlevel
import pytest

from ...events import StoredEvent
from ...stores import Bounds, EventStore, Evicted, Page, Retention
from ..samples import RecordingListener

PLENTY: Final = Retention(1_000_000, 1 << 30)
ALL: Final = 1 << 40
_FIELDS: Final = ("id", "type", "session", "directory", "project", "workspace", "scope", "payload")


@pytest.mark.anyio
class StoreContract(ABC):
    """Promises, hooks and helpers; the tests are in the modules beside this one."""

    #: What was acknowledged is there after ``close`` and ``reopen``.
    durable: ClassVar[bool] = False
    #: Several stores may be open upon one log at the same time, as the processes of a host have them; see ``another``.
    shared: ClassVar[bool] = False
    #: ``Retention.age`` is kept.
    retains_age: ClassVar[bool] = True
    #: How many (id, type) pairs the store remembers at most.
    known_max: ClassVar[int] = 100_000
    #: Seconds until the listener must have been told what was appended.
    patience: ClassVar[float] = 15.0

    # What an author writes.

    @abstractmethod
    def make_store(self, retention: Retention) -> AbstractAsyncContextManager[EventStore]:
        """A store upon an empty log, not opened yet; cleaned up when the context ends."""

    async def reopen(self, store: EventStore) -> EventStore:
        """A store upon the log of one that was closed, not opened yet; by default the same object."""
        return store

    async def another(self, store: EventStore) -> EventStore:
        """A further store upon the log of one that is open, as another process would have it; not opened yet."""
        raise NotImplementedError("a store that is `shared` says how there can be another one")

    async def prune(self, store: EventStore) -> None:
        """Return once retention has done its work; for stores that evict in the background."""
        await anyio.lowlevel.checkpoint()

    async def pass_time(self, seconds: float) -> None:
        """Let events grow older; for stores whose clock a test can move."""
        await anyio.sleep(seconds)

    async def lose_history(self, store: EventStore, end: int) -> None:
        """Make the store lose, and notice that it lost, all events after ``end``."""
        pytest.skip("this store offers no way to make it lose history")

    # Helpers.

    @asynccontextmanager
    async def opened(self, retention: Retention = PLENTY) -> AsyncIterator[tuple[EventStore, RecordingListener]]:
        """An open store upon an empty log, and who is told."""
        async with self.make_store(retention) as store:
            told = RecordingListener()
            await store.open(told)
            try:
                yield store, told
            finally:
                await store.close()

    @asynccontextmanager
    async def opened_twice(
        self, retention: Retention = PLENTY
    ) -> AsyncIterator[tuple[tuple[EventStore, RecordingListener], tuple[EventStore, RecordingListener]]]:
        """Two stores open upon one empty log, each with who is told."""
        if not self.shared:
            pytest.skip("one log is open in one store at a time")
        async with self.opened(retention) as (store, told):
            other, other_told = await self.another(store), RecordingListener()
            await other.open(other_told)
            try:
                yield (store, told), (other, other_told)
            finally:
                await other.close()

    async def read(self, store: EventStore, after: int, limit: int = 1000, max_bytes: int = ALL) -> Page | Evicted:
        """Read, and check what every page has in common."""
        got = await store.read(after, limit, max_bytes)
        if isinstance(got, Evicted):
            return got
        seqs = [event.seq for event in got.events]
        assert seqs == list(range(after + 1, after + 1 + len(seqs))), f"a page after {after} has holes"
        assert len(seqs) <= limit, "a page holds more than asked for"
        assert got.last == (seqs[-1] if seqs else after), "last is the position after the page"
        return Page(list(got.events), got.last)

    async def page(self, store: EventStore, after: int, limit: int = 1000, max_bytes: int = ALL) -> Page:
        """Read where nothing is missing."""
        got = await self.read(store, after, limit, max_bytes)
        assert isinstance(got, Page), f"nothing is missing after {after}, and yet it is {got}"
        return got


def span(bounds: Bounds) -> tuple[int, int]:
    """Oldest and latest."""
    return bounds.oldest, bounds.latest


def contents(events: Sequence[StoredEvent]) -> list[tuple[object, ...]]:
    """All that a store must give back beside numbers; taken before an append, since a store may keep the objects."""
    return [tuple(getattr(event, field) for field in _FIELDS) for event in events]
