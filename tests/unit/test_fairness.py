"""Bounded work per turn of the event loop: what one subscriber needs delays nobody else. Counted, never timed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from opencode_sse_plugin import EventBus, Filter, Grant, Settings, event_app, hookimpl
from opencode_sse_plugin import fanout as fanout_module
from opencode_sse_plugin.channel import BATCH_BYTES
from opencode_sse_plugin.channels import WAKE_AT_ONCE
from opencode_sse_plugin.fanout import PAGES_AT_ONCE, Fanout
from opencode_sse_plugin.frames import EVENT, OBJECT
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.subscription import Subscription
from opencode_sse_plugin.testing import settle, stream


class Turns:
    """How often something is done between two turns of the event loop; on asyncio."""

    def __init__(self) -> None:
        self.count = 0
        self.most = 0
        self._loop = asyncio.get_running_loop()
        self._next()

    def _next(self) -> None:
        self.most = max(self.most, self.count)
        self.count = 0
        self._handle = self._loop.call_soon(self._next)

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.count += 1
            return function(*args)

        return counted

    def stop(self) -> None:
        self._handle.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_turn_wakes_so_many_readers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = 3 * WAKE_AT_ONCE + 7
    async with EventBus(plugins=Plugins(discover=False)) as bus, anyio.create_task_group() as tasks:
        turns = Turns()
        monkeypatch.setattr(Subscription, "give", turns.counting(Subscription.give))
        attached: list[int] = []
        got: list[int] = []

        async def read() -> None:
            async with bus.subscribe() as deliveries:
                async for delivery in deliveries:
                    if delivery.seq is None:
                        attached.append(1)
                        continue
                    got.append(delivery.seq)
                    return

        for _ in range(readers):
            tasks.start_soon(read)
        while len(attached) < readers:
            await anyio.lowlevel.checkpoint()
        await bus.publish("good")
        while len(got) < readers:
            await anyio.lowlevel.checkpoint()
        turns.stop()
        assert turns.most == WAKE_AT_ONCE


class Rests:
    """The event loop as a fan-out sees it: time that only reading takes, and timers that end only when told."""

    def __init__(self, fanout: Fanout) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], object], asyncio.Event]] = []
        fanout._call_later = self._later  # type: ignore[assignment]

    def perf_counter(self) -> float:
        return self.now

    def _later(self, delay: float, call: Callable[[], object]) -> Any:
        cancelled = asyncio.Event()
        self.timers.append((delay, call, cancelled))
        return SimpleNamespace(cancel=cancelled.set)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("share", "rest", "longest"), [(1 / 3, 0.020, 0.030), (0.5, 0.010, 0.015), (1.0, 0.0, 0.0)])
async def test_waking_many_takes_a_share_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, share: float, rest: float, longest: float
) -> None:
    """What comes while it rests goes out together: with the first event behind it, or after half as long; ten
    wait for half of it."""
    settings = Settings(loop_share=share)
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus, anyio.create_task_group() as tasks:
        rests = Rests(bus.log.fanout)
        monkeypatch.setattr(fanout_module, "time", rests)
        got: list[int] = []

        async def read() -> None:
            subscription = await bus.attach(bus.new_subscriber("event", Filter(), Grant.everything()), EVENT)
            while (chunk := await subscription.next()) is not None:
                rests.now += 0.010 / WAKE_AT_ONCE
                got.append(chunk.count(b"data:"))

        for _ in range(WAKE_AT_ONCE):
            tasks.start_soon(read)
        await settle()

        async def given() -> list[int]:
            """How many events each of those got who got something."""
            got.clear()
            await settle()
            return got.copy()

        bus.publish_nowait("at once")
        assert await given() == [1] * WAKE_AT_ONCE
        awake = rests.now
        if not rest:
            bus.publish_nowait("at once")
            assert await given() == [1] * WAKE_AT_ONCE
            assert not rests.timers
        else:
            bus.publish_nowait("while it rests")
            rests.now = awake + rest * 0.9
            bus.publish_nowait("while it rests")
            assert await given() == []
            rests.now = awake + rest * 1.01
            bus.publish_nowait("when it has rested")
            assert await given() == [3] * WAKE_AT_ONCE
            ((delay, _, cancelled),) = rests.timers
            assert delay == pytest.approx(longest)
            assert cancelled.is_set()

            bus.publish_nowait("and nothing more")
            assert await given() == []
            rests.timers[1][1]()
            assert await given() == [1] * WAKE_AT_ONCE
            awake = rests.now
            rests.now = awake + rest * 0.49
            for _ in range(10):
                bus.publish_nowait("many")
            assert await given() == []
            rests.now = awake + rest * 0.51
            bus.publish_nowait("many")
            assert await given() == [11] * WAKE_AT_ONCE
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_others_do_during_a_wake_up_prolongs_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async with EventBus(plugins=Plugins(discover=False)) as bus, anyio.create_task_group() as tasks:
        rests = Rests(bus.log.fanout)
        monkeypatch.setattr(fanout_module, "time", rests)
        written: list[bytes] = []

        class Writer:
            def write(self, chunk: bytes) -> bool:
                rests.now += 0.010 / WAKE_AT_ONCE
                written.append(chunk)
                return True

        async def read() -> None:
            subscription = await bus.attach(bus.new_subscriber("event", Filter(), Grant.everything()), EVENT)
            subscription.writer = Writer()
            while await subscription.next() is not None:
                pass

        def work_for_a_second() -> None:
            assert len(written) == WAKE_AT_ONCE
            rests.now += 1.0

        for _ in range(WAKE_AT_ONCE):
            tasks.start_soon(read)
        await settle()
        bus.publish_nowait("at once")
        asyncio.get_running_loop().call_soon(work_for_a_second)
        await settle()
        assert rests.now == pytest.approx(1.010)
        bus.publish_nowait("while it rests")
        ((delay, *_),) = rests.timers
        assert delay == pytest.approx(0.030)
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_replays_take_turns_and_a_live_reader_is_not_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryEventStore()
    async with EventBus(store=store, plugins=Plugins(discover=False)) as bus, anyio.create_task_group() as tasks:
        for n in range(5000):
            bus.publish_nowait("old", {"n": n})
        turns = Turns()
        pages: list[int] = []
        take = Subscription._take_page

        def taking(subscription: Subscription[Any], page: Any) -> Any:
            turns.count += 1
            pages.append(page.last)
            return take(subscription, page)

        monkeypatch.setattr(Subscription, "_take_page", taking)

        done: list[int] = []

        async def replay() -> None:
            async with bus.subscribe(after=0) as deliveries:
                async for delivery in deliveries:
                    if delivery.seq == 5000:
                        done.append(1)
                        return

        between: list[int] = []

        async def live() -> None:
            async with bus.subscribe() as deliveries:
                async for delivery in deliveries:
                    if delivery.event.type == "new":
                        between.append(len(pages) - delivery.event.properties["pages"])  # type: ignore[index]

        tasks.start_soon(live)
        for _ in range(40):
            tasks.start_soon(replay)
        while len(done) < 40:
            await anyio.lowlevel.checkpoint()
            if pages and len(pages) % 5 == 0:
                await bus.publish("new", {"pages": len(pages)})
        turns.stop()
        tasks.cancel_scope.cancel()
    assert len(pages) >= 40 * 5000 / 192
    assert 0 < turns.most <= PAGES_AT_ONCE
    assert len(between) > 10
    assert max(between) <= 4 * PAGES_AT_ONCE


@pytest.mark.anyio
async def test_a_big_backlog_goes_out_in_pieces() -> None:
    async with EventBus(Settings(queue_max=100_000), plugins=Plugins(discover=False)) as bus:
        subscriber = bus.new_subscriber("object", Filter(), Grant.everything())
        subscription = await bus.attach(subscriber, OBJECT)
        await subscription.next()
        for _ in range(3000):
            bus.publish_nowait("good", {"pad": "x" * 250})
        left = 3000
        while left:
            chunk = await subscription.next()
            assert chunk is not None
            assert len(chunk) * 250 <= BATCH_BYTES
            left -= len(chunk)
        await bus.publish("big", {"pad": "x" * 500_000})
        await bus.publish("small")
        assert [len(await subscription.next() or ()) for _ in range(2)] == [1, 1]
        bus.detach(subscription)


@pytest.mark.anyio
async def test_a_slow_hook_of_one_keeps_nobody_else_waiting() -> None:
    class Slow:
        @hookimpl
        async def sse_subscriber_attach(self, subscriber: Any, request: Any) -> None:
            if subscriber.filter.sessions:
                hooked.set()
                await go.wait()

    hooked, go = anyio.Event(), anyio.Event()
    plugins = Plugins(discover=False)
    plugins.register(Slow())
    async with EventBus(plugins=plugins) as bus, anyio.create_task_group() as tasks:
        app = event_app(bus, authorize=None)

        async def slow() -> None:
            async with stream(app, "/event?session=slow") as response:
                assert (await response.next()).type == "server.connected"

        tasks.start_soon(slow)
        await hooked.wait()
        async with stream(app, "/event") as response:
            assert (await response.next()).type == "server.connected"
            await bus.publish("good")
            assert (await response.next()).type == "good"
            assert len(bus.statistics()["subscribers"]) == 1
        go.set()


@pytest.mark.anyio
async def test_a_stalled_reader_keeps_nobody_else_waiting() -> None:
    async with EventBus(plugins=Plugins(discover=False)) as bus:
        app = event_app(bus, authorize=None)
        async with stream(app, "/event", window=1000) as stalled, stream(app, "/event") as healthy:
            assert [(await one.next()).type for one in (stalled, healthy)] == ["server.connected"] * 2
            for n in range(100):
                await bus.publish("good", {"n": n, "pad": "x" * 200})
                assert (await healthy.next()).properties["n"] == n
            assert stalled.blocked
