"""The contract notices stores that break it: each of its tests fails for at least one of those below."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio.lowlevel
import pytest

from opencode_sse_plugin.events import StoredEvent
from opencode_sse_plugin.stores import (
    Appended,
    Bounds,
    EpochStart,
    EventStore,
    Evicted,
    Page,
    Retention,
    StoreListener,
    Submission,
)
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import EventStoreContract
from opencode_sse_plugin.wakeup import call_soon


class Everyone:
    """All who are told by one memory store."""

    waiting = 0

    def __init__(self, *listeners: StoreListener) -> None:
        self.listeners = list(listeners)

    def visible(self, events: Sequence[StoredEvent]) -> None:
        for listener in self.listeners:
            listener.visible(events)

    def missed(self, oldest: int) -> None:
        raise AssertionError("a memory store tells at once")

    def epoch_changed(self, bounds: Bounds, end: int) -> None:
        for listener in self.listeners:
            listener.epoch_changed(bounds, end)


class Twin:
    """A further store upon the log of a memory store."""

    def __init__(self, store: MemoryEventStore) -> None:
        self._store = store
        self._listener: StoreListener | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def open(self, listener: StoreListener) -> Bounds:
        store = self._store
        if not isinstance(store._listener, Everyone):
            assert store._listener is not None
            store._listener = Everyone(store._listener)
        store._listener.listeners.append(listener)
        self._listener = listener
        return await store.bounds()

    async def close(self) -> None:
        everyone = self._store._listener
        if isinstance(everyone, Everyone) and self._listener in everyone.listeners:
            everyone.listeners.remove(self._listener)


#: Each broken store with the tests that must fail for it.
BROKEN: dict[type[MemoryEventStore], set[str]] = {}


def breaks(*tests: str) -> Any:
    """Put a store into the table."""

    def put(store: type[MemoryEventStore]) -> type[MemoryEventStore]:
        BROKEN[store] = {f"test_{test}" for test in tests}
        return store

    return put


class Grouping(MemoryEventStore):
    """One that groups by itself, and keeps the contract."""

    async def open(self, listener: StoreListener) -> Bounds:
        self.submitted: list[Submission] = []
        self.soon = call_soon()
        return await super().open(listener)

    def submit(self, submission: Submission) -> None:
        self.submitted.append(submission)
        self.soon(self.store)

    def store(self) -> None:
        for submission in self.submitted:
            submission.appended = self.append_now(submission.events)
            submission.settle()
        self.submitted.clear()


@breaks("many_submissions_are_stored_in_call_order_whatever_their_size")
class StoresTheSmallFirst(Grouping):
    def store(self) -> None:
        self.submitted.sort(key=lambda submission: submission.events[0].size > 10_000)
        super().store()


@breaks("submissions_are_stored_in_call_order_and_told_before_they_are_settled")
class SettlesTooEarly(Grouping):
    def store(self) -> None:
        for submission in self.submitted:
            submission.appended = Appended([self._latest + 1], 0)
            submission.settle()
            self.append_now(submission.events)
        self.submitted.clear()


@breaks("numbers_begin_at_one_and_have_no_holes", "an_empty_log_has_bounds")
class BeginsAtZero(MemoryEventStore):
    def __init__(self, retention: Retention, **options: Any) -> None:
        super().__init__(retention, **options)
        self._latest = -1


@breaks("a_known_event_answers_its_number", "the_listener_is_told_everything_once_and_in_order")
class LeavesHoles(MemoryEventStore):
    """Uses up a number for an event it knows, as a database's sequence does."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        appended = super().append_now(events)
        self._latest += appended.duplicates
        return appended


@breaks("concurrent_appends_leave_no_holes")
class RacesForNumbers(MemoryEventStore):
    """Reads the head, lets others run, and counts on from what it read."""

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        head = self._latest
        await anyio.lowlevel.checkpoint()
        self._latest = head
        return self.append_now(events)


@breaks("batches_are_stored_whole_or_not_at_all")
class StoresParts(MemoryEventStore):
    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        seqs, duplicates = [], 0
        for event in events:
            await anyio.lowlevel.checkpoint()
            appended = self.append_now([event])
            seqs += appended.seqs
            duplicates += appended.duplicates
        return Appended(seqs, duplicates)


