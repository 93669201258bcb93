"""Who is asked for room before an append: at each one the answer is as if it were everyone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import anyio
import pytest

from opencode_sse_plugin import EventBus, Filter, Limits, Settings, StoredEvent, Subscriber, hookimpl
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.position import Position
from opencode_sse_plugin.stores import Appended


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a subscription was asked something."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> None:
        method = getattr(Position, name)

        def counted(position: Position[Any], *arguments: Any) -> Any:
            counts[name] += 1
            return method(position, *arguments)

        monkeypatch.setattr(Position, name, counted)

    counting("holds")
    counting("has_room_for")
    return counts


@pytest.mark.anyio
async def test_those_who_keep_up_are_asked_once_a_slice(asked: Counter[str]) -> None:
    """100 readers that read and one that stalls: 400 appends ask the former when a slice of 20 has gone by."""
    settings = Settings(overflow="block?timeout=1m&then=drop-oldest", queue_max=40)
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus, AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(bus.subscribe()) for _ in range(100)]
        stalled = await stack.enter_async_context(bus.subscribe())
        for reader in [*readers, stalled]:
            await anext(reader)
        for number in range(400):
            if number % 40 == 30:
                while (await anext(stalled)).seq != number:
                    pass
            await bus.publish("a")
            for reader in readers:
                assert (await anext(reader)).seq == number + 1
    assert asked["has_room_for"] <= 101 * (400 / 20 + 1)
    # Once it is close to its limit, the one that stalls is asked at each append: for the first event and for all.
    assert 100 < asked["holds"] <= 2 * 400


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(2))
async def test_no_append_comes_before_everybody_has_room_or_was_too_slow(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers with limits of their own that read in fits and starts, are too late and recover, leave, come back and
    change their policy; at each append everyone is asked as a witness."""
    random = Random(seed)
    known: dict[int, Subscriber] = {}

    class Watcher:
        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            known[int(subscriber.caller)] = subscriber
            if len(known) == 12:
                attached.set()

    plugins = Plugins(discover=False)
    plugins.register(Watcher())
    bus = EventBus(Settings(retain_events=200), plugins=plugins)
    outcomes: Counter[str] = Counter()
    late: set[Any] = set()
    too_late = Position.too_late

    async def witnessed(events: Sequence[StoredEvent]) -> Appended:
        held = {blocker for blocker in bus.log.blocking.blockers if blocker.holds(events) is not None}
        assert held <= late, "somebody was not waited for"
        late.clear()
        outcomes["appends"] += 1
        return await append(events)

    def counted(position: Position[Any]) -> None:
        outcomes["late"] += 1
        late.add(position)
        too_late(position)

    monkeypatch.setattr(Position, "too_late", counted)

    async def read(number: int) -> None:
        mine = Random(f"{seed}.{number}")
        while not over.is_set():
            limits = Limits(mine.choice((1, 2, 7, 30, 100)), mine.choice((1000, 1 << 20)))
            policy = f"block?timeout={mine.choice(('2ms', '30ms'))}&then={mine.choice(('drop-oldest', 'catch-up'))}"
            filter = Filter(types=(("b",),)) if mine.random() < 0.3 else Filter()
            async with bus.subscribe(filter, limits=limits, overflow=policy, caller=str(number)) as events:
                for _ in range(mine.randint(1, 150)):
                    with anyio.move_on_after(0.02):
                        await anext(events)
                    if mine.random() < 0.05:
                        await anyio.sleep(mine.choice((0, 0.003, 0.02)))
                    if mine.random() < 0.01:
                        bus.set_overflow_policy(known[number], mine.choice((policy, "drop-newest", policy)))

    async with bus:
        append, over, attached = bus.log.store.append, anyio.Event(), anyio.Event()
        monkeypatch.setattr(bus.log.store, "append", witnessed)
        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for number in range(12):
                    tasks.start_soon(read, number)
                await attached.wait()
                for number in range(250):
                    pad = "x" * random.choice((1, 50, 900))
                    if random.random() < 0.3:
                        bus.publish_nowait(random.choice("ab"), {"pad": pad})
                    else:
                        await bus.publish(random.choice("ab"), {"pad": pad, "number": number})
                over.set()
    assert outcomes["appends"] > 100
    assert outcomes["late"] > 5
