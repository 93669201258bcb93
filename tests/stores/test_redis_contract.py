"""The contract of every store, on each server of Valkey and Redis there is."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from opencode_sse_plugin.stores import EventStore, Retention
from opencode_sse_plugin.stores.redis_log import keys_of
from opencode_sse_plugin.stores.redis_store import RedisEventStore
from opencode_sse_plugin.testing import EventStoreContract

from .brokers import Broker


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def cut(broker: Broker, key: str, end: int, *, elsewhere: bool = False) -> None:
    """Leave what a copy of the log would hold that was made when ``end`` was its newest event.

    :param elsewhere: as if another server had stored it.
    """
    stream, meta, known = keys_of(key)
    with broker.client() as client:
        entries = client.xrange(stream, "-", end)
        with client.pipeline() as together:
            together.delete(stream)
            for id, fields in entries:
                together.xadd(stream, fields, id=id)
            together.zremrangebyscore(known, end + 1, "+inf")
            newest = next(iter(entries[-1][1])) if entries else ""
            together.hset(meta, mapping={"head": str(end), "newest": newest})
            if elsewhere:
                together.hset(meta, mapping={"replid": "f" * 40, "run": "f" * 40})
            together.execute()


class TestRedisEventStore(EventStoreContract):
    durable = True
    shared = True

    @pytest.fixture(autouse=True)
    def _broker(self, broker: Broker) -> None:
        self.broker = broker
        self.time = 1_700_000_000.0

    def store(self, key: str, retention: Retention) -> RedisEventStore:
        return RedisEventStore(self.broker.url, retention, key=key, now=lambda: self.time)

    @asynccontextmanager
    async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
        store = self.store(uuid.uuid4().hex, retention)
        yield store
        await store.close()

    async def reopen(self, store: EventStore) -> EventStore:
        assert isinstance(store, RedisEventStore)
        return self.store(store.key, store.retention)

    async def another(self, store: EventStore) -> EventStore:
        return await self.reopen(store)

    async def prune(self, store: EventStore) -> None:
        assert isinstance(store, RedisEventStore)
        await store.prune()

    async def pass_time(self, seconds: float) -> None:
        self.time += seconds

    async def lose_history(self, store: EventStore, end: int) -> None:
        assert isinstance(store, RedisEventStore)
        cut(self.broker, store.key, end, elsewhere=True)