@breaks("a_known_event_answers_its_number", "the_listener_is_told_everything_once_and_in_order")
class TellsTwice(MemoryEventStore):
    """Tells events again that were known already."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        appended = super().append_now(events)
        if appended.duplicates and self._listener is not None:
            self._listener.visible([event for event in self._events.values() if event.seq in appended.seqs])
        return appended


@breaks("the_listener_is_told_everything_once_and_in_order", "concurrent_appends_leave_no_holes")
class TellsBackwards(MemoryEventStore):
    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        before = self._latest
        listener, self._listener = self._listener, None
        appended = super().append_now(events)
        self._listener = listener
        if listener is not None:
            listener.visible([event for event in reversed(self._events.values()) if event.seq > before])
        return appended


@breaks("the_listener_is_told_everything_once_and_in_order", "an_immediate_append_is_an_append")
class TellsOthersOnly(MemoryEventStore):
    """Keeps its own appends to itself, as a broadcast to the other processes does."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        self._listener = None
        return super().append_now(events)


@breaks("what_was_there_before_is_not_told", "a_durable_log_outlives_its_store")
class TellsTheOld(MemoryEventStore):
    async def open(self, listener: Any) -> Bounds:
        listener.visible(list(self._events.values()))
        return await super().open(listener)


@breaks("a_known_event_answers_its_number", "an_event_twice_in_one_batch_is_stored_once")
class KnowsNothing(MemoryEventStore):
    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        appended = [MemoryEventStore.append_now(self, [event]) for event in events if not self._known.clear()]
        return Appended([seq for one in appended for seq in one.seqs], 0)


@breaks("a_known_id_of_another_type_is_new")
class KnowsIdsOnly(MemoryEventStore):
    """Takes a `sync` twin, which has the id of another event, for a duplicate."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        types = [event.type for event in events]
        for event in events:
            event.type = "any"
        appended = super().append_now(events)
        for event, type in zip(events, types, strict=True):
            event.type = type
        return appended


@breaks("an_event_twice_in_one_batch_is_stored_once")
class LooksBeforeTheBatch(MemoryEventStore):
    """Asks what is known once a batch, and so stores an event twice that stands in it twice."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        before, after = dict(self._known), dict(self._known)
        seqs, duplicates = [], 0
        for event in events:
            self._known = dict(before)
            appended = super().append_now([event])
            seqs += appended.seqs
            duplicates += appended.duplicates
            after.update(self._known)
        self._known = after
        self._evict()
        return Appended(seqs, duplicates)


@breaks("an_evicted_event_is_forgotten", "events_that_are_too_old_go")
class RemembersTheEvicted(MemoryEventStore):
    def _forget_oldest(self) -> None:
        event = next(iter(self._events.values()))
        super()._forget_oldest()
        self._known.setdefault((event.id, event.type), event.seq)


@breaks("only_the_newest_events_are_known")
class RemembersTooMuch(MemoryEventStore):
    """Knows every event that it stores."""

    class Endless(dict[tuple[str, str], int]):
        def __len__(self) -> int:
            return 0

    def __init__(self, retention: Retention, **options: Any) -> None:
        super().__init__(retention, **options)
        self._known = self.Endless()


@breaks("events_come_back_as_they_were")
class WritesValidTextOnly(MemoryEventStore):
    """Replaces lone surrogates, which databases refuse in text columns."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        for event in events:
            event.session = event.session and event.session.encode("utf-8", "replace").decode()
        return super().append_now(events)


@breaks("an_event_of_one_mebibyte_comes_back")
class CutsLargePayloads(MemoryEventStore):
    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        appended = super().append_now(events)
        for event in self._events.values():
            event.payload = event.payload[:65536]
        return appended


@breaks("pages_hold_as_many_events_as_asked_for")
class CountsFromZero(MemoryEventStore):
    """Gives one event more than the limit."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return await super().read(after, limit + 1, max_bytes)


@breaks("pages_hold_as_many_events_as_asked_for", "many_read_at_their_own_pace_while_others_append")
class SkipsAtTheEndOfAPage(MemoryEventStore):
    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        got = await super().read(after, limit, max_bytes)
        return Page(got.events, min(self._latest, got.last + 1)) if isinstance(got, Page) and got.events else got


@breaks("pages_end_at_max_bytes_but_hold_one_event")
class DoesNotLookAtBytes(MemoryEventStore):
    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return await super().read(after, limit, 1 << 40)


