"""The overflow policies that ship with the package."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import anyio
import pytest

from opencode_sse_plugin import (
    Backlog,
    ConfigurationError,
    Disconnect,
    EventBus,
    Lag,
    Limits,
    Merge,
    Outcome,
    Settings,
    Skip,
    Subscriber,
    hookimpl,
)
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.policies import seconds
from opencode_sse_plugin.testing import LosslessPolicyContract, OverflowPolicyContract, Traffic


class TestDisconnect(LosslessPolicyContract):
    policy = "disconnect"


class TestDropOldest(OverflowPolicyContract):
    policy = "drop-oldest"


class TestDropNewest(OverflowPolicyContract):
    policy = "drop-newest"


class TestCoalesce(LosslessPolicyContract):
    policy = "coalesce"


class TestShed(OverflowPolicyContract):
    policy = "shed"

    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            (Limits(4, 1 << 20), {"Disconnect"}),
            (Limits(30, 1 << 20), {"Disconnect", "Merge", "Skip"}),
            (Limits(90, 1 << 20), {"Skip"}),
        ],
    )
    async def test_nothing_that_is_required_goes(self, limits: Limits, expected: set[str]) -> None:
        async with self.bus() as bus:
            policy = bus.policies.create(self.policy)
        outcomes: set[str] = set()
        for seed in range(100):
            backlog = self.backlog(Traffic(Random(seed)).take(100), limits)
            outcome = policy(backlog)
            outcomes.add(type(outcome).__name__)
            if isinstance(outcome, Disconnect):
                continue
            merge = Merge(skip=outcome) if isinstance(outcome, Skip) else outcome
            assert isinstance(merge, Merge)
            skipped = {n for start, stop in merge.skip.ranges for n in range(start, stop)}
            assert {backlog.delivery_class(backlog.events[n]) for n in skipped} == {"ephemeral"}
            assert {backlog.delivery_class(backlog.events[n]) for n in merge.remove} <= {"latest"}
        assert outcomes == expected


class TestCatchUp(LosslessPolicyContract):
    policy = "catch-up"


class TestBlock(LosslessPolicyContract):
    policy = "block?timeout=5ms"


class BeyondTheLimits:
    """A policy that leaves everything as it is, and so would be asked again for every event."""

    name = "nothing"

    def __call__(self, backlog: Backlog) -> Outcome:
        return Skip(())


class Registering:
    @hookimpl
    def sse_register_overflow_policies(self, register: Callable[[str, Any], None]) -> None:
        register("nothing", BeyondTheLimits)


def bus_with(*plugins: object, **settings: Any) -> EventBus:
    found = Plugins(discover=False)
    for plugin in plugins:
        found.register(plugin)
    return EventBus(Settings(**settings), plugins=found)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("drop", "unknown overflow policy 'drop'; there are block, catch-up, coalesce, disconnect"),
        ("", "unknown overflow policy ''"),
        ("shed?really=yes", "no parameter 'really'; it takes none"),
        ("block?time=2s", "no parameter 'time'; there are timeout, then"),
        ("block?timeout=soon", "'soon' is not a duration such as 2s or 500ms"),
        ("block?timeout=0", "'0' is not a duration"),
        ("block?timeout", "bad query field"),
        ("block?then=block", "then='block' would ask itself"),
        ("coalesce?then=coalesce?then=shed", "would ask itself"),
        ("block?then=wait", "unknown overflow policy 'wait'"),
    ],
)
def test_a_name_that_says_nothing_is_refused_when_the_bus_is_made(spec: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        bus_with(overflow=spec)


@pytest.mark.parametrize("setting", ["queue_max", "queue_max_bytes"])
def test_limits_of_zero_are_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting} must be at least 1, not 0"):
        Settings(**{setting: 0})


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"limits": Limits(0, 1000)},
            "cannot be Limits(events=0, bytes=1000); it takes Limits of at least one event and one byte",
        ),
        ({"limits": Limits(10, 0)}, "subscriber.limits cannot be"),
        ({"limits": (10, 1000)}, "subscriber.limits cannot be (10, 1000)"),
        ({"overflow": "drop"}, "unknown overflow policy 'drop'; there are block"),
        ({"overflow": "shed?keep=1"}, "no parameter 'keep'; it takes none"),
        ({"overflow": BeyondTheLimits}, "is not an overflow policy: a callable with a name, or one of block"),
        ({"overflow": 5}, "5 is not an overflow policy"),
    ],
)
async def test_a_subscriber_of_the_hosts_own_is_refused_too(options: dict[str, Any], said: str) -> None:
    async with bus_with() as bus:
        with pytest.raises(ConfigurationError, match=re.escape(said)):
            async with bus.subscribe(**options):
                pytest.fail("it was let in")
        assert bus.statistics()["subscribers"] == []


@pytest.mark.parametrize(("text", "value"), [("2s", 2.0), ("500ms", 0.5), ("1.5", 1.5), ("1m", 60.0)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.anyio
async def test_an_outcome_that_leaves_too_much_disconnects(caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Registering(), overflow="nothing") as bus:
        async with bus.subscribe(limits=Limits(2, 1000)) as events:
            await anext(events)
            for _ in range(5):
                await bus.publish("a")
            lagged = (await anext(events)).event
            assert (lagged.properties or {})["action"] == "reconnect"
            assert (lagged.properties or {})["dropped"] == 5
        assert "overflow policy nothing failed, the subscriber is disconnected" in caplog.text
        assert "leaves a lag of 5 events" in caplog.text
        caplog.clear()


@pytest.mark.anyio
async def test_shed_keeps_what_is_required_and_tells_the_rest() -> None:
    async with bus_with() as bus, bus.subscribe(limits=Limits(10, 1 << 20), overflow="shed") as events:
        await anext(events)
        for number in range(20):
            await bus.publish("message.part.delta", {"partID": "prt_1", "field": "text", "delta": "x"})
            if number % 5 == 0:
                await bus.publish("permission.asked", {"id": f"per_{number}", "sessionID": "ses_1"})
        asked: list[str] = []
        dropped = 0
        while len(asked) < 4:
            event = (await anext(events)).event
            properties = event.properties or {}
            if event.type == "server.stream.lagged":
                dropped += properties["dropped"]
                assert set(properties["byType"]) == {"message.part.delta"}
            elif event.type == "permission.asked":
                asked.append(properties["id"])
        assert asked == ["per_0", "per_5", "per_10", "per_15"]
        assert dropped > 0


@pytest.mark.anyio
async def test_shed_disconnects_rather_than_lose_what_is_required() -> None:
    async with bus_with() as bus, bus.subscribe(limits=Limits(4, 1 << 20), overflow="shed") as events:
        await anext(events)
        for number in range(10):
            await bus.publish("permission.asked", {"id": f"per_{number}", "sessionID": "ses_1"})
        lagged = (await anext(events)).event
        assert (lagged.properties or {})["action"] == "reconnect"


@pytest.mark.anyio
async def test_a_policy_is_changed_for_a_live_subscriber_and_told_first() -> None:
    known: list[Subscriber] = []

    class Watcher:
        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            known.append(subscriber)

    async with bus_with(Watcher()) as bus, bus.subscribe(limits=Limits(4, 1 << 20), overflow="drop-oldest") as events:
        await anext(events)
        for _ in range(10):
            await bus.publish("a")
        first = await anext(events)
        assert (first.event.properties or {})["policy"] == "drop-oldest"
        bus.set_overflow_policy(known[0], "drop-newest")
        assert bus.statistics()["subscribers"][0]["policy"] == "drop-newest"
        for _ in range(10):
            await bus.publish("a")
        with pytest.raises(ConfigurationError, match="unknown overflow policy"):
            bus.set_overflow_policy(known[0], "drop")
        with pytest.raises(ConfigurationError, match="5 is not an overflow policy"):
            bus.set_overflow_policy(known[0], 5)  # type: ignore[arg-type]
        assert bus.statistics()["subscribers"][0]["policy"] == "drop-newest"
        event = (await anext(events)).event
        while event.type == "a":
            event = (await anext(events)).event
        assert (event.properties or {})["policy"] == "drop-newest"
    with pytest.raises(LookupError, match="is not attached"):
        bus.set_overflow_policy(known[0], "shed")


@pytest.mark.anyio
async def test_what_the_old_policy_decided_is_told_for_itself_before_what_the_new_one_does() -> None:
    known: list[Subscriber] = []

    class Watcher:
        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            known.append(subscriber)

    async with bus_with(Watcher()) as bus, bus.subscribe(limits=Limits(4, 1 << 20), overflow="drop-newest") as events:
        await anext(events)
        for _ in range(10):
            await bus.publish("a")
        # The policy has acted, and kept the oldest two; what it lost comes after them.
        assert (await anext(events)).seq == 1
        bus.set_overflow_policy(known[0], "drop-oldest")
        for _ in range(10):
            await bus.publish("b")
        got = [await anext(events) for _ in range(5)]
        assert [delivery.seq for delivery in got] == [2, None, None, 19, 20]
        told = [got[1].event.properties or {}, got[2].event.properties or {}]
        assert [(one["policy"], one["first"], one["last"], one["dropped"], one["byType"]) for one in told] == [
            ("drop-newest", 3, 10, 8, {"a": 8}),
            ("drop-oldest", 11, 18, 8, {"b": 8}),
        ]
        assert [one["lastCursor"] for one in told] == [f"{bus.epoch}:2", f"{bus.epoch}:10"]


@pytest.mark.anyio
async def test_block_lets_every_publisher_wait_in_order_and_no_limit_is_exceeded() -> None:
    """100 publishers, 50 stalled readers: each publish waits until its own deadline at most."""
    timeout = 1.0
    async with bus_with() as bus, AsyncExitStack() as stack:
        limits = Limits(10, 1 << 20)
        policy = f"block?timeout={timeout}&then=drop-oldest"
        for _ in range(50):
            stalled = await stack.enter_async_context(bus.subscribe(limits=limits, overflow=policy))
            await anext(stalled)
        reading = await stack.enter_async_context(bus.subscribe(limits=limits, overflow=policy))
        await anext(reading)
        order: list[int] = []
        took: list[float] = []
        highest = 0

        async def publish(number: int) -> None:
            begun = anyio.current_time()
            seq = await bus.publish("a", {"number": number})
            took.append(anyio.current_time() - begun)
            assert seq is not None
            order.append(seq)

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(publish, number)
            seen: list[int] = []
            while len(seen) < 100:
                seen.append((await anext(reading)).seq or 0)
                lags = [one["lag"]["events"] for one in bus.statistics()["subscribers"]]
                highest = max(highest, lags[-1])
                if max(took, default=0.0) < timeout:
                    assert max(lags) <= limits.events
        assert seen == list(range(1, 101))
        assert sorted(order) == seen
        assert highest <= limits.events
        assert max(took) < 20 * timeout, "a publish waited for more than its one deadline"
        assert max(took) >= timeout, "nobody waited"


@pytest.mark.anyio
async def test_block_never_lets_a_limit_be_exceeded_while_everybody_is_in_time() -> None:
    """100 publishers, 50 readers that stall and read a little by turns: looked at after every single append."""
    highest = Lag(0, 0)

    class Watcher:
        @hookimpl
        def sse_event_published(self, seq: int) -> None:
            nonlocal highest
            for subscriber in bus.statistics()["subscribers"]:
                lag = subscriber["lag"]
                highest = Lag(max(highest.events, lag["events"]), max(highest.bytes, lag["bytes"]))

    limits = Limits(10, 3000)
    bus = bus_with(Watcher(), overflow="block?timeout=1m")
    async with bus, AsyncExitStack() as stack:
        random = Random(1)
        readers = [await stack.enter_async_context(bus.subscribe(limits=limits)) for _ in range(50)]
        for reader in readers:
            await anext(reader)
        published: list[int | None] = []

        async def publish(number: int) -> None:
            for size in (random.randint(1, 900), random.randint(1, 100)):
                published.append(await bus.publish("a", {"number": number, "pad": "x" * size}))

        got: list[list[int | None]] = [[] for _ in readers]
        with anyio.fail_after(50):
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(publish, number)
                while min(map(len, got)) < 200:
                    turn = random.randrange(50)
                    while len(got[turn]) == 200:
                        turn = (turn + 1) % 50
                    for _ in range(min(random.randint(1, 12), 200 - len(got[turn]))):
                        # It asks for one that need not be there yet, and the others get their turn.
                        with anyio.move_on_after(0 if len(published) < 200 else 5):
                            got[turn].append((await anext(readers[turn])).seq)
    assert got == [list(range(1, 201))] * 50
    assert sorted(seq or 0 for seq in published) == list(range(1, 201))
    assert limits.allow(highest), f"{highest} is more than {limits}"
    assert highest.events > 5, "it was not tried"


@pytest.mark.anyio
async def test_block_ends_at_once_when_the_bus_drains() -> None:
    async with bus_with() as bus:
        async with bus.subscribe(limits=Limits(1, 1000), overflow="block?timeout=1m") as events:
            await anext(events)
            await bus.publish("a")
            bus.publish_nowait("b")
            with anyio.fail_after(30):
                await bus.drain()
        assert bus.head == 2
