"""What is of the Redis store alone: bad surroundings, retention as it goes, and what its keys look like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis

from opencode_sse_plugin import StoreUnavailable
from opencode_sse_plugin.stores import Evicted, Page, Retention
from opencode_sse_plugin.stores.redis_scripts import APPEND, BEGIN, OPEN, PAGE, PRUNE
from opencode_sse_plugin.stores.redis_store import RedisEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events

from .brokers import Broker, free_port
from .conftest import StartBroker
from .test_redis_contract import cut
from .test_redis_failures import MANY, opened, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def refused(url: str, patience: float = 0.3, **options: Any) -> str:
    """What opening complains about."""
    store = RedisEventStore(url, MANY, patience=patience, where=url.rpartition("@")[2], **options)
    with pytest.raises(StoreUnavailable) as caught:
        await store.open(RecordingListener())
    await store.close()
    return str(caught.value)


def everything(broker: Broker) -> dict[bytes, bytes | None]:
    with broker.client() as client:
        return {key: client.dump(key) for key in client.keys("*")}


# Bad surroundings.


async def test_nobody_answers() -> None:
    assert "onnect" in await refused(f"redis://127.0.0.1:{free_port()}/0")
    assert "nowhere.invalid" in await refused("redis://nowhere.invalid/0")
    assert "/nowhere.sock" in await refused("unix:///nowhere.sock")


async def test_it_is_another_kind_of_server() -> None:
    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with anyio.create_task_group() as group:
        group.start_soon(listener.serve, answer)
        assert f"event store 127.0.0.1:{port}/0: " in await refused(f"redis://me@127.0.0.1:{port}/0")
        group.cancel_scope.cancel()
    await listener.aclose()


async def test_a_wrong_password(start_broker: StartBroker) -> None:
    broker = start_broker("valkey", "none", "--requirepass", "right")
    assert "asks for a password" in await refused(broker.url)
    said = await refused(broker.url.replace("//", "//:wrong@"))
    assert "wrong user name or password" in said
    assert ":wrong" not in said
    store = RedisEventStore(broker.url.replace("//", "//:right@"), MANY)
    await store.open(RecordingListener())
    assert (await store.append(stored_events(1))).seqs == [1]
    await store.close()


async def test_a_database_that_does_not_exist(broker: Broker) -> None:
    assert "DB index is out of range" in await refused(broker.url.replace("/0", "/99"))


async def test_a_user_who_may_not(start_broker: StartBroker) -> None:
    broker = start_broker("valkey")
    with broker.client() as client:
        client.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "~*", "+@all", "-info")
        client.execute_command("ACL", "SETUSER", "host", "on", ">pw", "~{opencode-sse}:*", "+@all", "-config")
    assert "the user may not do what is needed" in await refused(broker.url.replace("//", "//guest:pw@"))
    store = RedisEventStore(broker.url.replace("//", "//host:pw@"), MANY)
    await store.open(RecordingListener())
    assert (await store.append(stored_events(1))).seqs == [1], "hosted servers keep their settings to themselves"
    await store.close()


@pytest.mark.parametrize("part", ["events", "log", "known"])
async def test_a_key_of_another_program(broker: Broker, part: str) -> None:
    key = f"taken-{part}"
    with broker.client() as client:
        client.set(f"{{{key}}}:{part}", "mine")
        before = everything(broker)
        said = await refused(broker.url, key=key)
        assert "choose another name with ?key=" in said
        assert everything(broker) == before, "it was touched"
        client.delete(f"{{{key}}}:{part}")


async def test_a_stream_of_somebody_else(broker: Broker) -> None:
    with broker.client() as client:
        client.xadd("{theirs}:events", {"a": "b"})
        before = everything(broker)
        assert "its stream was written by someone else" in await refused(broker.url, key="theirs")
        assert everything(broker) == before, "it was touched"


async def test_somebody_else_writes_into_our_stream(broker: Broker) -> None:
    async with opened(broker, key="ours", patience=1.0) as (store, told):
        await store.append(stored_events(2))
        with broker.client() as client:
            client.xadd("{ours}:events", {"a": "b"})
            with pytest.raises(StoreUnavailable, match="written by someone else"):
                await store.append(stored_events(2))
            assert client.xlen("{ours}:events") == 3
        cut(broker, "ours", 2)
        await store.append(stored_events(1))
        await told.until(3, 5)
        page = await store.read(0, 10, 1 << 30)
        assert isinstance(page, Page)
        assert page.last == 3


async def test_a_newer_layout(broker: Broker) -> None:
    async with opened(broker, key="newer") as (store, _):
        await store.append(stored_events(1))
    with broker.client() as client:
        client.hset("{newer}:log", "version", "7")
    before = everything(broker)
    assert "its layout has version 7, this program knows 1" in await refused(broker.url, key="newer")
    assert everything(broker) == before, "it was touched"


@pytest.mark.parametrize("program", ["valkey", "redis-6.2", "redis"])
async def test_a_server_without_memory(start_broker: StartBroker, program: str) -> None:
    broker = start_broker(program)
    async with opened(broker) as (store, told):
        await store.append(stored_events(2))
        with broker.client() as client:
            client.config_set("maxmemory", 1)
            for batch in (stored_events(1), stored_events(1500)):
                with pytest.raises(StoreUnavailable, match="out of memory; raise maxmemory"):
                    await store.append(batch)
            page = await store.read(0, 10, 1 << 20)
            assert isinstance(page, Page)
            assert page.last == 2, "what was stored stays readable, and nothing else was stored"
            client.config_set("maxmemory", 0)
        assert (await store.append(stored_events(1))).seqs == [3]
        await told.until(3, 5)


async def test_a_replica(start_broker: StartBroker) -> None:
    primary, replica = start_broker("valkey"), start_broker("valkey")
    async with opened(primary) as (store, _):
        await store.append(stored_events(1))
    replica.follow(primary)
    assert "read-only replica; the address must lead to the primary" in await refused(replica.url)


async def test_a_server_that_throws_keys_away_is_warned_about(
    start_broker: StartBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_broker("valkey", "none", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")
    async with opened(broker):
        assert "noeviction keeps it" in caplog.text


async def test_a_unix_socket(start_broker: StartBroker, tmp_path: Path) -> None:
    path = tmp_path / "s"
    start_broker("valkey", "none", "--unixsocket", str(path))
    store = RedisEventStore(f"unix://{path}", MANY)
    await store.open(RecordingListener())
    assert (await store.append(stored_events(1))).seqs == [1]
    await store.close()


async def test_a_closed_store_says_so(broker: Broker) -> None:
    async with opened(broker, key="closed") as (store, _):
        pass
    for use in (store.append(stored_events(1)), store.bounds(), store.read(0, 1, 1)):
        with pytest.raises(StoreUnavailable, match="is not open"):
            await use


# What it keeps.


async def test_it_prunes_as_it_goes(broker: Broker) -> None:
    store, told = RedisEventStore(broker.url, Retention(100, 1 << 30), key="prunes"), RecordingListener()
    await store.open(told)
    for _ in range(10):
        await store.append(stored_events(200))
    assert (await store.bounds()).oldest >= 1900
    assert store.statistics()["events"] <= 101
    page = await store.read(1900, 1000, 1 << 30)
    assert isinstance(page, Page)
    assert store.statistics()["bytes"] == sum(event.size for event in page.events)
    with broker.client() as client:
        assert client.zcard("{prunes}:known") == client.xlen("{prunes}:events") == store.statistics()["events"]
    await told.until(2000, 5)
    await store.close()


async def test_what_grew_too_old_goes_though_nothing_is_appended(broker: Broker) -> None:
    time = 1000.0
    keep = Retention(100, 1 << 30, age=10.0)
    store = RedisEventStore(broker.url, keep, key="ages", now=lambda: time)
    await store.open(RecordingListener())
    await store.append(stored_events(3))
    time = 1011.0

    async def gone() -> bool:
        return (await store.bounds()).oldest == 4

    await until(gone)
    assert await store.read(0, 1, 1) == Evicted(4)
    await store.close()


async def test_payload_bytes_are_what_is_counted(broker: Broker) -> None:
    """Where an event belongs stands before its payload, and is no part of it."""
    from opencode_sse_plugin import Event

    async with opened(broker, key="bytes") as (store, _):
        event = stored_event(Event("a.b", {"sessionID": "ses_1"}, id="evt_1", directory="/d" * 100))
        await store.append([event])
        assert store.statistics()["bytes"] == event.size


async def test_pages_stay_small_however_large_events_are(broker: Broker) -> None:
    async with opened(broker, key="large") as (store, _):
        await store.append([stored_event(size=1 << 20) for _ in range(6)])
        assert [(await store.read(after, 500, 3 << 20)).last for after in (0, 3)] == [3, 6]  # type: ignore[union-attr]
        with broker.client() as client:
            whole = "{large}:events", "{large}:log", "{large}:known"
            answer = client.evalsha(PAGE.sha, 3, *whole, "", "", "", 0, 500, 3 << 20)
        assert len(answer[7]) == 6, "the server sends no more than that"


async def test_all_keys_of_a_log_are_on_one_node_of_a_cluster(broker: Broker) -> None:
    from redis.cluster import key_slot

    async with opened(broker, key="tagged") as (store, _):
        await store.append(stored_events(1))
        await store.begin_epoch()
    with broker.client() as client:
        keys = client.keys("{tagged}*")
        assert len(keys) == 3
        assert len({key_slot(key) for key in keys}) == 1
        assert client.script_exists(*(script.sha for script in (OPEN, APPEND, PAGE, BEGIN))) == [True] * 4
    assert PRUNE.sha


async def test_a_node_of_a_cluster(start_broker: StartBroker) -> None:
    broker = start_broker("valkey", "none", "--cluster-enabled", "yes")
    with broker.client() as client:
        assert "event store" in await refused(broker.url), "the cluster is down"
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        await until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
    async with opened(broker) as (store, told), opened(broker) as (other, _):
        await store.append(stored_events(2))
        assert (await other.append(stored_events(2))).seqs == [3, 4]
        await told.until(4, 5)
        await store.begin_epoch()
        await store.prune()


async def test_a_new_epoch_by_hand(broker: Broker) -> None:
    async with opened(broker, key="by-hand") as (store, told):
        events = stored_events(6)
        await store.append(events)
        before = await store.bounds()
        await store.begin_epoch(4)
        assert (await store.append([events[5], events[3]])).seqs == [5, 4]
        await store.begin_epoch()
        bounds = await store.bounds()
        assert [bounds.end_of(link.epoch) for link in bounds.epochs] == [4, 5, 5]
        assert bounds.end_of(before.epoch) == 4
        assert [end for _, end in told.epochs] == [4, 5]


async def test_it_can_be_looked_at_without_being_touched(broker: Broker) -> None:
    looking = RedisEventStore(broker.url, MANY, key="looked-at")
    with pytest.raises(StoreUnavailable, match="there is no log of this name"):
        await looking.open_to_read()
    async with opened(broker, key="looked-at") as (store, _):
        await store.append(stored_events(3, size=100))
        bounds = await store.bounds()
    before = everything(broker)
    assert await looking.open_to_read() == bounds
    assert looking.statistics() == {"oldest": 1, "latest": 3, "events": 3, "bytes": 300}
    page = await looking.read(1, 10, 1 << 20)
    assert isinstance(page, Page)
    assert [event.seq for event in page.events] == [2, 3]
    await looking.close()
    assert everything(broker) == before


async def test_writers_that_are_gone_are_forgotten(broker: Broker) -> None:
    """The answer to a writer's newest batch is kept for ten minutes, and nobody's for ever."""

    def writers(client: redis.Redis) -> int:
        return sum(field.startswith(b"batch:") for field in client.hkeys("{writers}:log"))

    with broker.client() as client:
        for number in range(5):
            async with opened(broker, key="writers") as (store, _):
                await store.append(stored_events(1))
            assert writers(client) == number + 1
        for field, value in client.hgetall("{writers}:log").items():
            if field.startswith(b"batch:"):
                number, at, rest = value.split(b" ", 2)
                client.hset("{writers}:log", field, b"%b %d %b" % (number, int(at) - 600_001, rest))
        async with opened(broker, key="writers") as (store, _):
            assert writers(client) == 0
            assert (await store.append(stored_events(1))).seqs == [6]


async def test_the_store_commands_work_on_it(broker: Broker, tmp_path: Path) -> None:
    """On a log that somebody has open; none of those that look touches it."""

    async def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "opencode_sse_plugin.cli", "store", *words, "--json"]
        done = await anyio.run_process(command[:-1] if words[0] == "export" else command, check=False)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = {} if words[0] == "export" else json.loads(done.stdout)
        return said

    url, copy, file = f"{broker.url}?key=commands", f"{broker.url}?key=commands-copy", str(tmp_path / "a.jsonl")
    async with opened(broker, key="commands") as (store, told):
        events = stored_events(700)
        await store.append(events)
        before = everything(broker)
        info = await run("info", url)
        assert (info["kind"], info["oldest"], info["latest"], info["events"]) == ("redis", 1, 700, 700)
        assert (await run("verify", url))["faults"] == []
        await run("export", url, "--output", file)
        assert everything(broker) == before
        assert (await run("import", copy, file))["imported"] == 700
        assert (await run("prune", url, "--retain-events", "10"))["deleted"] == 690
        assert (await store.append(stored_events(1))).seqs == [701]
        await told.until(701, 5)
        assert told.epochs == []
    async with opened(broker, key="commands-copy") as (store, _):
        page = await store.read(0, 1000, 1 << 30)
        assert isinstance(page, Page)
        assert [event.id for event in page.events] == [event.id for event in events]


async def test_the_chain_of_epochs_is_bounded(broker: Broker) -> None:
    async with opened(broker, key="chain") as (store, _):
        await store.append(stored_events(1))
        first = (await store.bounds()).epoch
        for _ in range(100):
            await store.begin_epoch()
        bounds = await store.bounds()
        assert len(bounds.epochs) == 100
        assert bounds.end_of(first) is None
