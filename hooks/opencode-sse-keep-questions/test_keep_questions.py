"""Through the stream: what a subscriber gets that fell behind."""

from __future__ import annotations

import opencode_sse_keep_questions
import pytest

from opencode_sse_plugin import EventBus, Limits, Settings
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import settle

pytestmark = pytest.mark.anyio


@pytest.fixture
def bus() -> EventBus:
    plugins = Plugins(discover=False)
    plugins.register(opencode_sse_keep_questions)
    return EventBus(Settings(overflow="keep-questions"), plugins=plugins)


async def read_after(bus: EventBus, types: list[str]) -> list[str]:
    """What a subscriber with room for four events is given that was busy while these were published."""
    async with bus, bus.subscribe(limits=Limits(4, 1_000_000)) as events:
        assert (await anext(events)).event.type == "server.connected"
        for type in [*types, "question.last"]:
            await bus.publish(type, {})
            await settle()
        got: list[str] = []
        async for delivery in events:
            got.append(delivery.event.type)
            if got[-1] == "question.last":
                break
        return got


async def test_questions_outlive_the_text_around_them(bus: EventBus) -> None:
    got = await read_after(bus, ["text"] * 5 + ["permission.asked"] + ["text"] * 5)
    assert got == ["server.stream.lagged", "permission.asked", "server.stream.lagged", "question.last"]


async def test_too_many_questions_end_the_stream_so_that_the_client_resumes(bus: EventBus) -> None:
    got = await read_after(bus, ["question.asked"] * 10)
    assert got == ["server.stream.lagged"]
