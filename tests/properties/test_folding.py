"""``coalesce`` is lossless: whoever folds the stream into state ends in the state of one that read everything, cut
after any frame and resumed, under any policies that lose nothing before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from random import Random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencode_sse_plugin import Event, EventBus, Limits, Settings
from opencode_sse_plugin.cli.demo import one_round, read_trace, shipped
from opencode_sse_plugin.frames import Delivery
from opencode_sse_plugin.plugins import Plugins
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
                subscription = next(iter(bus._subscriptions))
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


@pytest.mark.parametrize("limit", [10, 100, 1000])
def test_a_recorded_session_folds_to_the_same_state(limit: int) -> None:
    """Real traffic, cut again and again; and far fewer frames come."""
    events = [event for _, event in one_round(read_trace(shipped())) if event.scope == "instance"]
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
