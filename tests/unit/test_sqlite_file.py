"""The file of an SQLite store: epochs over crashes, migration, and everything that can be wrong with it."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from opencode_sse_plugin import EpochStart, Filter, StoreUnavailable
from opencode_sse_plugin.bus import EventBus
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.settings import Settings
from opencode_sse_plugin.stores import Evicted, Page, sqlite, sqlite_file, sqlite_log
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.stores.threads import Call
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events

pytestmark = pytest.mark.anyio

ALL = 1 << 40


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SQLiteEventStore]:
    store = SQLiteEventStore(path, **options)
    await store.open(RecordingListener())
    try:
        yield store
    finally:
        await store.close()


async def fill(path: Path, number: int = 3, **options: Any) -> None:
    async with opened(path, **options) as store:
        await store.append(stored_events(number))


async def chain(path: Path, **options: Any) -> tuple[EpochStart, ...]:
    """The epochs that opening finds."""
    async with opened(path, **options) as store:
        return (await store.bounds()).epochs


def untouched(folder: Path) -> dict[str, bytes]:
    """Everything that lies there, but for what SQLite keeps of readers."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(("-shm", "-wal"))}


@contextmanager
def another_process(path: Path, *, lossy: bool = False) -> Iterator[subprocess.Popen[str]]:
    """One that has the log open, has appended two events, and does nothing else until its input ends."""
    program = f"""
import os, sys, anyio, anyio.to_thread
from pathlib import Path
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event

async def main():
    store = SQLiteEventStore(Path({str(path)!r}), lossy={lossy})
    await store.open(RecordingListener())
    await store.append([stored_event(id="evt_" + os.urandom(8).hex()) for _ in range(2)])
    print("ready", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.read)
    await store.close()

anyio.run(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def end_well(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


# Epochs.


async def test_a_killed_process_leaves_events_and_epoch(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    await fill(path, 3)
    before = await chain(path)
    with another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    async with opened(path) as store:
        bounds = await store.bounds()
        assert (bounds.oldest, bounds.latest, bounds.epochs) == (1, 5, before)
        assert await store.append(stored_events(1)) == ([6], 0)


async def test_without_flushing_a_crash_begins_an_epoch_and_a_clean_end_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    await fill(path, 3, lossy=True)
    first = await chain(path, lossy=True)
    assert len(first) == 1
    with another_process(path, lossy=True) as process:
        end_well(process)
    assert await chain(path, lossy=True) == first
    with another_process(path, lossy=True) as process:
        process.kill()
        process.wait()
    async with opened(path, lossy=True) as store:
        bounds = await store.bounds()
        assert bounds.epochs[0] == first[0]
        assert [link.began for link in bounds.epochs] == [0, 7]
        assert bounds.end_of(first[0].epoch) == 7, "an older cursor is good up to where its epoch ended"
        await store.append(stored_events(1))
        assert (await store.bounds()).end_of(first[0].epoch) == 7
        after = (await store.bounds()).epochs
    assert await chain(path, lossy=True) == after


async def test_flushing_now_does_not_forget_that_one_who_did_not_crashed(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with another_process(path, lossy=True) as process:
        process.kill()
        process.wait()
    assert len(await chain(path)) == 2
    assert len(await chain(path)) == 2


async def test_a_crash_beside_others_begins_no_epoch(tmp_path: Path) -> None:
    """The machine goes on, and with it all that was committed."""
    path = tmp_path / "a.db"
    async with opened(path, lossy=True) as store:
        with another_process(path, lossy=True) as process:
            process.kill()
            process.wait()
        with another_process(path, lossy=True) as process:
            end_well(process)
        bounds = await store.bounds()
        assert (bounds.latest, len(bounds.epochs)) == (4, 1)
    assert len(await chain(path, lossy=True)) == 1


async def test_the_chain_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_log, "EPOCHS_MAX", 5)
    path = tmp_path / "a.db"
    async with opened(path) as store:
        for _ in range(8):
            await store.append(stored_events(1))
            await store.begin_epoch()
        bounds = await store.bounds()
    assert [link.began for link in bounds.epochs] == [4, 5, 6, 7, 8]
    assert (await chain(path)) == bounds.epochs


# The schema.


async def test_an_older_schema_is_brought_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    await fill(path, 3)
    step = ("ALTER TABLE events ADD COLUMN note TEXT", "UPDATE events SET note = 'old'")
    monkeypatch.setattr(sqlite_log, "MIGRATIONS", (*sqlite_log.MIGRATIONS, step))
    monkeypatch.setattr(sqlite_file, "MIGRATIONS", sqlite_log.MIGRATIONS)
    await fill(path, 2)
    with closing(sqlite3.connect(path)) as log:
        assert sqlite_log.versions(log) == (sqlite_log.APPLICATION_ID, 2)
        assert log.execute("SELECT note FROM events ORDER BY seq").fetchall() == [("old",)] * 3 + [(None,)] * 2


async def test_a_migration_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    await fill(path, 3)
    with monkeypatch.context() as patch:
        step = ("DELETE FROM events", "CREATE TABLE nonsense (")
        patch.setattr(sqlite_log, "MIGRATIONS", (*sqlite_log.MIGRATIONS, step))
        patch.setattr(sqlite_file, "MIGRATIONS", sqlite_log.MIGRATIONS)
        with pytest.raises(StoreUnavailable, match=str(path)):
            await fill(path)
    async with opened(path) as store:
        assert (await store.bounds()).latest == 3


async def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    await fill(path)
    with closing(sqlite3.connect(path)) as log:
        log.execute("PRAGMA user_version = 7")
    before = untouched(tmp_path)
    with pytest.raises(StoreUnavailable, match=r"schema has version 7, this program knows 1; a newer"):
        await fill(path)
    assert untouched(tmp_path) == before


async def test_a_file_whose_maker_died_at_once_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as log:
        log.execute("PRAGMA journal_mode = WAL")
    assert path.stat().st_size > 0
    await fill(path)
    (tmp_path / "b.db").touch()
    await fill(tmp_path / "b.db")


# What is not a log.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Dear diary, this is no database. " * 200, "it is not an SQLite database"),
        (b"no", "it is not an SQLite database"),
    ],
)
async def test_a_file_that_is_no_database_is_refused_and_untouched(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(content)
    with pytest.raises(StoreUnavailable, match=said):
        await fill(path)
    assert untouched(tmp_path) == {"a.db": content}


async def test_a_database_of_another_program_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as log:
        log.execute("CREATE TABLE events (id)")
    before = untouched(tmp_path)
    with pytest.raises(StoreUnavailable, match="an SQLite database of another program"):
        await fill(path)
    assert untouched(tmp_path) == before


async def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "missing" / "a.db", "No such file or directory"),
        (tmp_path / "file" / "a.db", "Not a directory"),
        (tmp_path, "it is a folder"),
    ):
        with pytest.raises(StoreUnavailable, match=f"{path}: .*{said}"):
            await fill(path)
    assert sorted(untouched(tmp_path)) == ["file"]


# Damage.


def damage(path: Path) -> None:
    """Overwrite a page in the middle of the events."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096)
        file.write(b"\xff" * 4096)


