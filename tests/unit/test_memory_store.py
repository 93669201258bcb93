"""The memory store: the contract of every store, and what is its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from opencode_sse_plugin.settings import Settings
from opencode_sse_plugin.stores import EventStore, Retention
from opencode_sse_plugin.stores.memory import DEFAULT_RETENTION, MemoryEventStore, open_memory
from opencode_sse_plugin.testing import EventStoreContract
from opencode_sse_plugin.testing.samples import stored_events


class TestMemoryEventStore(EventStoreContract):
    durable = True  # for as long as its object lives: closing loses nothing

    def setup_method(self) -> None:
        self.time = 1000.0

    @asynccontextmanager
    async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
        yield MemoryEventStore(retention, now=lambda: self.time)

    async def pass_time(self, seconds: float) -> None:
        self.time += seconds

    async def lose_history(self, store: EventStore, end: int) -> None:
        assert isinstance(store, MemoryEventStore)
        store.begin_epoch(end)


def test_it_counts_what_it_holds() -> None:
    store = MemoryEventStore(Retention(3, 1000))
    store.append_now(stored_events(4, size=150))
    assert store.statistics() == {"oldest": 2, "latest": 4, "events": 3, "bytes": 450}
    store.append_now(stored_events(1, size=800))
    assert store.statistics() == {"oldest": 4, "latest": 5, "events": 2, "bytes": 950}
    store.begin_epoch(4)
    assert store.statistics() == {"oldest": 4, "latest": 4, "events": 1, "bytes": 150}


def test_the_url_takes_retention_from_the_settings() -> None:
    assert open_memory("memory://", Settings()).retention == DEFAULT_RETENTION
    settings = Settings(retain_events=7, retain_bytes=8, retain_age=9.0)
    assert open_memory("memory://", settings).retention == Retention(7, 8, 9.0)


def test_it_keeps_known_names_for_stored_events_only() -> None:
    store = MemoryEventStore(Retention(10, 1 << 20, age=5.0), now=lambda: 0.0)
    for _ in range(50):
        store.append_now(stored_events(3))
    assert len(store._known) == len(store._events) == len(store._times) == 10
    store.begin_epoch(145)
    assert len(store._known) == len(store._events) == len(store._times) == 5


@pytest.mark.anyio
async def test_a_named_epoch_is_taken() -> None:
    assert (await MemoryEventStore(epoch="here").bounds()).epoch == "here"
