"""The tests that every overflow policy must pass, as a class to inherit from::

    class TestKeepQuestions(OverflowPolicyContract):
        plugin = keep_questions          # what registers it; nothing for a policy that ships with the package
        policy = "keep-questions"        # as an operator writes it, parameters included

A policy that says it loses no information inherits from :class:`LosslessPolicyContract` instead. The tests run on every
event loop that ``anyio_backend`` names.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import anyio
import pytest

from ...bus import EventBus
from ...delivery import DeliveryClasses
from ...delivery_table import builtin_delivery_classes
from ...events import Event, StoredEvent
from ...frames import Delivery
from ...overflow import Backlog, Block, Disconnect, Lag, Limits, Merge, ReadFromStore, Skip
from ...plugins import Plugins
from ...settings import Settings
from ..folding import State, fold
from ..traffic import Traffic

OUTCOMES = Skip | Merge | Disconnect | ReadFromStore | Block


@pytest.mark.anyio
class OverflowPolicyContract:
    """What the wire contract asks of every policy; see this module's docstring."""

    plugin: ClassVar[object | None] = None
    policy: ClassVar[str]

    # Helpers.

    @asynccontextmanager
    async def bus(self, **settings: Any) -> AsyncIterator[EventBus]:
        """A running bus that knows the policy."""
        plugins = Plugins(discover=False)
        if self.plugin is not None:
            plugins.register(self.plugin)
        async with EventBus(Settings(**settings), plugins=plugins) as bus:
            yield bus

    def backlog(self, events: Sequence[Event], limits: Limits) -> Backlog:
        """What the policy is asked about these events."""
        classes = DeliveryClasses()
        builtin_delivery_classes(classes.register)
        stored = [StoredEvent.encode(replace(event, id=f"evt_{n}")) for n, event in enumerate(events)]
        lag = Lag(len(stored), sum(event.size for event in stored))
        return Backlog(stored, lag, limits, 0.0, classes.of, classes.key, classes.adds_up, classes.join)

    async def read(self, events: AsyncIterator[Delivery], until: int, cursor: str = "e:-1") -> list[Delivery]:
        """All that comes up to a sequence number, or to the end of the stream; nothing if ``cursor`` is there."""
        got: list[Delivery] = []
        if number(cursor) >= until:
            return got
        with anyio.fail_after(10):
            async for delivery in events:
                got.append(delivery)
                lost = (delivery.event.properties or {}).get("last", 0) if delivery.seq is None else 0
                if max(delivery.seq or 0, lost) >= until:
                    break
        return got

    # The decision.

    async def test_it_is_pure(self) -> None:
        async with self.bus() as bus:
            policy = bus.policies.create(self.policy)
            assert isinstance(policy.name, str)
            assert policy.name
            for seed in range(10):
                backlog = self.backlog(Traffic(Random(seed)).take(50), Limits(20, 4000))
                payloads = [event.payload for event in backlog.events]
                first, second = policy(backlog), policy(backlog)
                assert isinstance(first, OUTCOMES), f"{first!r} is not an outcome"
                assert type(first) is type(second)
                if isinstance(first, Skip):
                    assert first == second
                assert [event.payload for event in backlog.events] == payloads, "it changed what it was shown"

    async def test_what_it_leaves_is_at_most_half(self, caplog: pytest.LogCaptureFixture) -> None:
        """Else it would be asked for every event; the stream then disconnects instead, and the log says so."""
        async with self.bus() as bus:
            for limits in (Limits(1, 300), Limits(2, 10_000), Limits(20, 1500), Limits(50, 1_000_000)):
                async with bus.subscribe(limits=limits, overflow=self.policy) as events:
                    await anext(events)
                    for event in Traffic(Random(limits.events)).take(120):
                        await bus.publish(event)
                    await self.read(events, bus.head)
        failures = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert not [failure for failure in failures if "policy" in failure]

    # The account.

    async def test_who_keeps_up_gets_everything(self) -> None:
        async with self.bus() as bus, bus.subscribe(limits=Limits(4, 2000), overflow=self.policy) as events:
            await anext(events)
            for event in Traffic(Random(1)).take(100):
                seq = await bus.publish(event)
                assert (await anext(events)).seq == seq

    async def test_the_account_balances(self) -> None:
        async with self.bus() as bus:
            for seed in range(6):
                random = Random(seed)
                traffic = Traffic(random)
                async with bus.subscribe(limits=Limits(10, 5000), overflow=self.policy) as events:
                    await anext(events)
                    published = received = dropped = 0
                    for _ in range(8):
                        for event in traffic.take(random.randint(1, 40)):
                            await bus.publish(event)
                            published += 1
                        got = await self.read(events, bus.head)
                        received += sum(delivery.seq is not None for delivery in got)
                        told = [d.event.properties or {} for d in got if d.event.type == "server.stream.lagged"]
                        dropped += sum(properties["dropped"] for properties in told)
                        if got and got[-1].event.type == "server.stream.lagged" and told[-1]["action"] == "reconnect":
                            break
                    merged = bus.statistics()["subscribers"][0]["merged"]
                    assert received + dropped + merged == published

    async def test_a_single_event_is_never_too_much(self) -> None:
        async with self.bus() as bus, bus.subscribe(limits=Limits(1, 100), overflow=self.policy) as events:
            await anext(events)
            seq = await bus.publish("big", {"text": "x" * 1000})
            assert (await anext(events)).seq == seq

    async def test_numbers_grow_and_what_is_missing_was_told(self) -> None:
        """Over all resumes: received once, told as lost, or folded into something later."""
        async with self.bus() as bus:
            random = Random(7)
            traffic, cursor = Traffic(random), f"{bus.epoch}:0"
            numbers: list[int] = []
            while bus.head < 300:
                async with bus.subscribe(after=cursor, limits=Limits(8, 4000), overflow=self.policy) as events:
                    await anext(events)
                    for event in traffic.take(30):
                        await bus.publish(event)
                    for delivery in await self.read(events, bus.head):
                        cursor = delivery.cursor or cursor
                        numbers += [delivery.seq] if delivery.seq is not None else []
            assert numbers == sorted(set(numbers))


