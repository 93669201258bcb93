"""Every hook, called when its documentation says, with what it says. What happens when one fails: test_isolation.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from opencode_sse_plugin import (
    Backlog,
    Cursor,
    Disconnect,
    Event,
    EventBus,
    Filter,
    Limits,
    Outcome,
    Reject,
    Settings,
    Skip,
    Snapshot,
    Start,
    StoredEvent,
    Subscriber,
    event_app,
    hookimpl,
)
from opencode_sse_plugin.hookspecs import SPECS
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import ManualClock, request, settle, stream

pytestmark = pytest.mark.anyio


def bus_with(*plugins: object, clock: Any = None, **settings: Any) -> EventBus:
    loaded = Plugins(discover=False)
    for plugin in plugins:
        loaded.register(plugin)
    return EventBus(settings, plugins=loaded, clock=clock)


@pytest.mark.parametrize("hook", [spec.__name__ for spec in SPECS])
def test_every_hook_is_implemented_by_a_test(hook: str) -> None:
    assert f"def {hook}(self" in Path(__file__).read_text(encoding="utf-8")


async def test_settings_come_from_a_plugin_below_environment_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deployment:
        @hookimpl
        def sse_settings(self, settings: Settings) -> Settings:
            return replace(settings, queue_max=5, retry=5, heartbeat=5.0)

    monkeypatch.setenv("OPENCODE_SSE_RETRY", "6")
    bus = bus_with(Deployment(), heartbeat=7.0)
    assert (bus.settings.queue_max, bus.settings.retry, bus.settings.heartbeat) == (5, 6, 7.0)


async def test_policies_stores_and_classes_are_registered_by_name() -> None:
    class Brings:
        @hookimpl
        def sse_register_overflow_policies(self, register: Any) -> None:
            register("mine", lambda keep="1": Mine(int(keep)))

        @hookimpl
        def sse_register_event_stores(self, register: Any) -> None:
            register("mine", lambda url, settings: MemoryEventStore(epoch="mine"))

        @hookimpl
        def sse_register_delivery_classes(self, register: Any) -> None:
            register("mood.updated", "latest", lambda properties: properties["who"])

    class Mine:
        name = "mine"

        def __init__(self, keep: int) -> None:
            self.keep = keep

        def __call__(self, backlog: Backlog) -> Outcome:
            return Skip(((0, len(backlog.events) - self.keep),))

    async with bus_with(Brings(), overflow="mine?keep=1", store="mine://x") as bus:
        assert bus.epoch == "mine"
        mood = StoredEvent.encode(Event("mood.updated", {"who": "ann"}, id="evt_1"))
        assert bus.delivery.of(mood) == "latest"
        assert (bus.delivery.key(mood) or "").startswith("mood.updated\nann\n")
        async with bus.subscribe(limits=Limits(2, 1000)) as events:
            await anext(events)
            for _ in range(5):
                await bus.publish("a")
                await settle()
            lagged = await anext(events)
            assert lagged.event.properties["policy"] == "mine"  # type: ignore[index]
            assert (await anext(events)).seq == 5


async def test_routes_are_added_under_the_prefix() -> None:
    class More:
        @hookimpl
        def sse_routes(self, bus: EventBus) -> list[Route]:
            return [Route("/event/more", lambda request: PlainTextResponse(bus.epoch))]

    async with bus_with(More()) as bus:
        answer = await request(event_app(bus, authorize=None, path="/x"), "GET", "/x/event/more")
        assert answer.body.decode() == bus.epoch


async def test_startup_and_shutdown_frame_the_life_of_a_bus() -> None:
    states: list[str] = []

    class Life:
        @hookimpl
        async def sse_startup(self, bus: EventBus) -> None:
            await bus.publish("hello")
            states.append(bus.state)

        @hookimpl
        async def sse_shutdown(self, bus: EventBus) -> None:
            await anyio.lowlevel.checkpoint()
            states.append(bus.state)

    async with bus_with(Life()) as bus:
        assert bus.head == 1
    assert states == ["running", "draining"]


async def test_publish_hooks_are_a_chain() -> None:
    order: list[str] = []
    published: list[tuple[str, int]] = []

    class Masks:
        @hookimpl(tryfirst=True)
        def sse_event_publish(self, event: Event) -> Event | None:
            order.append("masks")
            return replace(event, properties={"masked": True}) if event.type == "secret" else None

    class Drops:
        @hookimpl
        def sse_event_publish(self, event: Event) -> bool | None:
            order.append("drops")
            assert event.type != "secret" or event.properties == {"masked": True}
            return False if event.type == "noise" else None

        @hookimpl
        def sse_event_published(self, event: StoredEvent, seq: int) -> None:
            published.append((event.type, seq))

    async with bus_with(Drops(), Masks()) as bus:
        assert await bus.publish("noise") is None
        assert await bus.publish("secret", {"password": "x"}, id="evt_1") == 1
        assert await bus.publish("secret", {"password": "x"}, id="evt_1") == 1  # known: not published again
        assert order == ["masks", "drops"] * 3
        assert published == [("secret", 1)]
        assert bus.statistics()["counters"]["vetoed"] == 1
        async with bus.subscribe(after=0) as events:
            await anext(events)
            event = (await anext(events)).event
            assert (event.properties, event.id) == ({"masked": True}, "evt_1")


async def test_what_was_buffered_and_could_not_be_stored_is_told() -> None:
    failed: list[tuple[list[str], str]] = []

    class Watcher:
        @hookimpl
        def sse_publish_failed(self, events: Sequence[Event], error: Exception) -> None:
            failed.append(([event.type for event in events], str(error)))

    class Full(MemoryEventStore):
        append_now = None  # type: ignore[assignment]

        async def append(self, events: Sequence[StoredEvent]) -> Any:
            raise OSError("disk full")

    plugins = Plugins(discover=False)
    plugins.register(Watcher())
    async with EventBus(Settings(), store=Full(), plugins=plugins) as bus:
        bus.publish_nowait("a")
        await settle()
        assert failed == [(["a"], "disk full")]


async def test_attach_narrows_limits_starts_and_refuses() -> None:
    class Doorman:
        @hookimpl
        async def sse_subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> None:
            await anyio.lowlevel.checkpoint()
            assert request is not None
            if "banned" in request.query_params:
                raise Reject(403, "banned")
            subscriber.narrow(Filter.of(type="a"))
            subscriber.limits = Limits(7, 7000)
            if "back" in request.query_params:
                subscriber.start = Start(Cursor(None, 1))

    async with bus_with(Doorman()) as bus:
        app = event_app(bus, authorize=None)
        for type in ("a", "b", "a"):
            await bus.publish(type)
        answer = await request(app, "GET", "/event?banned=1")
        assert (answer.status, answer.json()) == (403, {"error": "banned"})
        assert bus.statistics()["counters"]["rejected"] == 1
        async with stream(app, "/event?after_seq=0&type=b&type=a") as response:
            assert [frame.type for frame in await response.rest()] == ["server.connected", "a", "a"]
        async with stream(app, "/event?back=1") as response:
            frames = await response.take(2)
            assert [(frame.type, frame.id) for frame in frames] == [
                ("server.heartbeat", f"{bus.epoch}:1"),
                ("a", f"{bus.epoch}:3"),
            ]
            assert bus.statistics()["subscribers"][0]["limits"] == {"events": 7, "bytes": 7000}


async def test_a_start_with_classes_gives_only_those_up_to_the_head() -> None:
    class Sticky:
        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            subscriber.start = Start(Cursor(None, 0), frozenset({"required"}))

        @hookimpl
        def sse_register_delivery_classes(self, register: Any) -> None:
            register("text", "ephemeral", None)

    async with bus_with(Sticky()) as bus:
        for type in ("text", "text", "asked", "text"):
            await bus.publish(type)
        async with bus.subscribe() as events:
            got = [await anext(events) for _ in range(4)]
            await bus.publish("text")
            got.append(await anext(events))
        types = [delivery.event.type for delivery in got]
        assert types == ["server.heartbeat", "server.stream.lagged", "asked", "server.stream.lagged", "text"]
        assert [(d.event.properties or {}).get("dropped") for d in got[1::2]] == [2, 1]


@pytest.mark.parametrize("answer", ["drop-oldest", "object"])
async def test_a_policy_is_chosen_per_subscriber(answer: str) -> None:
    class Own:
        name = "own"

        def __call__(self, backlog: Backlog) -> Outcome:
            return Disconnect()

    class Chooses:
        @hookimpl
        def sse_overflow_policy(self, subscriber: Subscriber) -> Any:
            return (Own() if answer == "object" else answer) if subscriber.caller == "slow" else None

    async with bus_with(Chooses()) as bus:
        async with bus.subscribe(caller="slow"), bus.subscribe(caller="other"):
            policies = [subscriber["policy"] for subscriber in bus.statistics()["subscribers"]]
        assert policies == ["own" if answer == "object" else answer, "disconnect"]


async def test_lag_is_warned_of_once_and_again_after_it_was_down() -> None:
    warned: list[float] = []

    class Watcher:
        @hookimpl
        def sse_subscriber_lag_warning(self, subscriber: Subscriber, fraction: float) -> None:
            assert subscriber.caller == "slow"
            warned.append(fraction)

    async with bus_with(Watcher(), queue_max=100) as bus, bus.subscribe(caller="slow") as events:
        await anext(events)
        await bus.publish("a")
        await anext(events)
        for _ in range(90):
            await bus.publish("a")
            await settle()
        assert warned == [0.75]
        for _ in range(90):
            await anext(events)
        await bus.publish("a")
        await settle()
        await anext(events)
        for _ in range(80):
            await bus.publish("a")
            await settle()
        assert warned == [0.75, 0.75]


async def test_overflow_and_detach_are_told() -> None:
    told: list[str] = []

    class Watcher:
        @hookimpl
        def sse_subscriber_overflow(self, subscriber: Subscriber, outcome: Outcome) -> None:
            told.append(type(outcome).__name__)

        @hookimpl
        def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
            told.append(reason)

    clock = ManualClock()
    async with bus_with(Watcher(), queue_max=2, clock=clock) as bus:
        app = event_app(bus, authorize=None)
        await bus.publish("a")
        async with stream(app, "/event?after_seq=0") as response:
            await response.rest()
        async with stream(app, "/event") as response:
            await response.next()
        async with stream(app, "/event", window=0) as response:
            await response.next()
            for _ in range(5):
                await bus.publish("a")
                await settle()
            await response.rest()
        async with stream(app, "/event", window=0) as response:
            await response.until_blocked()
            await clock.advance(bus.settings.write_timeout + 5)
            await response.until_returned()
        async with stream(app, "/event") as response:
            await response.next()
            await bus.drain()
    assert told == ["complete", "client", "Disconnect", "overflow", "write-timeout", "drain"]


async def test_a_subscriber_that_left_says_where_it_was_and_under_which_epoch() -> None:
    left: list[tuple[str, Cursor | None]] = []

    class Watcher:
        @hookimpl
        def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
            left.append((reason, subscriber.position))

    async with bus_with(Watcher()) as bus:
        app = event_app(bus, authorize=None)
        for type in ("a", "b", "a"):
            await bus.publish(type)
        async with stream(app, "/event?after_seq=0") as response:
            await response.rest()
        async with stream(app, "/event?after_seq=0&follow=true") as response:
            await response.take(2)
            await response.until("a")
        async with stream(app, "/event") as response:
            await response.next()
            await bus.publish("a")
            await response.next()
        assert left == [
            ("complete", Cursor(bus.epoch, 3)),
            ("client", Cursor(bus.epoch, 3)),
            ("client", Cursor(bus.epoch, 4)),
        ]


@pytest.mark.parametrize("at", [None, 2])
async def test_a_snapshot_is_given_to_who_asks_and_to_who_lost_the_thread(at: int | None) -> None:
    class State:
        @hookimpl
        async def sse_snapshot(self, subscriber: Subscriber, head: int) -> Snapshot:
            await anyio.lowlevel.checkpoint()
            return Snapshot([Event("state", {"head": head})], at)

    async with bus_with(State()) as bus:
        app = event_app(bus, authorize=None)
        for n in range(1, 4):
            await bus.publish("a", {"n": n})
        for query in ("?snapshot=true", "?after_seq=9&follow=true"):
            async with stream(app, f"/event{query}") as response:
                first = await response.until("state")
                assert all(frame.id is None for frame in first)
                assert first[-1].properties == {"head": 3}
                closing = await response.next()
                position = 3 if at is None else at
                assert (closing.type, closing.id) == ("server.heartbeat", f"{bus.epoch}:{position}")
                if at is not None:
                    assert (await response.next()).properties == {"n": 3}
                await bus.publish("b")
                assert (await response.next()).type == "b"
                await bus.publish("a", {"n": 3})
            bus.store.begin_epoch(3)  # type: ignore[attr-defined]