@breaks("pages_end_at_max_bytes_but_hold_one_event")
class GivesNothingTooLarge(MemoryEventStore):
    """Keeps to max_bytes even where no event fits, so that its readers never get on."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        got = await super().read(after, limit, max_bytes)
        too_large = isinstance(got, Page) and sum(event.size for event in got.events) > max_bytes
        return Page([], after) if too_large else got


@breaks("reading_at_the_head_gives_nothing")
class PullsReadersBack(MemoryEventStore):
    """Answers a position beyond its head with the head."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return await super().read(min(after, self._latest), limit, max_bytes)


@breaks("the_newest_events_are_kept_and_no_more", "evicted_is_said_exactly_where_something_is_missing")
class KeepsOneMore(MemoryEventStore):
    """Makes room for one event before it stores, whatever it stores."""

    def _evict(self) -> None:
        while len(self._events) > self.retention.events + 1:
            self._forget_oldest()


@breaks("no_more_bytes_are_kept_than_asked_for", "events_that_are_too_old_go")
class LooksAtNumbersOnly(MemoryEventStore):
    def _evict(self) -> None:
        while len(self._events) > self.retention.events:
            self._forget_oldest()


@breaks("the_newest_event_is_kept_whatever_its_size")
class DropsTheNewest(MemoryEventStore):
    def _evict(self) -> None:
        while self._bytes > self.retention.bytes:
            self._forget_oldest()
        super()._evict()


@breaks("evicted_is_said_exactly_where_something_is_missing")
class CallsTheOldestMissing(MemoryEventStore):
    """The seed's defect: `after == oldest - 1` is expired."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        oldest = (await self.bounds()).oldest
        return Evicted(oldest) if oldest > 1 and after < oldest else await super().read(after, limit, max_bytes)


@breaks("evicted_is_said_exactly_where_something_is_missing", "a_reader_overtaken_by_retention_is_told")
class SaysNothingIsMissing(MemoryEventStore):
    """Begins at the oldest event there is."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        oldest = (await self.bounds()).oldest
        return await super().read(max(after, oldest - 1), limit, max_bytes)


@breaks("a_reader_overtaken_by_retention_is_told")
class ChecksBeforeItReads(MemoryEventStore):
    """Looks for eviction, and reads later."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        oldest = self._latest - len(self._events) + 1
        if after < oldest - 1:
            return Evicted(oldest)
        for _ in range(50):  # trio runs tasks in random order; by now the others had their turn
            await anyio.lowlevel.checkpoint()
        events = [event for event in self._events.values() if event.seq > after][:limit]
        return Page(events, events[-1].seq if events else after)


@breaks("appending_leaves_the_epoch_alone")
class BeginsAnEpochWithEveryAppend(MemoryEventStore):
    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        self._epochs = (*self._epochs, EpochStart(f"{self._epochs[0].epoch}{len(self._epochs)}", self._latest))
        return super().append_now(events)


@breaks("two_logs_have_different_epochs")
class CallsEveryHistoryTheSame(MemoryEventStore):
    def __init__(self, retention: Retention, **options: Any) -> None:
        super().__init__(retention, epoch="always", **options)


@breaks("lost_history_begins_an_epoch", "an_epoch_can_begin_though_nothing_is_lost")
class UsesNumbersAgain(MemoryEventStore):
    def begin_epoch(self, end: int) -> None:
        epochs = self._epochs
        super().begin_epoch(end)
        self._epochs = epochs


@breaks("closing_twice_does_nothing")
class ClosesOnce(MemoryEventStore):
    closed = False

    async def open(self, listener: Any) -> Bounds:
        self.closed = False
        return await super().open(listener)

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


@breaks("it_says_what_it_is")
class HasItsOwnRetention(MemoryEventStore):
    def __init__(self, retention: Retention, **options: Any) -> None:
        super().__init__(retention._replace(events=max(retention.events, 1000)), **options)


@breaks("a_durable_log_outlives_its_store", "what_was_there_before_is_not_told")
class ForgetsOnClose(MemoryEventStore):
    async def close(self) -> None:
        await super().close()
        self._events.clear()
        self._known.clear()
        self._latest = 0


@breaks("stores_of_one_log_make_one_sequence", "what_one_acknowledged_another_knows")
class TellsOneOnly(MemoryEventStore):
    """Tells the store that appended, or just any of them."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        everyone = self._listener
        if isinstance(everyone, Everyone):
            self._listener = everyone.listeners[0]
        appended = super().append_now(events)
        self._listener = everyone
        return appended


