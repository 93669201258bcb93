"""The SQLite store: the contract of every store, and what is its own."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from opencode_sse_plugin import ConfigurationError, Delivery, Event, EventBus, Filter, Settings, StoreUnavailable
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import DURABLE_RETENTION, EventStore, Retention, sqlite, sqlite_log
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore, open_sqlite
from opencode_sse_plugin.stores.threads import Call
from opencode_sse_plugin.testing import EventStoreContract
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events


class TestSQLiteEventStore(EventStoreContract):
    durable = True
    shared = True

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.time = 1_700_000_000.0
        self.logs = 0

    def store(self, path: Path, retention: Retention) -> SQLiteEventStore:
        return SQLiteEventStore(path, retention, now=lambda: self.time)

    @asynccontextmanager
    async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
        self.logs += 1
        store = self.store(self.folder / f"{self.logs}.db", retention)
        yield store
        await store.close()

    async def reopen(self, store: EventStore) -> EventStore:
        assert isinstance(store, SQLiteEventStore)
        return self.store(store.path, store.retention)

    async def another(self, store: EventStore) -> EventStore:
        return await self.reopen(store)

    async def prune(self, store: EventStore) -> None:
        assert isinstance(store, SQLiteEventStore)
        await store.prune()

    async def pass_time(self, seconds: float) -> None:
        self.time += seconds

    async def lose_history(self, store: EventStore, end: int) -> None:
        assert isinstance(store, SQLiteEventStore)
        await store.begin_epoch(end)


@asynccontextmanager
async def opened(path: Path, *args: Any, **options: Any) -> AsyncIterator[tuple[SQLiteEventStore, RecordingListener]]:
    store, told = SQLiteEventStore(path, *args, **options), RecordingListener()
    await store.open(told)
    try:
        yield store, told
    finally:
        await store.close()


async def until(true: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    """Look until it is so."""
    with anyio.fail_after(seconds):
        while True:
            if await true():
                return
            await anyio.sleep(0.01)


# The URL.


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a.db", "a.db"),
        ("sqlite:///folder/a%20b.db", "folder/a b.db"),
        ("sqlite:////srv/a.db?synchronous=normal", "/srv/a.db"),
        ("sqlite:////srv/a.db?synchronous=full", "/srv/a.db"),
    ],
)
def test_the_url_names_a_file(url: str, path: str) -> None:
    store = open_sqlite(url, Settings())
    assert store.path == Path(path)
    assert store.retention == DURABLE_RETENTION == Retention(1_000_000, 1 << 30, 604_800.0)
    assert store._options.lossy == url.endswith("normal")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://a.db",
        "sqlite:///:memory:",
        "sqlite:///a.db#b",
        "sqlite:///a.db?synchronous=off",
        "sqlite:///a.db?sync=full",
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite://"):
        open_sqlite(url, Settings())


def test_retention_is_what_the_settings_say() -> None:
    assert open_sqlite("sqlite:///a", Settings(retain_events=7, retain_age=60.0)).retention == Retention(
        7, 1 << 30, 60.0
    )
    assert open_sqlite("sqlite:///a", Settings(retain_age=float("inf"))).retention.age is None


# Retention.


@pytest.mark.anyio
async def test_it_prunes_by_itself(tmp_path: Path) -> None:
    async with opened(tmp_path / "a.db", Retention(100, 1 << 30)) as (store, _):
        for _ in range(10):
            await store.append(stored_events(200))

        async def pruned() -> bool:
            return (await store.bounds()).oldest >= 1900

        await until(pruned)
        assert store.statistics()["events"] <= 101
        size = sum(event.size for event in (await store.read(1900, 1000, 1 << 30)).events)  # type: ignore[union-attr]
        assert abs(store.statistics()["bytes"] - size) < 200


@pytest.mark.anyio
async def test_what_grew_too_old_is_pruned_though_nothing_is_appended(tmp_path: Path) -> None:
    time = 1000.0
    async with opened(tmp_path / "a.db", Retention(100, 1 << 30, age=10.0), now=lambda: time) as (store, _):
        await store.append(stored_events(3))
        time = 1011.0

        async def empty() -> bool:
            return (await store.bounds()).oldest == 4

        await until(empty)
        assert await store.append(stored_events(1)) == ([4], 0)


@pytest.mark.anyio
async def test_one_process_prunes_at_a_time(tmp_path: Path) -> None:
    path, time = tmp_path / "a.db", 1000.0
    async with opened(path, Retention(10, 1 << 30), now=lambda: time) as (store, _):
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE log SET pruner = 'other', pruner_until = 1005000")
        await store.append(stored_events(100))
        await anyio.sleep(0.2)
        assert (await store.bounds()).oldest == 1
        time = 1006.0

        async def pruned() -> bool:
            return (await store.bounds()).oldest == 91

        await until(pruned)
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT pruner, pruner_until FROM log").fetchone()[0] != "other"


@pytest.mark.anyio
async def test_pruning_takes_small_steps(tmp_path: Path) -> None:
    """So that a publisher waits for one of them at most."""
    path = tmp_path / "a.db"
    async with opened(path) as (store, _):
        await store.append(stored_events(1200))
        await store.append(stored_events(12, size=1 << 20))
    keep = Retention(1, 1 << 30)
    with closing(sqlite3.connect(path, isolation_level=None)) as log:
        oldest = [1]
        while sqlite_log.prune(log, keep, 0, "me", forced=True):
            oldest.append(sqlite_log.extent(log).oldest)
    assert oldest == [1, 501, 1001, 1205, 1209, 1212]


@pytest.mark.anyio
async def test_the_file_stops_growing(tmp_path: Path) -> None:
    path, sizes = tmp_path / "a.db", []
    for _ in range(6):
        async with opened(path, Retention(500, 1 << 30)) as (store, _):
            await store.append(stored_events(1000, size=500))
            await store.prune()
        sizes.append(path.stat().st_size)
    assert max(sizes) <= sizes[1] * 1.1, sizes


# Threads.


def our_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("opencode-sse")}


@pytest.mark.anyio
async def test_closing_ends_its_threads(tmp_path: Path) -> None:
    async with opened(tmp_path / "mine.db") as (store, _):
        await store.append(stored_events(1))
        assert {name for name in our_threads() if "mine" in name} == {
            "opencode-sse mine.db",
            "opencode-sse mine.db reader",
        }
    assert not {name for name in our_threads() if "mine" in name}
    for use in (store.append(stored_events(1)), store.bounds(), store.read(0, 1, 1)):
        with pytest.raises(StoreUnavailable, match="is not open"):
            await use


@pytest.mark.anyio
async def test_what_was_queued_is_stored_before_it_closes(tmp_path: Path) -> None:
    async with opened(tmp_path / "a.db") as (store, _):
        stuck = threading.Event()
        assert store._writer is not None
        store._writer.put(Call(stuck.wait))
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(store.append, stored_events(3))
            await anyio.wait_all_tasks_blocked()
            group.start_soon(store.close)
            await anyio.wait_all_tasks_blocked()
            stuck.set()
    async with opened(tmp_path / "a.db") as (store, _):
        assert (await store.bounds()).latest == 60


def test_a_host_that_forgets_to_close_can_exit(tmp_path: Path) -> None:
    program = f"""
