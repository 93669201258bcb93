"""Pages, retention, and what is said of that which is gone."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from ...events import Event
from ...stores import Evicted, Page, Retention
from ..samples import stored_event, stored_events
from .base import ALL, StoreContract, contents, span


class Reading(StoreContract):
    """What ``read`` promises, and what is kept to be read."""

    async def test_events_come_back_as_they_were(self) -> None:
        events = [stored_event(event) for event in awkward_events()]
        before = contents(events)
        async with self.opened() as (store, told):
            await store.append(events)
            assert contents((await self.page(store, 0)).events) == before
            await told.until(len(events), self.patience)
            assert contents(told.events) == before

    async def test_an_event_of_one_mebibyte_comes_back(self) -> None:
        async with self.opened() as (store, _):
            events = stored_events(3, size=1 << 20)
            before = contents(events)
            await store.append(events)
            came_back = contents((await self.page(store, 1)).events) == before[1:]
            assert came_back, "large events were changed"  # Where it fails, pytest compares megabytes for minutes.

    async def test_pages_hold_as_many_events_as_asked_for(self) -> None:
        async with self.opened() as (store, _):
            await store.append(stored_events(10))
            for limit, expected in ((1, [1] * 10), (3, [3, 3, 3, 1]), (10, [10]), (11, [10])):
                after, sizes = 0, []
                while after < 10:
                    page = await self.page(store, after, limit)
                    assert page.events, f"nothing after {after} although something follows"
                    sizes.append(len(page.events))
                    after = page.last
                assert sizes == expected

    async def test_pages_end_at_max_bytes_but_hold_one_event(self) -> None:
        async with self.opened() as (store, _):
            sizes = [200, 200, 900, 200, 200, 200, 200]
            await store.append([stored_event(size=size) for size in sizes])
            for max_bytes in (1, 200, 399, 400, 600, 5000):
                after = 0
                while after < len(sizes):
                    page = await self.page(store, after, max_bytes=max_bytes)
                    assert page.events, f"nothing after {after} although something follows"
                    after = page.last
                    total = sum(event.size for event in page.events)
                    assert total <= max_bytes or len(page.events) == 1, (
                        f"{total} bytes where {max_bytes} were asked for"
                    )

    async def test_a_page_begins_anywhere(self) -> None:
        """However long the log is; some systems look for a position from the beginning, and give up."""
        async with self.opened() as (store, _):
            total = 10_500
            for _ in range(total // 100):
                await store.append(stored_events(100))
            for after in (0, 1, 99, 100, 999, 5000, 10_001, total - 3, total - 1):
                page = await self.page(store, after, limit=7)
                assert page.last == min(after + 7, total)

    async def test_many_read_at_their_own_pace_while_others_append(self) -> None:
        """A page is all that a reader has: whatever happens between two of them, nothing is missing or comes twice."""
        async with self.opened() as (store, told):
            await store.append(stored_events(300))
            finished = False

            async def replay(limit: int) -> None:
                seqs: list[int] = []
                while True:
                    last = finished
                    page = await self.page(store, len(seqs), limit)
                    seqs += [event.seq for event in page.events]
                    if last and not page.events:
                        break
                    await anyio.lowlevel.checkpoint()
                assert seqs == list(range(1, 601))

            async with anyio.create_task_group() as group:
                for limit in (7, 50, 100, 1000):
                    group.start_soon(replay, limit)
                for _ in range(100):
                    await store.append(stored_events(3))
                finished = True
            await told.until(600, self.patience)
            assert told.seqs == list(range(1, 601))

    async def test_reading_at_the_head_gives_nothing(self) -> None:
        async with self.opened() as (store, _):
            assert await self.page(store, 0) == ([], 0)
            await store.append(stored_events(3))
            assert await self.page(store, 3) == ([], 3)
            assert await self.page(store, 7) == ([], 7), "a position that this log has not reached yet"

    async def test_the_newest_events_are_kept_and_no_more(self) -> None:
        async with self.opened(Retention(5, ALL)) as (store, _):
            await store.append(stored_events(5))
            await self.prune(store)
            assert span(await store.bounds()) == (1, 5)
            for seq in range(6, 20):
                await store.append(stored_events(1))
                await self.prune(store)
                assert span(await store.bounds()) == (seq - 4, seq)
            await store.append(stored_events(12))
            await self.prune(store)
            assert span(await store.bounds()) == (27, 31)

    async def test_no_more_bytes_are_kept_than_asked_for(self) -> None:
        async with self.opened(Retention(1000, 1000)) as (store, _):
            await store.append(stored_events(5, size=200))
            await self.prune(store)
            assert span(await store.bounds()) == (1, 5), "exactly what fits is kept"
            await store.append(stored_events(1, size=201))
            await self.prune(store)
            assert span(await store.bounds()) == (3, 6)

    async def test_the_newest_event_is_kept_whatever_its_size(self) -> None:
        async with self.opened(Retention(1000, 300)) as (store, _):
            await store.append(stored_events(3, size=100))
            await store.append(stored_events(1, size=5000))
            await self.prune(store)
            assert span(await store.bounds()) == (4, 4)
            assert (await self.page(store, 3)).last == 4

    async def test_events_that_are_too_old_go(self) -> None:
        if not self.retains_age:
            pytest.skip("this store does not look at age")
        async with self.opened(Retention(1000, ALL, age=0.5)) as (store, _):
            first, second = stored_events(2)
            await store.append([first])
            await self.pass_time(0.3)
            await store.append([second])
            await self.prune(store)
            assert span(await store.bounds()) == (1, 2)
            await self.pass_time(0.3)
            await self.prune(store)
            assert span(await store.bounds()) == (2, 2)
            await self.pass_time(0.6)
            await self.prune(store)
            assert span(await store.bounds()) == (3, 2), "a log whose events are all gone keeps its number"
            assert await self.read(store, 1) == Evicted(3)
            assert await self.page(store, 2) == ([], 2)
            assert await store.append([second]) == ([3], 0)

    async def test_evicted_is_said_exactly_where_something_is_missing(self) -> None:
        async with self.opened(Retention(4, ALL)) as (store, _):
            await store.append(stored_events(10))
            await self.prune(store)
            assert [await self.read(store, after) for after in range(6)] == [Evicted(7)] * 6
            for after in (6, 7, 8, 9, 10):
                page = await self.page(store, after)
                assert [event.seq for event in page.events] == list(range(after + 1, 11))

    async def test_a_reader_overtaken_by_retention_is_told(self) -> None:
        """Reading while events are stored and evicted: each page is whole, or said to be evicted."""
        async with self.opened(Retention(20, ALL)) as (store, _):
            after = evictions = 0
            got: Page | Evicted
            for _turn in range(100):
                async with anyio.create_task_group() as group:
                    group.start_soon(store.append, stored_events(7))
                    got = await self.read(store, after, 3)
                if isinstance(got, Evicted):
                    assert got.oldest > after + 1, "evicted, although what follows is the oldest"
                    evictions += 1
                    after = got.oldest - 1
                else:
                    after = got.last
            assert evictions, "a reader of 3 where 7 are stored and 20 are kept is overtaken"


def awkward_events() -> list[Event]:
    """What publishers may send, and stores have been seen to mangle."""
    text = 'lone \ud800 surrogate, nul \x00, line \u2028 end, \U0001f600, \r\n, quote " and \\'
    return [
        Event("test.plain", id="evt_1"),
        Event("session.updated", {"info": {"id": "ses_1"}}, id="evt_2", directory="/a b/ü", project="p", workspace="w"),
        Event("test.text", {"text": text, text: [text]}, id="evt_3"),
        Event("test.places", {"sessionID": text}, id="evt_4", directory=text, project=text, workspace=text),
        Event("test.empty", {"sessionID": ""}, id="evt_5", directory="", project="", workspace=""),
        Event("test.\ud800\U0001f600", {}, id="evt_\udfff\U0001f600"),
        Event("test.numbers", {"huge": 2**70, "tiny": 1e-05, "large": 1e16, "minus": -0.0}, id="evt_6"),
        Event("sync", None, id="evt_2", scope="global", extra={"syncEvent": {"a": [1, None, True]}}),
    ]