async def test_a_damaged_page_is_noticed_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    await fill(path, 2000)
    damage(path)
    before = untouched(tmp_path)
    with pytest.raises(StoreUnavailable, match="it is damaged; `opencode-sse store verify`"):
        await fill(path)
    assert untouched(tmp_path) == before


async def test_damage_done_later_is_told_by_whoever_meets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.db"
    await fill(path, 2000)
    async with opened(path) as store:
        damage(path)
        assert isinstance(await store.read(0, 10, ALL), Page)

        async def read_all() -> None:
            for after in range(0, 2000, 100):
                await store.read(after, 100, ALL)

        with pytest.raises(StoreUnavailable, match="it is damaged"):
            await read_all()
        assert isinstance(await store.read(1990, 10, ALL), Page), "the rest stays readable"
        assert await store.append(stored_events(1)) == ([2001], 0)


async def test_a_hole_is_never_stepped_over(tmp_path: Path) -> None:
    """Whoever reads is told that something is missing, as if it had been evicted."""
    path = tmp_path / "a.db"
    await fill(path, 10)
    with closing(sqlite3.connect(path)) as log, log:
        log.execute("DELETE FROM events WHERE seq IN (4, 5)")
    async with opened(path) as store:
        page = await store.read(0, 100, ALL)
        assert isinstance(page, Page)
        assert page.last == 3
        assert await store.read(3, 100, ALL) == Evicted(6)
    settings = Settings(store=f"sqlite:///{path}")
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus, bus.subscribe(Filter(), after=0) as events:
        got = []
        with anyio.fail_after(10):
            while not got or got[-1].cursor != f"{bus.epoch}:10":
                got.append(await anext(events))
    assert [delivery.seq for delivery in got] == [None, 1, 2, 3, None]
    expired = got[-1].event
    assert expired.type == "server.stream.expired"
    assert (expired.properties or {})["next"] == 3


