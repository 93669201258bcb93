"""The guarantees of the stream over random histories (see ``tests/properties``), over Valkey."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import test_guarantees as over

from opencode_sse_plugin.stores.redis_store import RedisEventStore

from .brokers import Broker


class WatchedStore(over.Watched, RedisEventStore):
    """A log in Valkey that says whether it is at work."""


class GuaranteesOverValkey(over.GuaranteesOverSQLite):
    broker: Broker

    def make_store(self) -> Any:
        return WatchedStore(self.broker.url, self.retain, key=uuid.uuid4().hex)

    def other_store(self) -> Any:
        return RedisEventStore(self.broker.url, key=self.store.key)


@pytest.fixture(scope="module", autouse=True)
def _broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    GuaranteesOverValkey.broker = Broker("valkey", tmp_path_factory.mktemp("broker")).start()
    yield
    GuaranteesOverValkey.broker.kill()


TestGuaranteesOverValkey = pytest.mark.timeout(300)(over._case(GuaranteesOverValkey, "asyncio", 10))