import anyio
from pathlib import Path
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_events

async def main():
    store = SQLiteEventStore(Path({str(tmp_path / "a.db")!r}))
    await store.open(RecordingListener())
    print(await store.append(stored_events(3)))

anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert "seqs=[1, 2, 3]" in done.stdout


@pytest.mark.anyio
async def test_a_thread_that_is_stuck_leaves_no_publisher_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path / "a.db", patience=0.1) as (store, _):
        stuck = threading.Event()
        assert store._writer is not None
        store._writer.put(Call(stuck.wait))
        try:
            with pytest.raises(StoreUnavailable, match="is not known"):
                await store.append(stored_events(1))
        finally:
            stuck.set()
        monkeypatch.setattr(sqlite, "_GRACE", 60.0)  # From here on the disk may take its time.
        assert (await store.append(stored_events(1))).seqs == [2], "it was stored after all"


@pytest.mark.anyio
async def test_one_that_cannot_be_stored_takes_no_other_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "a.db") as (store, told):
        bad = stored_event()
        bad.payload = object()  # type: ignore[assignment]
        errors: list[Exception] = []

        async def publish_bad() -> None:
            try:
                await store.append([stored_event(), bad])
            except StoreUnavailable as error:
                errors.append(error)

        stuck = threading.Event()
        assert store._writer is not None
        store._writer.put(Call(stuck.wait))  # So that all three share a transaction.
        async with anyio.create_task_group() as group:
            for publish in (
                lambda: store.append(stored_events(2)),
                publish_bad,
                lambda: store.append(stored_events(2)),
            ):
                group.start_soon(publish)
            await anyio.wait_all_tasks_blocked()
            stuck.set()
        assert len(errors) == 1
        assert (await store.bounds()).latest == 4
        await told.until(4, 5)
        assert told.seqs == [1, 2, 3, 4]


# Several processes: what the contract does not say.


