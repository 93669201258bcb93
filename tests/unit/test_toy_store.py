"""The store of docs/stores.md, which others copy: it keeps the contract, and is registered from outside."""

from __future__ import annotations

import re
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from opencode_sse_plugin import EventBus, EventStore, Filter, Retention, Settings
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import EventStoreContract

PAGE = Path(__file__).parents[2] / "docs/stores.md"


def documented() -> types.ModuleType:
    """The first Python block of the page, as the module of a plugin."""
    block = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    module = types.ModuleType("list_store")
    exec(compile(block[1], str(PAGE), "exec"), module.__dict__)
    return module


class TestListStore(EventStoreContract):
    retains_age = False
    known_max = 1000

    @asynccontextmanager
    async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
        yield documented().ListStore(retention)


@pytest.mark.anyio
async def test_it_is_registered_from_outside() -> None:
    plugins = Plugins(discover=False)
    plugins.register(documented())
    async with EventBus(Settings(store="list://", retain_events=3), plugins=plugins) as bus:
        assert bus.statistics()["store"]["kind"] == "list"
        for number in range(5):
            await bus.publish("test.event", {"number": number})
        async with bus.subscribe(Filter(), after=2) as events:
            numbers = [(await anext(events)).seq for _ in range(4)]
        assert numbers == [None, 3, 4, 5]
