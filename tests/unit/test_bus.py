"""The bus in-process: publishing in every way, subscribing, draining, statistics."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from opencode_sse_plugin import (
    BusClosed,
    ConfigurationError,
    Delivery,
    Event,
    EventBus,
    Filter,
    InvalidEvent,
    Limits,
    PublishBufferFull,
    Retention,
    Settings,
    StoreUnavailable,
    hookimpl,
    log,
    publisher,
)
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Appended, StoredEvent, Submission
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import ManualClock, settle

pytestmark = pytest.mark.anyio


def bus_with(*plugins: object, store: Any = None, **settings: Any) -> EventBus:
    loaded = Plugins(discover=False)
    for plugin in plugins:
        loaded.register(plugin)
    return EventBus(Settings(**settings), store=store, plugins=loaded)


class SlowStore(MemoryEventStore):
    """A store whose append takes until it is let go; one that fails when told to."""

    append_now = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.go = anyio.Event()
        self.error: Exception | None = None
        self.appends: list[int] = []

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.appends.append(len(events))
        return MemoryEventStore.append_now(self, events)

    def let_go(self) -> None:
        self.go.set()


class SlowGroupingStore(SlowStore):
    """The same of one that groups by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[Submission] = []

    def submit(self, submission: Submission) -> None:
        self.handed.append(submission)
        if self.go.is_set():
            self.let_go()

    def let_go(self) -> None:
        super().let_go()
        handed, self.handed = self.handed, []
        if handed and self.error is None:
            self.appends.append(len(handed))
        for submission in handed:
            if self.error is None:
                submission.appended = MemoryEventStore.append_now(self, submission.events)
            submission.error = self.error
            submission.settle()


slow = pytest.mark.parametrize("store_type", [SlowStore, SlowGroupingStore])


# Publishing.


async def test_every_way_of_publishing_gives_neighbouring_numbers(sse_bus: EventBus) -> None:
    assert await sse_bus.publish("a", {"n": 1}) == 1
    assert await sse_bus.publish(Event("a", {"n": 2})) == 2
    sse_bus.publish_nowait("a", {"n": 3})
    assert await anyio.to_thread.run_sync(sse_bus.publish_from_thread, "a", {"n": 4}) == 4
    assert await sse_bus.publish_batch([Event("a", {"n": 5}), Event("a", {"n": 6})]) == [5, 6]
    async with sse_bus.subscribe(after=0) as events:
        got = [await anext(events) for _ in range(7)]
    assert [delivery.event.properties for delivery in got[1:]] == [{"n": n} for n in range(1, 7)]
    assert [delivery.seq for delivery in got[1:]] == list(range(1, 7))


async def test_the_place_of_an_event_is_a_keyword(sse_bus: EventBus) -> None:
    await sse_bus.publish("a", {}, directory="/d", project="p", workspace="w", id="mine", scope="global")
    async with sse_bus.subscribe(after=0) as events:
        await anext(events)
        event = (await anext(events)).event
    assert (event.directory, event.project, event.workspace, event.id, event.scope) == (
        "/d",
        "p",
        "w",
        "mine",
        "global",
    )


async def test_a_known_event_is_not_stored_again(sse_bus: EventBus) -> None:
    first = await sse_bus.publish("a", {"n": 1}, id="evt_1")
    assert await sse_bus.publish("a", {"n": 2}, id="evt_1") == first
    assert await sse_bus.publish("b", {"n": 2}, id="evt_1") == 2
    batch = [Event("c", id="x"), Event("c", id="x"), Event("a", id="evt_1")]
    assert await sse_bus.publish_batch_counting(batch) == ([3, 3, 1], 2)
    assert sse_bus.statistics()["counters"]["duplicates"] == 3


async def test_a_batch_is_stored_whole_or_not_at_all(sse_bus: EventBus) -> None:
    with pytest.raises(InvalidEvent) as caught:
        await sse_bus.publish_batch([Event("a"), Event("b", {"bad": object()}), Event("c")])
    assert caught.value.index == 1
    assert sse_bus.head == 0
    assert await sse_bus.publish_batch([]) == []


async def test_an_event_over_the_limit_is_refused() -> None:
    async with bus_with(max_event_bytes=100) as bus:
        with pytest.raises(InvalidEvent, match="max_event_bytes") as caught:
            await bus.publish("a", {"pad": "x" * 200})
        assert caught.value.too_large
        assert await bus.publish("a") == 1


async def test_a_big_number_of_properties_does_not_end_the_stream(sse_bus: EventBus) -> None:
    async with sse_bus.subscribe() as events:
        await anext(events)
        with pytest.raises(InvalidEvent):
            await sse_bus.publish("a", {"bad": {1, 2}})
        await sse_bus.publish("a", {"good": 2**70})
        assert (await anext(events)).event.properties == {"good": 2**70}


