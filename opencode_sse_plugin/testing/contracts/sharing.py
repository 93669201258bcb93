"""Several stores upon one log: one sequence, told to everyone."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from ...stores import EventStore, Evicted, Retention
from ..samples import RecordingListener, stored_event, stored_events
from .base import ALL, StoreContract, contents, span


class Sharing(StoreContract):
    """What stores promise that are ``shared``."""

    async def test_stores_of_one_log_make_one_sequence(self) -> None:
        async with self.opened_twice() as (first, second):
            seqs: list[int] = []

            async def publish(store: EventStore) -> None:
                for size in (1, 3, 2, 5, 1, 4):
                    seqs.extend((await store.append(stored_events(size))).seqs)
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as group:
                for store, _ in (first, second, first, second):
                    group.start_soon(publish, store)
            assert sorted(seqs) == list(range(1, 65)), "a number is missing, or was given twice"
            for store, told in (first, second):
                await told.until(64, self.patience)
                assert told.seqs == list(range(1, 65)), "each is told all, its own included, once and in order"
                assert span(await store.bounds()) == (1, 64)
            assert contents(first[1].events) == contents(second[1].events)

    async def test_what_one_acknowledged_another_knows(self) -> None:
        async with self.opened_twice() as ((store, _), (other, told)):
            events = stored_events(3)
            before = contents(events)
            await store.append(events)
            assert span(await other.bounds()) == (1, 3)
            assert contents((await self.page(other, 0)).events) == before
            assert await other.append([stored_event(id=events[1].id), stored_event()]) == ([2, 4], 1)
            await told.until(4, self.patience)
            assert told.seqs == [1, 2, 3, 4]

    async def test_one_that_comes_later_begins_at_the_head(self) -> None:
        async with self.opened_twice() as ((store, _), (other, told)):
            await store.append(stored_events(3))
            await told.until(3, self.patience)
            third, third_told = await self.another(store), RecordingListener()
            try:
                assert await third.open(third_told) == await other.bounds()
                assert await other.append(stored_events(2)) == ([4, 5], 0)
                await third_told.until(5, self.patience)
                assert third_told.seqs == [4, 5]
            finally:
                await third.close()
            assert await other.append(stored_events(1)) == ([6], 0), "the others go on when one is closed"
            await told.until(6, self.patience)

    async def test_all_stores_are_told_of_a_new_epoch(self) -> None:
        async with self.opened_twice() as ((store, told), (other, other_told)):
            await store.append(stored_events(6))
            await other_told.until(6, self.patience)
            await self.lose_history(store, 4)
            assert await other.append(stored_events(3)) == ([5, 6, 7], 0)
            for listener in (told, other_told):
                await listener.until_epoch(1, self.patience)
                await listener.until(7, self.patience)
                assert listener.seqs == [1, 2, 3, 4, 5, 6, 5, 6, 7]
                ((said, end),) = listener.epochs
                assert end == 4
                assert said.epochs == (await other.bounds()).epochs

    async def test_one_that_retention_overtook_is_told(self) -> None:
        """One that could not read in time is told where it goes on, never a sequence with a silent hole."""
        async with self.opened_twice(Retention(5, ALL)) as ((store, _), (other, told)):
            told.waiting = 1  # As if its process could not keep up.
            for _ in range(20):
                await store.append(stored_events(3))
                await self.prune(store)
                await anyio.sleep(0.002)
            told.waiting = 0
            await other.append(stored_events(1))
            await told.until(61, self.patience)
            position = 0
            for seq in told.seqs:
                assert seq == position + 1 or seq in told.gaps, f"a silent hole between {position} and {seq}"
                position = seq
            await self.prune(other)  # Else it may come between the two.
            assert await self.read(other, 0) == Evicted((await other.bounds()).oldest)
