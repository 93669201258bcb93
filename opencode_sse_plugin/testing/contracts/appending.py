"""Numbers, whole batches, known events, and what the listener is told."""

from __future__ import annotations

from random import Random

import anyio
import anyio.lowlevel
import pytest

from ...stores import Awaited, Retention, Submission
from ..samples import RecordingListener, stored_event, stored_events
from .base import ALL, PLENTY, StoreContract, contents


class Appending(StoreContract):
    """What ``append`` promises."""

    async def test_numbers_begin_at_one_and_have_no_holes(self) -> None:
        async with self.opened() as (store, _):
            events = stored_events(10)
            assert (await store.append(events[:1])).seqs == [1]
            assert (await store.append(events[1:4])).seqs == [2, 3, 4]
            assert (await store.append([])).seqs == []
            assert await store.append(events[4:]) == ([5, 6, 7, 8, 9, 10], 0)
            assert [event.seq for event in events] == list(range(1, 11)), "append gives each event its number"
            assert (await store.bounds()).latest == 10

    async def test_concurrent_appends_leave_no_holes(self) -> None:
        async with self.opened() as (store, told):
            seqs: list[int] = []

            async def publish(seed: int) -> None:
                random = Random(seed)
                for _ in range(15):
                    events = stored_events(random.randint(1, 5))
                    appended = await store.append(events)
                    assert appended.seqs == sorted(appended.seqs), "a batch keeps its order"
                    assert [event.seq for event in events] == appended.seqs
                    seqs.extend(appended.seqs)
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as group:
                for seed in range(8):
                    group.start_soon(publish, seed)
            assert sorted(seqs) == list(range(1, len(seqs) + 1))
            await told.until(len(seqs), self.patience)
            assert told.seqs == list(range(1, len(seqs) + 1))

    async def test_batches_are_stored_whole_or_not_at_all(self) -> None:
        """Whoever looks never sees a part of one, and a publisher that is cancelled leaves none."""
        async with self.opened() as (store, told):
            finished = False

            async def look() -> None:
                while not finished:
                    assert (await store.bounds()).latest % 7 == 0, "a part of a batch can be seen"
                    await anyio.lowlevel.checkpoint()

            async def publish() -> None:
                for turn in range(30):
                    with anyio.CancelScope() as scope:
                        async with anyio.create_task_group() as group:
                            group.start_soon(store.append, stored_events(7))
                            for _ in range(turn % 4):
                                await anyio.lowlevel.checkpoint()
                            if turn % 2:
                                scope.cancel()

            async with anyio.create_task_group() as group:
                group.start_soon(look)
                await publish()
                finished = True
            (last,) = (await store.append(stored_events(1))).seqs
            assert last % 7 == 1, "a part of a batch was stored"
            assert last > 15 * 7, "batches that nobody cancelled are missing"
            await told.until(last, self.patience)
            assert told.seqs == list(range(1, last + 1))

    async def test_the_listener_is_told_everything_once_and_in_order(self) -> None:
        async with self.opened() as (store, told):
            events = stored_events(9)
            before = contents(events)
            await store.append(events[:1])
            await store.append(events[1:5])
            await store.append([events[0], *events[5:7], events[6]])
            await store.append(events[4:5])
            await store.append(events[7:])
            await told.until(9, self.patience)
            assert told.seqs == list(range(1, 10))
            assert contents(told.events) == before
            assert told.epochs == []

    async def test_what_was_there_before_is_not_told(self) -> None:
        async with self.make_store(PLENTY) as store:
            before = await store.open(RecordingListener())
            await store.append(stored_events(3))
            await store.close()
            store, told = await self.reopen(store), RecordingListener()
            bounds = await store.open(told)
            try:
                assert bounds == await store.bounds()
                assert bounds.latest == 3 or bounds.epoch != before.epoch, "history was lost without a new epoch"
                await store.append(stored_events(2))
                await told.until(bounds.latest + 2, self.patience)
                assert told.seqs == [bounds.latest + 1, bounds.latest + 2]
            finally:
                await store.close()

    async def test_submissions_are_stored_in_call_order_and_told_before_they_are_settled(self) -> None:
        async with self.opened() as (store, told):
            submit = getattr(store, "submit", None)
            if submit is None:
                pytest.skip("this store does not group by itself")
            known = stored_event()
            await store.append([known])
            batches = [stored_events(1), stored_events(3), [known], stored_events(2)]
            settled: list[tuple[Submission, int]] = []
            all_settled = anyio.Event()

            class Noted(Submission):
                def settle(self) -> None:
                    settled.append((self, len(told.seqs)))
                    if len(settled) == len(batches):
                        all_settled.set()

            submissions = [Noted(batch) for batch in batches]
            for submission in submissions:
                submit(submission)
            with anyio.fail_after(self.patience):
                await all_settled.wait()
            assert [one for one, _ in settled] == submissions, "settled once each, in call order"
            assert [one.error for one in submissions] == [None] * 4
            assert [one.appended for one in submissions] == [([2], 0), ([3, 4, 5], 0), ([1], 1), ([6, 7], 0)]
            assert [event.seq for one in submissions for event in one.events] == [2, 3, 4, 5, 1, 6, 7]
            for one, heard in settled:
                assert one.appended is not None
                assert heard >= max(one.appended.seqs), "settled before the listener was told"
            await told.until(7, self.patience)
            assert told.seqs == list(range(1, 8))

    async def test_many_submissions_are_stored_in_call_order_whatever_their_size(self) -> None:
        async with self.opened() as (store, told):
            submit = getattr(store, "submit", None)
            if submit is None:
                pytest.skip("this store does not group by itself")
            submissions = [Awaited([stored_event(size=100_000 if n < 40 else 100)]) for n in range(200)]
            for submission in submissions:
                submit(submission)
            with anyio.fail_after(self.patience):
                outcomes = [await submission.outcome() for submission in submissions]
            assert outcomes == [([seq], 0) for seq in range(1, 201)], "not in call order"
            await told.until(200, self.patience)
            assert [event.id for event in told.events] == [one.events[0].id for one in submissions]

    async def test_a_known_event_answers_its_number(self) -> None:
        async with self.opened() as (store, told):
            first = stored_events(3)
            await store.append(first)
            again = [stored_event(id=event.id) for event in first]
            assert await store.append(again[1:2]) == ([2], 1)
            assert await store.append([again[2], stored_event(), again[0]]) == ([3, 4, 1], 2)
            assert await store.append(again) == ([1, 2, 3], 3)
            await store.append(stored_events(1))
            await told.until(5, self.patience)
            assert told.seqs == [1, 2, 3, 4, 5]
            assert [event.seq for event in (await self.page(store, 0)).events] == [1, 2, 3, 4, 5]

    async def test_a_known_id_of_another_type_is_new(self) -> None:
        async with self.opened() as (store, _):
            event = stored_event(type="session.idle")
            twin = stored_event(id=event.id, type="sync")
            assert await store.append([event, twin]) == ([1, 2], 0)
            assert await store.append([stored_event(id=event.id, type="sync")]) == ([2], 1)

    async def test_an_event_twice_in_one_batch_is_stored_once(self) -> None:
        async with self.opened() as (store, told):
            a, b = stored_events(2)
            batch = [a, stored_event(id=a.id), b, stored_event(id=a.id), stored_event(id=b.id)]
            assert await store.append(batch) == ([1, 1, 2, 1, 2], 3)
            await told.until(2, self.patience)
            assert told.seqs == [1, 2]
            assert (await store.bounds()).latest == 2

    async def test_an_evicted_event_is_forgotten(self) -> None:
        async with self.opened(Retention(3, ALL)) as (store, _):
            events = stored_events(4)
            await store.append(events)
            await self.prune(store)
            assert await store.append([stored_event(id=events[1].id)]) == ([2], 1)
            assert await store.append([stored_event(id=events[0].id)]) == ([5], 0)
            assert await store.append([stored_event(id=events[0].id)]) == ([5], 1)

    async def test_only_the_newest_events_are_known(self) -> None:
        async with self.opened() as (store, _):
            most, batch = self.known_max, 1000
            first, second = stored_events(2)
            await store.append([first, second])
            for start in range(0, most - 1, batch):
                await store.append(stored_events(min(batch, most - 1 - start)))
            assert await store.append([stored_event(id=second.id)]) == ([2], 1)
            assert await store.append([stored_event(id=first.id)]) == ([most + 2], 0)
            assert await store.append([stored_event(id=first.id)]) == ([most + 2], 1)