@slow
async def test_the_buffer_is_bounded_and_in_call_order(store_type: type[SlowStore]) -> None:
    store = store_type()
    async with bus_with(store=store, publish_buffer=3) as bus:
        for n in range(3):
            bus.publish_nowait("a", {"n": n})
        with pytest.raises(PublishBufferFull, match="publish_buffer is 3"):
            bus.publish_nowait("a", {"n": 3})
        assert bus.statistics()["counters"]["buffered"] == 3
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.publish, "a", {"n": 3})  # waits for room
            await settle()
            assert bus.statistics()["counters"]["buffered"] == 3
            store.let_go()
        assert bus.head == 4
        async with bus.subscribe(after=0) as events:
            await anext(events)
            assert [(await anext(events)).event.properties for _ in range(4)] == [{"n": n} for n in range(4)]


@slow
async def test_many_publishers_share_one_append(store_type: type[SlowStore]) -> None:
    store = store_type()
    async with bus_with(store=store) as bus:
        async with anyio.create_task_group() as tasks:
            for n in range(50):
                tasks.start_soon(bus.publish, "a", {"n": n})
            await settle()
            store.let_go()
        assert bus.head == 50
        assert len(store.appends) <= 2


@slow
async def test_a_failing_store_fails_the_publish_and_tells_about_what_was_buffered(store_type: type[SlowStore]) -> None:
    failed: list[tuple[list[Event], Exception]] = []

    class Watcher:
        @hookimpl
        def sse_publish_failed(self, events: list[Event], error: Exception) -> None:
            failed.append((events, error))

    store = store_type()
    async with bus_with(Watcher(), store=store) as bus:
        store.error = StoreUnavailable("gone")
        store.let_go()
        with pytest.raises(StoreUnavailable, match="gone"):
            await bus.publish("a")
        bus.publish_nowait("b", {"n": 1})
        await settle()
        ((events, error),) = failed
        assert [event.type for event in events] == ["b"]
        assert str(error) == "gone"
        store.error = None
        assert await bus.publish("c") == 1


