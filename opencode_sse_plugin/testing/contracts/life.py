"""Bounds, epochs, and a store's beginning and end."""

from __future__ import annotations

import pytest

from ...events import valid_epoch
from ...stores import Evicted, Measured, Readable, Retention
from ...stores.verifying import faults_of_open
from ..samples import RecordingListener, stored_event, stored_events
from .base import ALL, PLENTY, StoreContract, contents, span


class Life(StoreContract):
    """What ``open``, ``close`` and ``bounds`` promise."""

    async def test_an_empty_log_has_bounds(self) -> None:
        async with self.make_store(PLENTY) as store:
            opened = await store.open(RecordingListener())
            assert span(opened) == (1, 0)
            assert await store.bounds() == opened
            await store.close()

    async def test_appending_leaves_the_epoch_alone(self) -> None:
        async with self.opened(Retention(3, ALL)) as (store, _):
            before = await store.bounds()
            await store.append(stored_events(5))
            bounds = await store.bounds()
            assert bounds.epochs == before.epochs
            assert valid_epoch(bounds.epoch)
            assert bounds.end_of(bounds.epoch) == 5
            assert bounds.end_of(f"not-{bounds.epoch[:50]}") is None

    async def test_two_logs_have_different_epochs(self) -> None:
        async with self.opened() as (one, _), self.opened() as (other, _):
            assert (await one.bounds()).epoch != (await other.bounds()).epoch

    async def test_lost_history_begins_an_epoch(self) -> None:
        async with self.opened() as (store, told):
            events = stored_events(6)
            await store.append(events)
            await told.until(6, self.patience)
            old = (await store.bounds()).epoch
            await self.lose_history(store, 4)
            # A store may begin the epoch with the append that needs it.
            assert await store.append([stored_event(id=events[3].id)]) == ([4], 1)
            assert await store.append([stored_event(id=events[5].id)]) == ([5], 0), "what was lost is not known"
            await told.until_epoch(1, self.patience)
            await told.until(5, self.patience)
            assert told.seqs == [1, 2, 3, 4, 5, 6, 5]
            ((said, end),) = told.epochs
            assert end == 4
            bounds = await store.bounds()
            assert said.epochs == bounds.epochs
            assert bounds.epoch != old
            assert valid_epoch(bounds.epoch)
            assert [bounds.end_of(epoch) for epoch in (old, bounds.epoch, "other")] == [4, 5, None]
            assert [event.seq for event in (await self.page(store, 3)).events] == [4, 5]

    async def test_closing_twice_does_nothing(self) -> None:
        async with self.opened() as (store, _):
            await store.append(stored_events(1))
            await store.close()
            await store.close()

    async def test_it_says_what_it_is(self) -> None:
        retention = Retention(123, 45_678)
        async with self.opened(retention) as (store, _):
            assert store.kind
            assert store.retention == retention

    async def test_an_immediate_append_is_an_append(self) -> None:
        async with self.opened() as (store, told):
            append_now = getattr(store, "append_now", None)
            if append_now is None:
                pytest.skip("this store waits when it appends")
            events = stored_events(4)
            before = contents(events)
            await store.append(events[:1])
            assert append_now(events[1:3]) == ([2, 3], 0)
            assert append_now([stored_event(id=events[0].id), events[3]]) == ([1, 4], 1)
            assert told.seqs == [1, 2, 3, 4], "told before append_now returns"
            assert contents((await self.page(store, 0)).events) == before

    async def test_a_durable_log_outlives_its_store(self) -> None:
        if not self.durable:
            pytest.skip("this store promises nothing beyond its life")
        async with self.make_store(Retention(5, ALL)) as store:
            await store.open(RecordingListener())
            events = stored_events(8)
            stored = contents(events)
            await store.append(events)
            await self.prune(store)
            before = await store.bounds()
            await store.close()
            store, told = await self.reopen(store), RecordingListener()
            assert await store.open(told) == before
            try:
                assert await self.read(store, 2) == Evicted(4)
                assert contents((await self.page(store, 3)).events) == stored[3:]
                assert await store.append([stored_event(id=events[5].id), stored_event()]) == ([6, 9], 1)
                await told.until(9, self.patience)
                assert told.seqs == [9]
            finally:
                await store.close()

    async def test_the_chain_of_epochs_outlives_its_store(self) -> None:
        if not self.durable:
            pytest.skip("this store promises nothing beyond its life")
        async with self.make_store(PLENTY) as store:
            await store.open(RecordingListener())
            old = (await store.bounds()).epoch
            await store.append(stored_events(6))
            await self.lose_history(store, 4)
            await store.append(stored_events(2))
            before = await store.bounds()
            await store.close()
            store = await self.reopen(store)
            try:
                bounds = await store.open(RecordingListener())
                assert bounds.epochs == before.epochs
                assert [bounds.end_of(epoch) for epoch in (old, before.epoch)] == [4, 6]
            finally:
                await store.close()

    async def test_nothing_is_wrong_with_it(self) -> None:
        async with self.opened(Retention(700, ALL)) as (store, _):
            for _ in range(8):
                await store.append(stored_events(150))
            await self.prune(store)
            seen: list[tuple[int, int]] = []
            found = [fault async for fault in faults_of_open(store, lambda done, total: seen.append((done, total)))]
            assert found == [], "`opencode-sse store verify` complains"
            assert seen[-1] == (700, 700)

    async def test_it_knows_what_it_holds(self) -> None:
        async with self.opened(Retention(10, ALL)) as (store, _):
            if not isinstance(store, Measured):
                pytest.skip("this store does not say what it holds")
            await store.append(stored_events(12, size=100))
            await self.prune(store)
            assert {"events": 10, "bytes": 1000}.items() <= store.statistics().items()

    async def test_an_epoch_can_begin_though_nothing_is_lost(self) -> None:
        async with self.opened() as (store, told):
            events = stored_events(3)
            await store.append(events)
            await told.until(3, self.patience)
            old = (await store.bounds()).epoch
            await self.lose_history(store, 3)
            assert await store.append([stored_event(id=events[1].id), stored_event()]) == ([2, 4], 1)
            await told.until_epoch(1, self.patience)
            await told.until(4, self.patience)
            assert told.seqs == [1, 2, 3, 4]
            bounds = await store.bounds()
            assert [bounds.end_of(epoch) for epoch in (old, bounds.epoch)] == [3, 4]
            assert [end for _, end in told.epochs] == [3]

    async def test_a_log_can_be_read_as_it_lies(self) -> None:
        """Beside whoever has it open, and after: nothing changes by that."""
        async with self.make_store(PLENTY) as store:
            if not isinstance(store, Readable):
                pytest.skip("this store is opened to be read")
            await store.open(RecordingListener())
            events = stored_events(5)
            stored = contents(events)
            await store.append(events)
            looking = await self.another(store) if self.shared else None
            before = await store.bounds()
            if isinstance(looking, Readable):
                assert await looking.open_to_read() == before
                await store.append(stored_events(1))
                assert (await looking.bounds()).latest == 6
                await looking.close()
            await store.close()
            store = await self.reopen(store)
            assert isinstance(store, Readable)
            assert (await store.open_to_read()).epochs == before.epochs
            assert contents((await self.page(store, 0)).events)[:5] == stored
            await store.close()
