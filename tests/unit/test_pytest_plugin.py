"""The fixtures for tests of hosts and plugins."""

from __future__ import annotations

import pytest

from opencode_sse_plugin.bus import EventBus
from opencode_sse_plugin.settings import Settings
from opencode_sse_plugin.testing import ManualClock

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_QUEUE_MAX", "7")


async def test_the_bus_runs_and_is_empty(sse_bus: EventBus) -> None:
    assert sse_bus.head == 0
    assert await sse_bus.publish("test.event", {"n": 1}) == 1


async def test_the_bus_does_not_look_at_the_environment(sse_bus: EventBus) -> None:
    assert sse_bus.settings == Settings()


async def test_the_bus_lives_by_the_manual_clock(sse_bus: EventBus, manual_clock: ManualClock) -> None:
    async with sse_bus.subscribe() as events:
        assert (await anext(events)).event.type == "server.connected"
        await manual_clock.advance(sse_bus.settings.heartbeat)
        assert (await anext(events)).event.type == "server.heartbeat"
