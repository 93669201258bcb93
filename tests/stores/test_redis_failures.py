"""What is promised when a server of Redis or Valkey dies, stops, loses history, or when the way to it is cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from redis.exceptions import ConnectionError, ResponseError

from opencode_sse_plugin import EventBus, Filter, Settings, StoreUnavailable
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Awaited, Bounds, Page, Retention
from opencode_sse_plugin.stores.redis_store import RedisEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events

from ..clients.proxy import Proxy
from .brokers import Broker, Persistence
from .conftest import StartBroker
from .test_redis_contract import cut

pytestmark = pytest.mark.anyio
MANY = Retention(1_000_000, 1 << 30)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def proxy(started: list[Callable[[], None]]) -> Callable[[Broker], Proxy]:
    def start(broker: Broker) -> Proxy:
        one = Proxy(broker.port)
        started.append(one.close)
        return one

    return start


@asynccontextmanager
async def opened(
    where: Broker | Proxy, *, patience: float = 20.0, **options: Any
) -> AsyncIterator[tuple[RedisEventStore, RecordingListener]]:
    store = RedisEventStore(f"redis://127.0.0.1:{where.port}/0", MANY, patience=patience, **options)
    told = RecordingListener()
    await store.open(told)
    try:
        yield store, told
    finally:
        await store.close()


async def ids(store: RedisEventStore) -> list[str]:
    page = await store.read(0, 100_000, 1 << 40)
    assert isinstance(page, Page)
    return [event.id for event in page.events]


async def until(true: Callable[[], Awaitable[bool] | bool], seconds: float = 10.0) -> None:
    """Look until it is so."""
    with anyio.fail_after(seconds):
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return
            await anyio.sleep(0.005)


async def until_told(listener: RecordingListener, number: int) -> None:
    """Until so many events were told; their numbers may begin again."""
    try:
        await until(lambda: len(listener.events) >= number)
    except TimeoutError:
        raise AssertionError(f"only {listener.seqs} were told, with epochs {listener.epochs}") from None


def ends(bounds: Bounds) -> list[int]:
    """Where the epochs after the first one began."""
    return [link.began for link in bounds.epochs[1:]]


# The server dies.


@pytest.mark.parametrize("program", ["valkey", "redis-6.2", "redis"])
async def test_a_server_that_flushes_every_write_keeps_the_epoch(start_broker: StartBroker, program: str) -> None:
    broker = start_broker(program, "always")
    async with opened(broker) as (store, told), opened(broker) as (other, other_told):
        before = await store.bounds()
        await store.append(stored_events(3))
        await other_told.until(3, 5)
        broker.kill()
        async with anyio.create_task_group() as group:
            group.start_soon(store.append, stored_events(2))
            group.start_soon(other.append, stored_events(2))
            await anyio.sleep(0.1)
            broker.start()
        for listener in (told, other_told):
            await listener.until(7, 10)
            assert listener.seqs == [1, 2, 3, 4, 5, 6, 7]
            assert listener.epochs == []
        assert (await store.bounds()).epochs == before.epochs
        assert await ids(other) == [event.id for event in told.events] == [event.id for event in other_told.events]


@pytest.mark.parametrize("program", ["valkey", "redis-6.2", "redis"])
@pytest.mark.parametrize("persistence", ["everysec", "rdb"])
async def test_a_server_that_may_have_lost_something_begins_an_epoch_with_the_next_append(
    start_broker: StartBroker, program: str, persistence: Persistence
) -> None:
    broker = start_broker(program, persistence)
    async with opened(broker) as (store, told):
        await store.append(stored_events(3))
        with broker.client() as client:
            client.save() if persistence == "rdb" else client.bgrewriteaof()
            await until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        if persistence == "rdb":
            await store.append(stored_events(3))
            await told.until(6, 5)
        broker.kill()
        broker.start()
        # One who knows nothing of what was there is the first to append.
        async with opened(broker) as (newcomer, news):
            assert (await newcomer.bounds()).latest == 3
            (seq,) = (await newcomer.append(stored_events(1))).seqs
            assert seq == 4
            assert ends(await newcomer.bounds()) == [3]
            await news.until(4, 5)
            await told.until_epoch(1, 10)
            await until_told(told, 7 if persistence == "rdb" else 4)
        ((bounds, end),) = told.epochs
        assert end == 3
        assert ends(bounds) == [3]
        assert told.seqs == ([1, 2, 3, 4, 5, 6, 4] if persistence == "rdb" else [1, 2, 3, 4])
        await store.append(stored_events(1))
        assert ends(await store.bounds()) == [3], "one loss, one epoch"


async def test_a_server_that_comes_back_empty_is_a_new_history(start_broker: StartBroker) -> None:
    broker = start_broker("valkey", "none")
    async with opened(broker) as (store, told):
        before = await store.bounds()
        await store.append(stored_events(5))
        broker.kill()
        broker.start()
        async with opened(broker) as (newcomer, _):
            assert (await newcomer.append(stored_events(8))).seqs == list(range(1, 9)), "overtaken at once"
        await told.until_epoch(1, 10)
        ((bounds, end),) = told.epochs
        assert end == 0
        assert bounds.end_of(before.epoch) is None
        await until_told(told, 13)
        assert told.seqs == [*range(1, 6), *range(1, 9)]
        assert [event.id for event in told.events[5:]] == await ids(store)
        assert (await store.append(stored_events(1))).seqs == [9]


async def test_a_restart_before_the_first_append_says_nothing(start_broker: StartBroker) -> None:
    """What nobody was told can be lost without an epoch; and an append does not fail for it."""
    broker = start_broker("valkey", "none")
    async with opened(broker) as (store, told):
        broker.kill()
        broker.start()
        assert (await store.append(stored_events(2))).seqs == [1, 2]
        await told.until(2, 5)
        assert told.seqs == [1, 2]


# The server stops answering.


@pytest.mark.parametrize("seconds", [3.0, pytest.param(10.0, marks=pytest.mark.chaos)])
async def test_a_server_that_is_stopped_for_a_while(start_broker: StartBroker, seconds: float) -> None:
    """Longer than a call may take: what was asked twice is done once."""
    broker = start_broker("valkey", "none")
    async with opened(broker) as (patient, told), opened(broker, patience=0.5) as (impatient, others):
        await patient.append(stored_events(1))
        await others.until(1, 5)
        broker.pause()
        try:
            async with anyio.create_task_group() as group:
                answers: list[list[int]] = []

                async def append() -> None:
                    answers.append((await patient.append(stored_events(3))).seqs)

                group.start_soon(append)
                with pytest.raises(StoreUnavailable, match=r"within 0\.5 s; whether it was stored is not known"):
                    await impatient.append([stored_event(id="evt_abandoned")])
                await anyio.sleep(seconds - 0.5)
                broker.resume()
        finally:
            broker.resume()
        await impatient.append([stored_event(id="evt_last")])
        stored = await ids(patient)
        assert len(stored) == len(set(stored)), "something was stored twice"
        assert len(stored) == 5 + ("evt_abandoned" in stored)
        for listener in (told, others):
            await listener.until(len(stored), 5)
            assert [event.id for event in listener.events] == stored
            assert listener.epochs == []
        (seqs,) = answers
        assert [event.seq for event in told.events if event.seq in seqs] == seqs


# Another server takes over.


@pytest.mark.parametrize("program", ["valkey", "redis-6.2", "redis"])
async def test_a_replica_that_was_behind_and_was_overtaken(
    start_broker: StartBroker, proxy: Callable[[Broker], Proxy], program: str
) -> None:
    """The new head lies beyond the old cursor when we look: only the chain can tell."""
    primary, replica = start_broker(program, "always"), start_broker(program, "always")
    way = proxy(primary)
    async with opened(way) as (store, told), opened(way) as (slow, slow_told):
        await store.append(stored_events(4))
        replica.follow(primary)
        await store.append(stored_events(1))
        with replica.client() as client:
            await until(lambda: client.hget("{opencode-sse}:log", "head") == b"5")
            client.replicaof("127.0.0.1", "1")  # It is cut off, and does not see what comes now.
        await store.append(stored_events(3))
        await slow_told.until(8, 5)
        old = await store.bounds()
        primary.pause()
        replica.promote()
        async with opened(replica) as (newcomer, _):
            assert (await newcomer.append(stored_events(10))).seqs == list(range(6, 16))
            assert ends(await newcomer.bounds()) == [5], "it opened with the append"
        way.target = replica.port
        way.cut(reset=True)
        for listener in (told, slow_told):
            await listener.until_epoch(1, 10)
            await until_told(listener, 18)
            ((bounds, end),) = listener.epochs
            assert (end, bounds.end_of(old.epoch)) == (5, 5)
            assert listener.seqs == [*range(1, 9), *range(6, 16)]
            assert [event.id for event in listener.events[8:]] == (await ids(store))[5:]
        assert (await slow.append(stored_events(1))).seqs == [16]
        assert ends(await slow.bounds()) == [5]
        primary.resume()


async def test_a_replica_that_was_promoted_and_restarted_says_so_too(
    start_broker: StartBroker, proxy: Callable[[Broker], Proxy]
) -> None:
    """Nothing of it tells that it ever was a replica, but that there was one."""
    primary, replica = start_broker("valkey", "always"), start_broker("valkey", "always")
    async with opened(primary) as (store, _):
        replica.follow(primary)
        await store.append(stored_events(2))
        with primary.client() as client:
            assert client.wait(1, 5000) == 1
    replica.promote()
    replica.kill()
    replica.start()
    async with opened(replica) as (store, _):
        assert (await store.append(stored_events(1))).seqs == [3]
        assert ends(await store.bounds()) == [2]


async def test_the_first_replica_changes_nothing(start_broker: StartBroker) -> None:
    """A server takes a new replication id when the first replica comes; that is no loss."""
    primary, replica = start_broker("valkey", "none"), start_broker("valkey", "none")
    async with opened(primary) as (store, told):
        await store.append(stored_events(2))
        replica.follow(primary)
        await store.append(stored_events(2))
        assert ends(await store.bounds()) == []
        assert told.epochs == []


async def test_a_connection_that_is_closed_already(start_broker: StartBroker) -> None:
    """Python 3.12 and later raise something else for it than for one that breaks."""
    async with opened(start_broker("valkey", "none")) as (store, told):
        await store.append(stored_events(1))
        assert store._running is not None
        for way in store._running.writer.ways:
            if way.kept._connection is not None:
                way.kept._connection._writer.transport.abort()
        for _ in range(3):
            await anyio.lowlevel.checkpoint()  # Now the event loop has seen that it is closed.
        assert (await store.append(stored_events(1))).seqs == [2]
        await until_told(told, 2)


async def test_an_old_primary_that_comes_back(start_broker: StartBroker, proxy: Callable[[Broker], Proxy]) -> None:
    """What was stored at the one that took over is gone; the older history goes on from where both agree."""
    primary, replica = start_broker("valkey", "always"), start_broker("valkey", "always")
    way = proxy(primary)
    async with opened(way) as (store, told):
        await store.append(stored_events(2))
        replica.follow(primary)
        with primary.client() as client:
            assert client.wait(1, 5000) == 1
        replica.promote()
        await store.append(stored_events(2))
        way.target = replica.port
        way.cut(reset=True)
        assert (await store.append(stored_events(5))).seqs == [3, 4, 5, 6, 7]
        await until_told(told, 9)
        way.target = primary.port
        way.cut(reset=True)
        await told.until_epoch(2, 10)
        assert (await store.append(stored_events(1))).seqs == [5]
        await until_told(told, 12)
        assert [end for _, end in told.epochs] == [2, 2]
        assert told.seqs == [1, 2, 3, 4, 3, 4, 5, 6, 7, 3, 4, 5]
        assert [event.id for event in told.events[-3:]] == (await ids(store))[2:]


# Somebody else's hands.


async def test_a_log_that_was_replaced_behind_our_back(start_broker: StartBroker) -> None:
    """Neither the server nor its ids have changed: who knows better compares, and finds the last good number."""
    broker = start_broker("valkey", "none")
    async with opened(broker) as (store, told), opened(broker) as (other, other_told):
        await store.append(stored_events(6))
        await other_told.until(6, 5)
        cut(broker, "opencode-sse", 4)
        async with opened(broker) as (newcomer, _):
            await newcomer.append(stored_events(5))
        for listener in (told, other_told):
            await listener.until_epoch(1, 5)
            await until_told(listener, 11)
            assert [end for _, end in listener.epochs] == [4]
            assert listener.seqs == [*range(1, 7), *range(5, 10)]
        assert ends(await other.bounds()) == [4]


@pytest.mark.parametrize(("end", "good"), [(10, 10), (700, 700), (1200, 1200)])
async def test_however_much_was_lost_the_last_good_number_is_found(broker: Broker, end: int, good: int) -> None:
    """Of the newest thousand the names are known; where the head lies before them, nothing was put in their place."""
    key = f"much-{end}"
    async with opened(broker, key=key) as (store, told), opened(broker, key=key) as (_, others):
        for _turn in range(3):
            await store.append(stored_events(500))
        await others.until(1500, 5)
        cut(broker, key, end)
        assert (await store.append(stored_events(2))).seqs == [end + 1, end + 2]
        for listener in (told, others):
            await listener.until_epoch(1, 5)
            await until_told(listener, 1502)
            assert [said for _, said in listener.epochs] == [good]
        assert ends(await store.bounds()) == [good]


async def test_a_log_in_which_nothing_is_where_it_was(broker: Broker) -> None:
    """Under the same epoch: then no number of it is good any more."""
    async with opened(broker, key="nothing-left") as (store, told):
        await store.append(stored_events(5))
        cut(broker, "nothing-left", 0)
        async with opened(broker, key="nothing-left") as (newcomer, _):
            await newcomer.append(stored_events(9))
        await told.until_epoch(1, 5)
        await until_told(told, 14)
        assert [end for _, end in told.epochs] == [0]
        assert told.seqs == [*range(1, 6), *range(1, 10)]


# The way is cut.


@pytest.mark.parametrize("program", ["valkey", "redis-6.2", "redis"])
async def test_an_append_whose_answer_got_lost_is_done_once(
    start_broker: StartBroker, proxy: Callable[[Broker], Proxy], program: str
) -> None:
    way = proxy(start_broker(program, "none"))
    async with opened(way) as (store, told):
        first = stored_events(2)
        await store.append(first)
        for number in range(5):
            way.cut_before_answering = b"evt_marked"
            marked = stored_event(id=f"evt_marked_{number}")
            # Beside one that was known before, so that it is seen which of them are new.
            appended = await store.append([stored_event(id=first[0].id), marked, *stored_events(2), first[1]])
            new = 3 + 3 * number
            assert appended == ([1, new, new + 1, new + 2, 2], 2)
            assert marked.seq == new
            assert way.cuts == number + 1
        await told.until(17, 5)
        assert told.seqs == list(range(1, 18))
        assert [event.id for event in told.events] == await ids(store)


async def test_an_answer_is_remembered_though_the_events_are_gone(
    start_broker: StartBroker, proxy: Callable[[Broker], Proxy]
) -> None:
    """By its events alone, a batch that was evicted meanwhile would be stored again."""
    broker = start_broker("valkey", "none")
    way = proxy(broker)
    store, told = RedisEventStore(f"redis://127.0.0.1:{way.port}/0", Retention(3, 1 << 30)), RecordingListener()
    await store.open(told)
    async with opened(broker) as (other, _):
        await store.append(stored_events(1))  # Its connection stays.
        way.cut_before_answering = b"evt_marked"
        refused = Proxy(1)
        target, way.target = way.target, refused.port  # It cannot come back at once.
        async with anyio.create_task_group() as group:
            answers: list[tuple[list[int], int]] = []

            async def append() -> None:
                answers.append(await store.append([stored_event(id="evt_marked")]))

            group.start_soon(append)
            await until(lambda: way.cuts > 0)
            await other.append(stored_events(10))
            with broker.client() as client:
                assert client.xlen("{opencode-sse}:events") == 12
                client.xtrim("{opencode-sse}:events", minid="10", approximate=False)
                client.zremrangebyscore("{opencode-sse}:known", "-inf", 9)
                client.hset("{opencode-sse}:log", "oldest", "10")
            way.target = target
    assert answers == [([2], 0)]
    assert (await store.bounds()).latest == 12
    await store.close()
    refused.close()


async def test_readers_resume_without_gap_or_duplicate(
    start_broker: StartBroker, proxy: Callable[[Broker], Proxy]
) -> None:
    broker = start_broker("valkey", "none")
    way = proxy(broker)
    async with opened(broker) as (store, _), opened(way) as (_, told):
        for _turn in range(10):
            await store.append(stored_events(7))
            way.cut(reset=True)
        await told.until(70, 10)
        assert told.seqs == list(range(1, 71))
        assert told.epochs == []


# What a host sees.


async def test_while_the_server_is_away_subscribers_stay(start_broker: StartBroker) -> None:
    broker = start_broker("valkey", "always")
    settings = Settings(store=broker.url, publish_deadline=0.3, heartbeat=0.05)
    bus = EventBus(settings, plugins=Plugins(discover=False))
    async with bus, bus.subscribe(Filter()) as events:
        with anyio.fail_after(20):
            assert (await anext(events)).event.type == "server.connected"
            await bus.publish("test.event")
            while (await anext(events)).seq != 1:
                pass
            broker.kill()
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.3 s; .* \(.*onnect"):
                await bus.publish("test.event", id="evt_first")
            with pytest.raises(StoreUnavailable, match=r"no answer within 0\.3 s; nothing was stored \(.*onnect"):
                await bus.publish("test.event", id="evt_second")
            for _ in range(3):
                assert (await anext(events)).event.type == "server.heartbeat"
            broker.start()
            bus.publish_nowait("test.event", id="evt_after")
            while (delivery := await anext(events)).seq is None:
                assert delivery.event.type == "server.heartbeat"
            assert (delivery.seq, delivery.event.id) == (2, "evt_after")


async def test_a_bus_drains_though_the_server_hangs(start_broker: StartBroker) -> None:
    """What it accepted is refused then, and nobody waits longer than a drain may take."""
    broker = start_broker("valkey", "none")
    bus = EventBus(Settings(store=broker.url, publish_deadline=60), plugins=Plugins(discover=False))
    async with bus, anyio.create_task_group() as group:
        await bus.publish("test.event")
        broker.pause()
        refused: list[StoreUnavailable] = []

        async def publish() -> None:
            try:
                await bus.publish("test.event")
            except StoreUnavailable as error:
                refused.append(error)

        group.start_soon(publish)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(30):  # Two seconds are promised, and this machine may be busy.
            await bus.drain()
    assert len(refused) == 1
    broker.resume()


async def test_what_goes_two_ways_is_stored_in_the_order_of_its_submission(start_broker: StartBroker) -> None:
    """The first half of what was submitted fails before it is sent, and the second one is there first."""
    async with opened(start_broker()) as (store, told):
        assert store._running is not None
        first, second = store._running.writer.ways
        fails = 3
        came: list[str] = []
        call, other = first.kept.call, second.kept.call

        async def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal fails
            if fails:
                fails -= 1
                await anyio.sleep(0.05)  # Longer than the other one takes.
                raise ConnectionError("Error 111 connecting to it")
            came.append("first")
            return await call(*arguments, **options)

        async def watched(*arguments: Any, **options: Any) -> Any:
            answer = await other(*arguments, **options)
            came.append(answer[0].decode())
            return answer

        first.kept.call, second.kept.call = failing, watched  # type: ignore[method-assign]
        submissions = [Awaited([event]) for event in stored_events(100)]
        for submission in submissions:
            store.submit(submission)
        outcomes = [await submission.outcome() for submission in submissions]
        assert outcomes == [([seq], 0) for seq in range(1, 101)]
        await told.until(100, 5.0)
        assert await ids(store) == [submission.events[0].id for submission in submissions]
        assert came[0] == "EARLY", "the second half was not there first"
        assert "first" in came


async def test_what_waits_for_something_that_is_refused_goes_on_without_it(start_broker: StartBroker) -> None:
    async with opened(start_broker()) as (store, _):
        assert store._running is not None
        first = store._running.writer.ways[0]
        call, refused = first.kept.call, False

        async def refusing(*arguments: Any, **options: Any) -> Any:
            nonlocal refused
            if not refused:
                refused = True
                await anyio.sleep(0.05)
                raise ResponseError("OOM command not allowed when used memory > 'maxmemory'")
            return await call(*arguments, **options)

        first.kept.call = refusing  # type: ignore[method-assign]
        submissions = [Awaited([event]) for event in stored_events(100)]
        for submission in submissions:
            store.submit(submission)
        for submission in submissions[:50]:
            with pytest.raises(StoreUnavailable, match="out of memory"):
                await submission.outcome()
        assert [await submission.outcome() for submission in submissions[50:]] == [([n], 0) for n in range(1, 51)]