class LosslessPolicyContract(OverflowPolicyContract):
    """And of one that takes events away, but no information: who folds the stream into state sees no difference."""

    async def test_who_folds_the_stream_ends_in_the_same_state(self) -> None:
        """Cut after any frame, resumed, and slow again."""
        async with self.bus() as bus:
            for seed in range(20):
                random = Random(seed)
                traffic, truth, mine, cursor = Traffic(random), State(), State(), f"{bus.epoch}:{bus.head}"
                limits = random.choice([Limits(20, 4000), Limits(40, 20_000), Limits(60, 30_000)])
                for _ in range(6):
                    async with bus.subscribe(after=cursor, limits=limits, overflow=self.policy) as events:
                        got = [await anext(events), *await self.read(events, bus.head, cursor)]
                        batch = traffic.take(random.randint(1, 2 * limits.events))
                        for event in batch:
                            await bus.publish(event)
                        fold(batch, truth)
                        got += await self.read(events, bus.head)
                        kept = got[: random.randint(0, len(got))]
                        fold((d.event for d in kept if d.seq is not None), mine)
                        cursor = next((d.cursor for d in reversed(kept) if d.cursor is not None), cursor)
                while number(cursor) < bus.head:
                    async with bus.subscribe(after=cursor, overflow=self.policy) as events:
                        got = await self.read(events, bus.head)
                        fold((d.event for d in got if d.seq is not None), mine)
                        cursor = next((d.cursor for d in reversed(got) if d.cursor is not None), cursor)
                assert mine == truth


def number(cursor: str) -> int:
    """The sequence number in ``EPOCH:SEQ``."""
    return int(cursor.rpartition(":")[2])