@breaks("all_stores_are_told_of_a_new_epoch")
class TellsOneOfEpochs(MemoryEventStore):
    def begin_epoch(self, end: int) -> None:
        everyone = self._listener
        if isinstance(everyone, Everyone):
            self._listener = everyone.listeners[0]
        super().begin_epoch(end)
        self._listener = everyone


@breaks("one_that_retention_overtook_is_told")
class LeavesOutTheBusy(MemoryEventStore):
    """Tells only those who can take it just now."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        everyone = self._listener
        if isinstance(everyone, Everyone):
            self._listener = Everyone(*(listener for listener in everyone.listeners if not listener.waiting))
        appended = super().append_now(events)
        self._listener = everyone
        return appended


@breaks("one_that_comes_later_begins_at_the_head")
class ClosesForEveryone(MemoryEventStore):
    """Is done when one of those that have it open leaves."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        everyone = self._listener
        most = self.__dict__.setdefault("most", 0)
        if isinstance(everyone, Everyone):
            self.__dict__["most"] = max(most, len(everyone.listeners))
            if len(everyone.listeners) < most:
                raise RuntimeError("closed")
        return super().append_now(events)


@breaks("the_chain_of_epochs_outlives_its_store")
class ForgetsOldEpochsOnClose(MemoryEventStore):
    async def close(self) -> None:
        await super().close()
        self._epochs = self._epochs[-1:]


@breaks("a_page_begins_anywhere")
class GivesUpLooking(MemoryEventStore):
    """Looks for the position among the first 10 000 events only (Mercure's defect)."""

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return Page([], after) if after > 10_000 else await super().read(after, limit, max_bytes)


@breaks("nothing_is_wrong_with_it")
class BreaksLines(MemoryEventStore):
    """Writes payloads for people to read."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        for event in events:
            event.payload = event.payload.replace(b",", b",\n")
        return super().append_now(events)


@breaks("it_knows_what_it_holds")
class CountsWhatItEverHad(MemoryEventStore):
    def statistics(self) -> dict[str, int]:
        return {**super().statistics(), "events": self._latest}


@breaks("a_log_can_be_read_as_it_lies")
class BeginsAnEpochWhenLookedAt(MemoryEventStore):
    async def open_to_read(self) -> Bounds:
        self.begin_epoch(self._latest)
        return await self.bounds()


#: All of the contract, by name.
TESTS = {name for name, _ in inspect.getmembers(EventStoreContract, inspect.iscoroutinefunction) if "test_" in name}


@pytest.fixture(autouse=True)
def _few_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencode_sse_plugin.stores.memory.KNOWN_MAX", 50)


async def failing_tests(kind: type[MemoryEventStore], seconds: float) -> set[str]:
    """Run the contract on a store, waiting so long for what is to come; the names of the tests that fail."""

    class Contract(EventStoreContract):
        durable = True
        shared = True
        known_max = 50
        patience = seconds
        time = 0.0

        @asynccontextmanager
        async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
            yield kind(retention, now=lambda: self.time)

        async def another(self, store: EventStore) -> EventStore:
            assert isinstance(store, MemoryEventStore)
            return Twin(store)

        async def pass_time(self, seconds: float) -> None:
            self.time += seconds

        async def lose_history(self, store: EventStore, end: int) -> None:
            assert isinstance(store, MemoryEventStore)
            store.begin_epoch(end)

    failed = set()
    for name in sorted(TESTS):
        try:
            await getattr(Contract(), name)()
        except Exception:
            failed.add(name)
        except pytest.skip.Exception:
            pass  # It does not offer this.
    return failed


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [MemoryEventStore, Grouping])
async def test_a_store_that_keeps_the_contract_passes(kind: type[MemoryEventStore]) -> None:
    assert await failing_tests(kind, seconds=30) == set()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", BROKEN)
async def test_a_store_that_breaks_the_contract_fails(kind: type[MemoryEventStore]) -> None:
    assert await failing_tests(kind, seconds=0.05) >= BROKEN[kind]


def test_every_test_of_the_contract_can_fail() -> None:
    assert set().union(*BROKEN.values()) == TESTS
