"""``coalesce`` is lossless: whoever folds the stream into state ends in the state of one that read everything, cut
after any frame and resumed, under any policies that lose nothing before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencode_sse_plugin import Backlog, Event, EventBus, Lag, Limits, Merge, Settings, StoredEvent
from opencode_sse_plugin.cli.demo import one_round, read_trace, shipped
from opencode_sse_plugin.delivery import DeliveryClasses
from opencode_sse_plugin.delivery_table import builtin_delivery_classes
from opencode_sse_plugin.frames import Delivery
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.policies import Coalesce
from opencode_sse_plugin.testing import State, Traffic, fold

LOSSLESS = ("coalesce", "coalesce", "coalesce", "catch-up", "disconnect", "block?timeout=1ms")


class Reader:
    """A client that folds what it gets, over many connections."""

    def __init__(self, bus: EventBus) -> None:
        self.bus = bus
        self.state = State()
        self.cursor = f"{bus.epoch}:0"
        self.frames = self.merged = 0

    async def read(self, policy: str, limits: Limits, publish: Sequence[Event], keep: float, switch: str = "") -> None:
        """One connection: falls behind while these are published, reads, and is cut after a part of the frames."""
        bus = self.bus
        got: list[Delivery] = []
        async with bus.subscribe(after=self.cursor, limits=limits, overflow=policy) as events:
            got.append(await anext(events))
            await self._until(bus.head, events, got)
            for event in publish[: len(publish) // 2]:
                await bus.publish(event)
            if switch:
                subscription = next(iter(bus._roster.subscriptions))
                bus.set_overflow_policy(subscription.subscriber, switch)
            for event in publish[len(publish) // 2 :]:
                await bus.publish(event)
            await self._until(bus.head, events, got)
            self.merged += bus.statistics()["subscribers"][0]["merged"]
        for delivery in got[: round(len(got) * keep)]:
            self.cursor = delivery.cursor or self.cursor
            if delivery.seq is not None:
                self.state.apply(delivery.event)
                self.frames += 1

    async def _until(self, head: int, events: AsyncIterator[Delivery], got: list[Delivery]) -> None:
        with anyio.fail_after(10):
            while (got[-1].seq or _number(got[-1])) < head:
                try:
                    got.append(await anext(events))
                except StopAsyncIteration:
                    break

    async def read_the_rest(self) -> None:
        while _of(self.cursor) < self.bus.head:
            await self.read("disconnect", Limits(1000, 1 << 23), (), 1.0)


def _of(cursor: str) -> int:
    return int(cursor.rpartition(":")[2])


def _number(delivery: Delivery) -> int:
    return _of(delivery.cursor) if delivery.cursor is not None else 0


step = st.tuples(
    st.sampled_from(LOSSLESS),
    st.sampled_from(("", "", *LOSSLESS)),
    st.integers(0, 120),
    st.sampled_from([Limits(1, 400), Limits(4, 2000), Limits(20, 1 << 20), Limits(50, 20_000)]),
    st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), sessions=st.integers(1, 4), steps=st.lists(step, min_size=1, max_size=6))
def test_folding_what_was_coalesced_gives_the_same_state(
    seed: int, sessions: int, steps: list[tuple[str, str, int, Limits, float]]
) -> None:
    async def run() -> None:
        traffic, truth = Traffic(Random(seed), sessions), State()
        async with EventBus(Settings(), plugins=Plugins(discover=False)) as bus:
            reader = Reader(bus)
            for policy, switch, count, limits, keep in steps:
                events = traffic.take(count)
                fold(events, truth)
                await reader.read(policy, limits, events, keep, switch)
            await reader.read_the_rest()
        assert reader.state == truth

    anyio.run(run)


def recorded(path: Path) -> list[Event]:
    return [event for _, event in one_round(read_trace(path)) if event.scope == "instance"]


#: 40 seconds of `/event` of opencode 1.18.33: parallel sessions, reasoning, tools, a failure; without control frames.
CAPTURE = Path(__file__).parents[1] / "data/event.jsonl.xz"


@pytest.mark.parametrize("trace", [shipped(), CAPTURE], ids=["shipped", "captured"])
@pytest.mark.parametrize("limit", [10, 100, 1000])
def test_a_recorded_session_folds_to_the_same_state(trace: Path, limit: int) -> None:
    """Real traffic, cut again and again; and far fewer frames come."""
    events = recorded(trace)
    random = Random(limit)

    async def run() -> None:
        truth = State()
        async with EventBus(Settings(), plugins=Plugins(discover=False)) as bus:
            reader = Reader(bus)
            at = 0
            while at < len(events):
                batch = events[at : at + random.randint(1, 3 * limit)]
                at += len(batch)
                fold(batch, truth)
                await reader.read("coalesce", Limits(limit, 1 << 23), batch, random.random() if limit < 1000 else 1.0)
            await reader.read_the_rest()
        assert reader.state == truth
        assert truth.parts
        if limit == 1000:
            assert reader.merged
            assert reader.frames < len(events) / 2

    anyio.run(run)


@pytest.mark.parametrize("size", [100, 1000, 6253])
def test_a_captured_backlog_comes_down_to_less_than_a_quarter(size: int) -> None:
    """And whoever reads what is left ends in the same state."""
    events = recorded(CAPTURE)
    classes = DeliveryClasses()
    builtin_delivery_classes(classes.register)
    whole, folded, left = State(), State(), 0
    for first in range(0, len(events), size):
        stored = [StoredEvent.encode(event) for event in events[first : first + size]]
        lag = Lag(len(stored), sum(event.size for event in stored))
        limits = Limits(2 * lag.events, 2 * lag.bytes)
        outcome = Coalesce()(Backlog(stored, lag, limits, 0.0, classes.of, classes.key, classes.adds_up, classes.join))
        assert isinstance(outcome, Merge)
        assert not outcome.skip.ranges
        rest = [outcome.replace.get(n, event) for n, event in enumerate(stored) if n not in outcome.remove]
        fold((event.event for event in stored), whole)
        fold((event.event for event in rest), folded)
        left += len(rest)
        assert folded == whole
    assert left < len(events) / 4