@pytest.mark.anyio
async def test_a_process_that_cannot_keep_up_is_not_flooded(tmp_path: Path) -> None:
    async with opened(tmp_path / "a.db") as (store, _), opened(tmp_path / "a.db") as (_, told):
        told.waiting = 1
        await store.append(stored_events(5000))
        await anyio.sleep(0.1)
        assert told.seqs == [], "nothing is read for one who has not taken what it was told"
        told.waiting = 0
        await told.until(5000, 10)
        assert told.seqs == list(range(1, 5001))


@pytest.mark.anyio
async def test_two_buses_are_one_stream(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    one, other = (EventBus(Settings(store=url), plugins=Plugins(discover=False)) for _ in range(2))
    async with one, other, one.subscribe(Filter()) as here, other.subscribe(Filter()) as there:
        for events in (here, there):
            assert [delivery.event.type for delivery in await first(events, 1)] == ["server.connected"]
        for bus in (one, other, other, one):
            await bus.publish("test.event")
        seen = [[(delivery.seq, delivery.event.id) for delivery in await first(events, 4)] for events in (here, there)]
        assert [seq for seq, _ in seen[0]] == [1, 2, 3, 4]
        assert seen[0] == seen[1]
        status = other.statistics()["store"]
        assert {"oldest": 1, "latest": 4, "events": 4}.items() <= status.items()


@pytest.mark.anyio
async def test_a_bus_that_retention_overtook_says_so(tmp_path: Path) -> None:
    """Events that were evicted before this process saw them are reported to its subscribers as lost."""
    url = f"sqlite:///{tmp_path / 'a.db'}"
    bus = EventBus(Settings(store=url), plugins=Plugins(discover=False))
    async with bus, bus.subscribe(Filter()) as events:
        await first(events, 1)
        await bus.publish("test.event")
        assert [delivery.seq for delivery in await first(events, 1)] == [1]
        # In one transaction more than is kept, so that it is pruned before it can be seen here.
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as log:
            log.execute("BEGIN IMMEDIATE")
            # Stored now: what is too old would be pruned too, at the next look at age.
            sqlite_log.insert(log, [stored_events(10)], int(time.time() * 1000))
            sqlite_log.prune(log, Retention(3, 1 << 30), 0, "me", forced=True)
            log.execute("COMMIT")
        got = await first(events, 4)
    assert [delivery.seq for delivery in got] == [None, 9, 10, 11]
    lagged = got[0].event
    assert lagged.type == "server.stream.lagged"
    assert lagged.properties is not None
    assert (lagged.properties["exceeded"], lagged.properties["first"], lagged.properties["last"]) == ("retention", 2, 8)
    assert lagged.properties["dropped"] == -1, "nobody here has seen them"


@pytest.mark.anyio
async def test_an_id_that_was_made_here_is_known_when_somebody_gives_it(tmp_path: Path) -> None:
    """Ids made for a publish are not looked up, those that come from outside are: also when stored just before."""
    async with EventBus(Settings(store=f"sqlite:///{tmp_path / 'a.db'}"), plugins=Plugins(discover=False)) as bus:
        async with bus.subscribe(Filter()) as events:
            await first(events, 1)
            await bus.publish("test.event")
            await bus.publish(Event("test.event"))
            made = [delivery.event for delivery in await first(events, 2)]
            again = await bus.publish_batch([*made, Event("test.event"), *made])
        assert again == [1, 2, 3, 1, 2]
        assert bus.statistics()["counters"]["duplicates"] == 4


@pytest.mark.anyio
async def test_what_was_seen_last_is_not_trusted_once_it_changed(tmp_path: Path) -> None:
    """Numbers go on behind what is stored, whoever shortened or lengthened the log since the last append."""
    store, other = SQLiteEventStore(tmp_path / "a.db", Retention(2, 1 << 30)), SQLiteEventStore(tmp_path / "a.db")
    await store.open(RecordingListener())
    await other.open(RecordingListener())

    async def append(store: SQLiteEventStore, number: int) -> list[int]:
        return list((await store.append([stored_event(id=f"evt_{number}")])).seqs)

    try:
        assert [await append(store, n) for n in range(3)] == [[1], [2], [3]]
        await store.begin_epoch(1)
        assert await append(store, 3) == [2]
        assert await append(other, 4) == [3]
        await store.prune()
        assert await append(store, 5) == [4]
        await other.begin_epoch(2)
        assert await append(store, 6) == [3]
        seen = store.statistics()
        # Event 2 may have been pruned while 4 was the newest.
        assert (seen["oldest"] in (2, 3), seen["latest"], seen["oldest"] + seen["events"]) == (True, 3, 4)
        assert await store.damage() == []
    finally:
        await store.close()
        await other.close()


async def first(events: AsyncIterator[Delivery], number: int) -> list[Delivery]:
    with anyio.fail_after(10):
        return [await anext(events) for _ in range(number)]