@slow
async def test_a_drain_fails_what_the_store_does_not_take_in_time(store_type: type[SlowStore]) -> None:
    failed: list[str] = []

    class Watcher:
        @hookimpl
        def sse_publish_failed(self, events: list[Event], error: Exception) -> None:
            failed.append(type(error).__name__)

    store = store_type()
    async with bus_with(Watcher(), store=store) as bus:
        bus.publish_nowait("a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.drain)
            await settle()
            with pytest.raises(BusClosed):
                await bus.publish("b")
        assert failed == ["StoreUnavailable"]


async def test_a_store_that_gives_no_answer_keeps_no_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []

    class Watcher:
        @hookimpl
        def sse_publish_failed(self, events: list[Event], error: Exception) -> None:
            failed.extend(event.type for event in events)

    monkeypatch.setattr(publisher, "_GRACE", 0.0)
    store = SlowGroupingStore()
    async with bus_with(Watcher(), store=store, publish_deadline=0.05) as bus:
        bus.publish_nowait("a")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.05 s; whether it was stored is not known"):
                await bus.publish("b")
        assert failed == ["a"]
        assert bus.statistics()["counters"]["buffered"] == 0
        store.let_go()  # Its late answers are nobody's business any more.
        assert await bus.publish("c") == 4
        assert bus.statistics()["counters"]["published"] == 1


async def test_what_a_store_was_handed_stays_before_what_waits_for_a_subscriber() -> None:
    store = SlowGroupingStore()
    async with bus_with(store=store) as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(bus.publish, "a", {"n": 0})
        await settle()
        async with bus.subscribe(overflow="block") as events:
            await anext(events)
            tasks.start_soon(bus.publish, "a", {"n": 1})
            await settle()
            assert len(store.handed) == 1
            store.let_go()
            assert [(await anext(events)).event.properties for _ in range(2)] == [{"n": 0}, {"n": 1}]
        assert await bus.publish("a", {"n": 2}) == 3


async def test_publish_nowait_from_another_thread_names_the_way(sse_bus: EventBus) -> None:
    with pytest.raises(BusClosed, match="publish_from_thread"):
        await anyio.to_thread.run_sync(sse_bus.publish_nowait, "a")


async def test_a_bus_that_does_not_run_takes_nothing() -> None:
    bus = bus_with()
    with pytest.raises(BusClosed):
        await bus.publish("a")
    async with bus:
        pass
    for call in (bus.publish_nowait, bus.publish_from_thread):
        with pytest.raises(BusClosed):
            call("a")


# Subscribing.


@pytest.mark.parametrize("after", [2, "{epoch}:2"])
async def test_resuming_in_process(sse_bus: EventBus, after: int | str) -> None:
    for n in range(1, 5):
        await sse_bus.publish("a", {"n": n})
    if isinstance(after, str):
        after = after.format(epoch=sse_bus.epoch)
    async with sse_bus.subscribe(after=after) as events:
        got = [await anext(events) for _ in range(3)]
    assert [delivery.event.type for delivery in got] == ["server.heartbeat", "a", "a"]
    assert got[0].cursor == f"{sse_bus.epoch}:2"
    assert got[-1].cursor == f"{sse_bus.epoch}:4"


async def test_a_filter_and_an_overflow_policy_in_process(sse_bus: EventBus) -> None:
    from opencode_sse_plugin import Limits

    async with sse_bus.subscribe(Filter.of(type="b"), limits=Limits(2, 1000), overflow="drop-oldest") as events:
        await anext(events)
        for _ in range(5):
            await sse_bus.publish("a")
            await sse_bus.publish("b")
            await settle()
        lagged, event = await anext(events), await anext(events)
        assert lagged.event.properties["dropped"] == 4  # type: ignore[index]
        assert (event.event.type, event.seq) == ("b", 10)


async def test_an_unknown_policy_names_what_exists(sse_bus: EventBus) -> None:
    with pytest.raises(ConfigurationError, match=r"there are .*disconnect.*drop-oldest"):
        async with sse_bus.subscribe(overflow="nix"):
            pass


async def test_a_thousand_subscribers_leave_nothing_behind(sse_bus: EventBus) -> None:
    for n in range(1000):
        async with sse_bus.subscribe(Filter.of(session=f"s{n}")) as events:
            await anext(events)
    assert sse_bus.statistics()["subscribers"] == []
    assert len(list(sse_bus.log.channels)) == 0
    assert not sse_bus.log.followers


# Life.


async def test_a_bus_can_be_started_again(sse_bus: EventBus) -> None:
    bus = bus_with()
    async with bus:
        first = bus.epoch
        await bus.publish("a")
    async with bus:
        assert await bus.publish("a") is not None
        assert first == bus.epoch, "the same store object kept its events"


async def test_a_failing_startup_closes_the_store_and_says_so() -> None:
    class Broken:
        @hookimpl
        async def sse_startup(self, bus: EventBus) -> None:
            raise LookupError("no database")

    closed: list[bool] = []

    class Store(MemoryEventStore):
        async def close(self) -> None:
            closed.append(True)

    with pytest.raises(LookupError, match="no database"):
        async with bus_with(Broken(), store=Store()):
            pytest.fail("it started")
    assert closed == [True]


async def test_start_and_drain_without_a_scope(anyio_backend: str) -> None:
    bus = bus_with()
    if anyio_backend == "trio":
        with pytest.raises(BusClosed, match="async with"):
            await bus.start()
        return
    await asyncio.gather(bus.start(), bus.start())
    assert await bus.publish("a") == 1
    await asyncio.gather(bus.drain(), bus.drain())
    assert bus.state == "closed"


async def test_a_cancelled_drain_is_finished_all_the_same() -> None:
    async with bus_with() as bus:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await bus.drain()
        assert bus.state == "closed"


async def test_threads_publish_in_any_number() -> None:
    async with bus_with() as bus:

        def publish() -> None:
            for _ in range(50):
                bus.publish_from_thread("a")

        threads = [threading.Thread(target=publish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        assert bus.head == 200


class BehindAWindow(MemoryEventStore):
    """A store that keeps more than the live window does, as durable ones do."""

    kind = "large"


async def test_no_heartbeat_comes_before_what_retention_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader fell out of the window, then out of the store, and nothing that is left matches its filter."""
    monkeypatch.setattr(log, "WINDOW_EVENTS", 4)
    clock = ManualClock()
    plugins = Plugins(discover=False)
    store = BehindAWindow(Retention(12, 100_000))
    settings = Settings(queue_max=2, heartbeat=10)
    async with (
        EventBus(settings, store=store, plugins=plugins, clock=clock) as bus,
        bus.subscribe(Filter.of(type="seen"), limits=Limits(100, 100_000)) as events,
    ):
        connected = await anext(events)
        for type in ["seen"] * 8 + ["unseen"] * 12:
            await bus.publish(type)
        await clock.advance(11)
        with anyio.fail_after(30):
            lagged, heartbeat = await anext(events), await anext(events)
    assert (connected.event.type, connected.cursor) == ("server.connected", f"{bus.epoch}:0")
    assert (lagged.event.type, lagged.cursor) == ("server.stream.lagged", None)
    told = lagged.event.properties or {}
    assert (told["exceeded"], told["first"], told["last"]) == ("retention", 1, 8)
    assert (heartbeat.event.type, heartbeat.cursor) == ("server.heartbeat", f"{bus.epoch}:20")


async def test_a_batch_of_unequal_events_overflows_nobody_who_keeps_up() -> None:
    """A slice holds half of the limits, but at least one event, which may be larger than that."""
    received: list[str] = []

    async def read(events: AsyncIterator[Delivery]) -> None:
        async for delivery in events:
            received.append(delivery.event.type)
            for _ in range(5):  # It is busy for a few turns with each.
                await anyio.lowlevel.checkpoint()

    async with (
        bus_with() as bus,
        bus.subscribe(limits=Limits(1000, 500)) as events,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(read, events)
        await settle()
        for _ in range(10):
            await bus.publish_batch([Event("small", {"x": "x" * 100}), Event("large", {"x": "x" * 250})])
        await settle()
        tasks.cancel_scope.cancel()
    assert received == ["server.connected", *["small", "large"] * 10]