# No room.


def limit_pages(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """Let the database grow to so many pages only."""
    connect = sqlite_file.connect

    def limited(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite_file, "connect", limited)


async def test_a_full_database_refuses_what_does_not_fit_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_pages(monkeypatch, 100)
    async with opened(tmp_path / "a.db") as store:
        stored = 0

        async def append_on() -> None:
            nonlocal stored
            while stored < 1000:
                await store.append(stored_events(10, size=1000))
                stored += 10

        with pytest.raises(StoreUnavailable, match="the database or the disk is full"):
            await append_on()
        assert 100 < stored < 400
        bounds = await store.bounds()
        assert (bounds.oldest, bounds.latest) == (1, stored)
        page = await store.read(0, 1000, ALL)
        assert isinstance(page, Page)
        assert page.last == stored
        writer = store._writer
        assert writer is not None
        # Somebody makes room.
        await writer.do(lambda: writer._log.execute("PRAGMA max_page_count = 10000").fetchall())
        assert (await store.append(stored_events(10, size=1000))).seqs[0] == stored + 1
        assert store.statistics()["bytes"] == (stored + 10) * 1000


async def test_what_fits_is_stored_beside_what_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_pages(monkeypatch, 100)
    async with opened(tmp_path / "a.db") as store:
        refused: list[Exception] = []

        async def publish(size: int) -> None:
            try:
                await store.append(stored_events(1, size=size))
            except StoreUnavailable as error:
                refused.append(error)

        assert store._writer is not None
        stuck = threading.Event()
        store._writer.put(Call(stuck.wait))  # So that all three share a transaction.
        async with anyio.create_task_group() as group:
            for size in (1000, 1_000_000, 1000):
                group.start_soon(publish, size)
            await anyio.wait_all_tasks_blocked()
            stuck.set()
        assert len(refused) == 1
        assert (await store.bounds()).latest == 2


def test_a_disk_that_takes_no_more_is_told_and_survived(tmp_path: Path) -> None:
    """The system itself refuses the write: files of this process may have 300 kB."""
    program = f"""
import signal, resource, anyio
from pathlib import Path
from opencode_sse_plugin import StoreUnavailable
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_events

async def main():
    store = SQLiteEventStore(Path({str(tmp_path / "a.db")!r}))
    told = RecordingListener()
    await store.open(told)
    stored = 0
    try:
        for _ in range(1000):
            await store.append(stored_events(10, size=1000))
            stored += 10
    except StoreUnavailable as error:
        print(error)
    bounds = await store.bounds()
    assert (bounds.oldest, bounds.latest) == (1, stored), bounds
    assert told.seqs == list(range(1, stored + 1))
    assert (await store.read(stored - 1, 10, 10000)).last == stored
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (await store.append(stored_events(1))).seqs == [stored + 1]
    await store.close()
    print(stored)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
anyio.run(main)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY, "a hard limit on the size of files"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, stored = done.stdout.splitlines()
    assert "the disk gave an error" in said or "is full" in said
    assert int(stored) > 50


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    """One of a mebibyte, mounted there."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full file system. It takes root on Linux, who may mount one: sudo make test")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full file system. Root may not mount one here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


async def test_a_full_file_system_is_told_and_survived(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with small_file_system(folder):
        ballast = folder / "ballast"
        ballast.write_bytes(b"x" * 300_000)
        async with opened(folder / "a.db") as store:
            stored = 0

            async def append_on() -> None:
                nonlocal stored
                while stored < 2000:
                    await store.append(stored_events(10, size=1000))
                    stored += 10

            with pytest.raises(StoreUnavailable, match=r"is full|the disk gave an error"):
                await append_on()
            assert 50 < stored < 1000
            page = await store.read(0, 1000, ALL)
            assert isinstance(page, Page)
            assert (page.last, (await store.bounds()).latest) == (stored, stored)
            ballast.unlink()
            assert (await store.append(stored_events(10, size=1000))).seqs[0] == stored + 1
        async with opened(folder / "a.db") as store:
            assert (await store.bounds()).latest == stored + 10


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    """By somebody who is not root, since root may write everywhere."""
    folder = tmp_path / "mine"
    folder.mkdir()
    anyio.run(fill, folder / "a.db")
    program = f"""
import os, anyio
from pathlib import Path
from opencode_sse_plugin import StoreUnavailable
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing.samples import RecordingListener

async def main():
    for name in ("a.db", "new.db"):
        try:
            await SQLiteEventStore(Path(name)).open(RecordingListener())
        except StoreUnavailable as error:
            print(error)

os.chdir({str(folder)!r})
if os.geteuid() == 0:
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
anyio.run(main)
"""
    before = untouched(folder)
    try:
        (folder / "a.db").chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert untouched(folder) == before
    finally:
        folder.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    old, new = done.stdout.splitlines()
    assert old.startswith("event store a.db: ")
    assert new.startswith("event store new.db: ")
    for said in (old, new):
        assert "ermission denied" in said or "may we use it" in said or "read-only" in said


# Locks.


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program is in the middle of a transaction."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


async def test_a_locked_log_can_be_read_and_is_written_when_the_lock_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_GRACE", 60.0)  # The lock is to be waited for so long, not the disk.
    path = tmp_path / "a.db"
    async with opened(path, patience=0.3) as store:
        await store.append(stored_events(2))
        with locked(path):
            with pytest.raises(StoreUnavailable, match="another program keeps it locked"):
                await store.append(stored_events(1))
            page = await store.read(0, 10, ALL)
            assert isinstance(page, Page)
            assert page.last == 2
            assert (await store.bounds()).latest == 2
        assert await store.append(stored_events(1)) == ([3], 0)


async def test_a_short_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with opened(path) as store, anyio.create_task_group() as group:
        with locked(path):
            group.start_soon(store.append, stored_events(1))
            await anyio.sleep(0.1)
            assert (await store.bounds()).latest == 0
    async with opened(path) as store:
        assert (await store.bounds()).latest == 1


async def test_a_log_that_is_locked_altogether_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    await fill(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("UPDATE log SET head = head")
        with pytest.raises(StoreUnavailable, match="another program keeps it locked"):
            await fill(path, patience=0.3)
    await fill(path)


# Through the bus.


async def test_a_bus_over_a_full_log_refuses_publishes_and_keeps_its_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_pages(monkeypatch, 60)
    settings = Settings(store=f"sqlite:///{tmp_path / 'a.db'}")
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus, bus.subscribe(Filter()) as events:
        await anext(events)
        published = 0

        async def publish_on() -> None:
            nonlocal published
            while published < 1000:
                await bus.publish("test.event", {"pad": "x" * 1000})
                published += 1

        with pytest.raises(StoreUnavailable, match="is full"):
            await publish_on()
        with anyio.fail_after(10):
            assert [(await anext(events)).seq for _ in range(published)] == list(range(1, published + 1))
        writer = bus.store._writer  # type: ignore[attr-defined]
        await writer.do(lambda: writer._log.execute("PRAGMA max_page_count = 10000").fetchall())
        assert await bus.publish("test.event") == published + 1
        with anyio.fail_after(10):
            assert (await anext(events)).seq == published + 1


async def test_a_store_that_cannot_be_opened_stops_the_bus(tmp_path: Path) -> None:
    settings = Settings(store=f"sqlite:///{tmp_path / 'missing' / 'a.db'}")
    with pytest.raises(StoreUnavailable, match="No such file"):
        async with EventBus(settings, plugins=Plugins(discover=False)):
            pass


async def test_known_names_are_text_a_person_can_read(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with opened(path) as store:
        await store.append([stored_event(id="evt_1", type="test.type")])
    with closing(sqlite3.connect(path)) as log:
        assert log.execute("SELECT seq, id, type FROM events").fetchall() == [(1, "evt_1", "test.type")]
