"""``opencode-sse store``: logs looked at, checked, copied, pruned, through SQLite and through a store from outside."""

from __future__ import annotations

import io
import json
import os
import pty
import sqlite3
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from opencode_sse_plugin import Appended, Event, EventBus, Retention, Settings, StoredEvent, StoreUnavailable, hookimpl
from opencode_sse_plugin.cli import main
from opencode_sse_plugin.cli.lines import line_of
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import sqlite_log
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing.contracts.base import contents
from opencode_sse_plugin.testing.contracts.reading import awkward_events
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events

from .test_toy_store import documented

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(capfdbinary: pytest.CaptureFixture[bytes]) -> Said:
    """Run ``opencode-sse store …``: its exit code, output and complaints."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["store", *map(str, arguments)])
        sys.stdout.flush()
        output, errors = capfdbinary.readouterr()
        return code, output.decode(), errors.decode()

    return run


def fill(path: Path, events: Sequence[StoredEvent]) -> None:
    """A log with these events."""

    async def append() -> None:
        log = SQLiteEventStore(path)
        await log.open(RecordingListener())
        for start in range(0, len(events), 1000):
            await log.append(events[start : start + 1000])
        await log.close()

    anyio.run(append)


def held(path: Path) -> list[StoredEvent]:
    """All that is in a log."""

    async def read() -> list[StoredEvent]:
        log = SQLiteEventStore(path)
        await log.open_to_read()
        page = await log.read((await log.bounds()).oldest - 1, 1_000_000, 1 << 40)
        await log.close()
        return list(page.events)  # type: ignore[union-attr]

    return anyio.run(read)


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as log, log:
        log.execute(statement)


def lines(*events: StoredEvent) -> bytes:
    return b"".join(map(line_of, events))


# Info.


def test_info_says_what_a_log_holds(tmp_path: Path, store: Said) -> None:
    fill(tmp_path / "a.db", stored_events(7, size=100))
    code, output, _ = store("info", f"sqlite:///{tmp_path}/a.db", "--json")
    said = json.loads(output)
    assert code == 0
    assert (said["kind"], said["oldest"], said["latest"], said["events"], said["bytes"]) == ("sqlite", 1, 7, 7, 700)
    assert said["epochs"] == [{"epoch": said["epoch"], "began": 0}]
    code, output, _ = store("info", f"sqlite:///{tmp_path}/a.db")
    assert f"epochs     {said['epoch']} after 0\n" in output
    assert "retention  1000000 events, 1073741824 bytes, 604800 s\n" in output


@pytest.mark.parametrize("action", ["info", "verify", "export", "prune"])
def test_where_there_is_no_log_none_is_made(tmp_path: Path, store: Said, action: str) -> None:
    code, output, errors = store(action, f"sqlite:///{tmp_path}/a.db")
    assert (code, output) == (1, "")
    assert errors == f"opencode-sse: event store {tmp_path}/a.db: there is no such log\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["info", "verify", "export"])
def test_looking_changes_nothing(tmp_path: Path, store: Said, action: str) -> None:
    """Not even where opening would begin an epoch, since a process that may lose commits did not end well."""
    path = tmp_path / "a.db"
    fill(path, stored_events(3))
    change(path, "UPDATE log SET lossy = 1")
    before = path.read_bytes()
    assert store(action, f"sqlite:///{path}")[0] == 0
    assert path.read_bytes() == before
    assert not (tmp_path / "a.db-open").exists() or (tmp_path / "a.db-open").read_bytes() == b""


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://", "memory:// is a log inside of the process that serves it"),
        ("nix://x", "no event store for 'nix'; there are"),
        ("events.db", "no event store for 'events.db'; there are"),
        ("sqlite:///", "names no file"),
    ],
)
@pytest.mark.parametrize("action", ["info", "verify", "export", "import", "prune"])
def test_a_store_that_makes_no_sense_is_2_and_named(store: Said, action: str, url: str, said: str) -> None:
    code, output, errors = store(action, url)
    assert (code, output) == (2, "")
    assert said in errors


# Export and import.


def test_what_is_exported_and_imported_is_the_same(tmp_path: Path, store: Said) -> None:
    events = [
        stored_event(event) for event in awkward_events() if "\ud800" not in event.type and "\x00" not in event.type
    ]
    before = contents(events)
    fill(tmp_path / "a.db", [*events, *stored_events(1200)])
    assert store("export", f"sqlite:///{tmp_path}/a.db", "--output", tmp_path / "a.jsonl") == (
        0,
        f"exported {1200 + len(events)} events to {tmp_path}/a.jsonl\n",
        "",
    )
    code, output, errors = store("import", f"sqlite:///{tmp_path}/b.db", tmp_path / "a.jsonl", "--json")
    assert (code, errors) == (0, "")
    done = json.loads(output)
    assert (done["imported"], done["duplicates"], done["first"], done["last"]) == (1200 + len(events), 0, 1, 1207)
    assert contents(held(tmp_path / "b.db"))[: len(events)] == before
    assert contents(held(tmp_path / "b.db")) == contents(held(tmp_path / "a.db"))
    assert [path.name for path in tmp_path.iterdir() if "jsonl" in path.name] == ["a.jsonl"]


def test_an_exported_line_is_an_event_as_clients_get_it(tmp_path: Path, store: Said) -> None:
    event = StoredEvent.encode(Event("a", {"n": 1}, "evt_1", directory="/d", scope="global"))
    fill(tmp_path / "a.db", [event])
    assert store("export", f"sqlite:///{tmp_path}/a.db")[1] == (
        '{"seq":1,"directory":"/d","scope":"global","payload":{"id":"evt_1","type":"a","properties":{"n":1}}}\n'
    )


def test_an_import_begins_an_epoch_behind_what_was_there(tmp_path: Path, store: Said) -> None:
    fill(tmp_path / "a.db", stored_events(3))
    (tmp_path / "in").write_bytes(lines(*stored_events(2)))
    code, output, _ = store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "in")
    said = json.loads(store("info", f"sqlite:///{tmp_path}/a.db", "--json")[1])
    assert (code, output) == (0, f"imported 2 events as 4 to 5, epoch {said['epoch']}\n")
    assert [link["began"] for link in said["epochs"]] == [0, 3]
    # Once more: everything is known.
    code, output, _ = store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "in")
    assert (code, output) == (0, "imported 0 events\n2 were known already\n")


def test_a_running_log_is_exported_up_to_its_head_of_now(tmp_path: Path) -> None:
    """While others go on publishing; what they publish from then on is not waited for."""
    exported: list[tuple[int, bytes]] = []

    async def run() -> None:
        bus = EventBus(Settings(store=f"sqlite:///{tmp_path}/a.db"), plugins=Plugins(discover=False))
        async with bus, anyio.create_task_group() as group:
            for _ in range(6):
                await bus.publish_batch([Event("a") for _ in range(500)])

            async def publish() -> None:
                while True:
                    await bus.publish_batch([Event("a") for _ in range(20)])

            group.start_soon(publish)
            command = [sys.executable, "-m", "opencode_sse_plugin.cli", "store", "export", bus.settings.store]
            for _ in range(2):
                before = bus.head
                done = await anyio.to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, check=True))
                exported.append((before, done.stdout))
                assert done.stderr == b""
            with anyio.fail_after(60):  # They do go on.
                async with bus.subscribe(after=len(exported[1][1].splitlines())) as events:
                    while (await anext(events)).seq is None:
                        pass
            group.cancel_scope.cancel()

    anyio.run(run)
    for before, output in exported:
        seqs = [json.loads(line)["seq"] for line in output.splitlines()]
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) >= before


def test_an_export_that_fails_leaves_no_file(tmp_path: Path, store: Said) -> None:
    fill(tmp_path / "a.db", stored_events(2000))
    change(tmp_path / "a.db", "DELETE FROM events WHERE seq = 1500")
    (tmp_path / "out").write_text("what was there before")
    code, _, errors = store("export", f"sqlite:///{tmp_path}/a.db", "--output", tmp_path / "out")
    assert code == 1
    assert "event 1500 went while the log was exported" in errors
    assert (tmp_path / "out").read_text() == "what was there before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    code, _, errors = store("export", f"sqlite:///{tmp_path}/a.db", "--output", tmp_path / "no" / "out")
    assert code == 1
    assert f"{tmp_path}/no/" in errors


def test_whoever_has_read_enough_of_an_export_may_leave(tmp_path: Path) -> None:
    fill(tmp_path / "a.db", stored_events(3000, size=200))
    command = [sys.executable, "-m", "opencode_sse_plugin.cli", "store", "export", f"sqlite:///{tmp_path}/a.db"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as export:
        assert export.stdout is not None
        assert export.stderr is not None
        assert json.loads(export.stdout.readline())["seq"] == 1
        export.stdout.close()
        assert export.stderr.read() == b""
    assert export.returncode == 1


GOOD = line_of(stored_event(id="evt_good")).decode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it is not JSON"),
        ("[]", 'a line is {"payload": {"id": '),
        ('{"seq":1}', 'a line is {"payload": {"id": '),
        ('{"payload":[]}', 'a line is {"payload": {"id": '),
        ('{"payload":{"type":"a"},"what":1}', "there is no 'what' in a line"),
        ('{"payload":{"properties":{}}}', "an event needs a type"),
        ('{"payload":{"type":""}}', "type must not be empty"),
        ('{"payload":{"type":"server.connected"}}', "cannot be published"),
        ('{"payload":{"type":"a","id":5}}', "id must be a string"),
        ('{"payload":{"type":"a","id":"evt\\n"}}', "without control characters"),
        ('{"payload":{"type":"a","properties":[]}}', "properties must be an object"),
        ('{"payload":{"type":"a"},"directory":5}', "directory must be a string"),
        ('{"payload":{"type":"a"},"scope":"all"}', "scope must be 'instance' or 'global'"),
        ('{"payload":{"type":"a","properties":{"n":NaN}}}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"payload":{"type":"a","properties":{"x":"' + "x" * (1 << 20) + '"}}}', "more than max_event_bytes"),
        ("x" * (7 << 20), "it is longer than"),
        ("\udcff", "it is not JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_stored(tmp_path: Path, store: Said, line: str, said: str) -> None:
    (tmp_path / "in").write_bytes((GOOD * 600 + "\n" + line + "\n" + GOOD).encode("utf-8", "surrogateescape"))
    code, output, errors = store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "in")
    assert (code, output) == (1, "")
    assert errors.startswith("opencode-sse: line 602: ")
    assert said in errors
    assert len(errors) < 1000
    assert not (tmp_path / "a.db").exists()


def test_standard_input_is_imported(tmp_path: Path, store: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ((), ("-",)):
        text = io.TextIOWrapper(io.BytesIO(lines(*stored_events(3))))
        monkeypatch.setattr("sys.stdin", text)
        assert "imported 3 events" in store("import", f"sqlite:///{tmp_path}/a.db", *arguments)[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert store("import", f"sqlite:///{tmp_path}/a.db") == (0, "imported 0 events\n", "")
    assert store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "none")[::2] == (
        1,
        f"opencode-sse: {tmp_path}/none: No such file or directory\n",
    )
    assert store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "none", "--from-line", "0")[0] == 2


# Stores from outside.


class Toy:
    """A plugin whose stores outlive a command, with the store of docs/stores.md."""

    def __init__(self) -> None:
        self.logs: dict[str, Any] = {}
        #: How many appends are taken.
        self.room = 1 << 30

    @hookimpl
    def sse_register_event_stores(self, register: Callable[..., None]) -> None:
        register("toy", self.store)

    @hookimpl
    def sse_event_publish(self, event: Event) -> bool | None:
        return False if event.type == "secret" else None

    def store(self, url: str, settings: Settings) -> Any:
        if url not in self.logs:
            log = self.logs[url] = documented().ListStore(Retention(10_000, 1 << 30))
            append = log.append

            async def limited(events: Sequence[StoredEvent]) -> Appended:
                if not self.room:
                    raise StoreUnavailable("the toy is full")
                self.room -= 1
                appended: Appended = await append(events)
                return appended

            log.append = limited
        return self.logs[url]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    plugin = Toy()
    point = types.SimpleNamespace(name="toy", dist=None, load=lambda: plugin)
    monkeypatch.setattr("opencode_sse_plugin.loading.entry_points", lambda group: [point])
    return plugin


def test_a_store_from_outside_can_all_that_it_offers(tmp_path: Path, store: Said, toy: Toy) -> None:
    fill(tmp_path / "a.db", stored_events(1100))
    assert store("export", f"sqlite:///{tmp_path}/a.db", "--output", tmp_path / "x")[0] == 0
    assert store("import", "toy://a", tmp_path / "x")[1].startswith("imported 1100 events as 1 to 1100, epoch ")
    assert "events     1100\n" in store("info", "toy://a")[1]
    assert store("verify", "toy://a") == (0, "1100 events, nothing wrong\n", "")
    assert store("export", "toy://a", "--output", tmp_path / "y")[0] == 0
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()
    code, _, errors = store("import", "toy://a", tmp_path / "x")
    assert code == 1
    assert "a list store cannot begin an epoch: import into one that is empty" in errors
    code, _, errors = store("prune", "toy://a")
    assert code == 2
    assert "a list store keeps to its retention by itself" in errors


def test_an_import_that_stops_says_where_and_goes_on_there(tmp_path: Path, store: Said, toy: Toy) -> None:
    (tmp_path / "in").write_bytes(lines(*stored_events(1800)))
    toy.room = 2
    code, output, errors = store("import", "toy://a", tmp_path / "in")
    assert (code, output) == (1, "")
    assert (
        "the toy is full; the lines up to 1000 are stored, those behind are not: `--from-line 1001` goes on" in errors
    )
    toy.room = 100
    rest = tmp_path / "b"
    code, output, errors = store("import", f"sqlite:///{rest}", tmp_path / "in", "--from-line", "1001")
    assert (code, output[:27]) == (0, "imported 800 events as 1 to")
    assert [event.id for event in held(rest)] == [
        json.loads(line)["payload"]["id"] for line in (tmp_path / "in").read_bytes().splitlines()[1000:]
    ]


def test_plugins_look_at_what_is_imported(tmp_path: Path, store: Said, toy: Toy) -> None:
    (tmp_path / "in").write_bytes(lines(stored_event(), stored_event(type="secret"), stored_event()))
    code, output, _ = store("import", f"sqlite:///{tmp_path}/a.db", tmp_path / "in")
    assert code == 0
    assert output.startswith("imported 2 events as 1 to 2, epoch ")
    assert output.endswith("\n1 were dropped by a plugin\n")


# Verify.


def test_nothing_is_wrong_with_a_good_log(tmp_path: Path, store: Said) -> None:
    fill(tmp_path / "a.db", [stored_event(event) for event in awkward_events()])
    assert store("verify", f"sqlite:///{tmp_path}/a.db") == (0, f"{len(awkward_events())} events, nothing wrong\n", "")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM events WHERE seq BETWEEN 700 AND 702", "events 700 to 702: missing"),
        ("DELETE FROM events WHERE seq = 1200", "event 1200: missing"),
        ("UPDATE events SET payload = CAST('{\"id\":' AS BLOB) WHERE seq = 5", "event 5: its payload is not JSON"),
        ("UPDATE events SET payload = CAST('[]' AS BLOB) WHERE seq = 5", "event 5: its payload is not a JSON object"),
        ("UPDATE events SET id = 'evt_other' WHERE seq = 9", "event 9: its id is 'evt_other', but its payload says "),
        ("UPDATE events SET type = 'b' WHERE seq = 9", "event 9: its type is 'b', but its payload says 'test.event'"),
        ("UPDATE events SET scope = 'all' WHERE seq = 9", "event 9: its scope is 'all'"),
        ("UPDATE events SET type = CAST(x'ff' AS TEXT) WHERE seq = 600", "event 600: cannot be read: "),
        ("UPDATE log SET head = 1100", "its head is 1100, but there is an event 1200"),
        ("UPDATE log SET bytes = 3", "it says that its events have 3 bytes, but they have "),
        ("INSERT INTO epochs (epoch, began) VALUES ('a b', 5)", "'a b' cannot be an epoch"),
        (
            "UPDATE events SET payload = CAST(replace(CAST(payload AS TEXT), ',', char(10, 44)) AS BLOB) WHERE seq = 5",
            "event 5: a line break in its payload would break its frame",
        ),
    ],
)
def test_what_is_wrong_is_found_and_named(tmp_path: Path, store: Said, statement: str, said: str) -> None:
    fill(tmp_path / "a.db", stored_events(1200))
    change(tmp_path / "a.db", statement)
    code, output, errors = store("verify", f"sqlite:///{tmp_path}/a.db")
    assert (code, errors) == (1, "")
    assert said in output
    assert len(output.splitlines()) <= 2, "one fault is told once, and by SQLite's own books"


def test_damaged_pages_are_found_and_what_they_held_is_named(tmp_path: Path, store: Said) -> None:
    path = tmp_path / "a.db"
    fill(path, stored_events(5000, size=300))
    with closing(sqlite3.connect(path)) as log:
        pages = [
            page for (page,) in log.execute("SELECT pageno FROM dbstat WHERE name = 'events' AND pagetype = 'leaf'")
        ]
    with path.open("r+b") as file:
        for page in (pages[50], pages[51], pages[200]):
            file.seek((page - 1) * 4096)
            file.write(b"\xff" * 4096)
    before = path.read_bytes()
    code, output, _ = store("verify", f"sqlite:///{path}", "--json")
    assert code == 1
    found = json.loads(output)["faults"]
    assert found[0]["first"] is None, "SQLite's own words"
    unreadable = [(fault["first"], fault["last"]) for fault in found if fault["first"] is not None]
    assert len(unreadable) == 2
    per_page = 5000 / len(pages)
    (first, last), (later, latest) = unreadable
    assert 49 * per_page < first < last < 54 * per_page
    assert last - first == pytest.approx(2 * per_page, abs=2)
    assert 198 * per_page < later < latest < 203 * per_page
    assert path.read_bytes() == before


def test_endless_faults_are_not_all_told(tmp_path: Path, store: Said) -> None:
    fill(tmp_path / "a.db", stored_events(1000))
    change(tmp_path / "a.db", "UPDATE events SET payload = CAST('' AS BLOB)")
    code, output, _ = store("verify", f"sqlite:///{tmp_path}/a.db")
    assert code == 1
    assert output.splitlines()[-1] == "stopped after 100 faults"
    assert len(output.splitlines()) == 101


def test_a_file_that_is_no_log_cannot_be_verified(tmp_path: Path, store: Said) -> None:
    (tmp_path / "a.db").write_text("Dear diary, " * 500)
    for action in ("verify", "info", "export"):
        code, output, errors = store(action, f"sqlite:///{tmp_path}/a.db")
        assert (code, output) == (1, "")
        assert "it is not an SQLite database" in errors


def test_an_older_schema_is_left_to_those_who_write(
    tmp_path: Path, store: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "a.db", stored_events(1))
    monkeypatch.setattr("opencode_sse_plugin.stores.sqlite_file.MIGRATIONS", (*sqlite_log.MIGRATIONS, ()))
    code, _, errors = store("info", f"sqlite:///{tmp_path}/a.db")
    assert code == 1
    assert "its schema has version 1, this program reads 2; whoever opens it to write" in errors


# Prune.


def test_pruning_keeps_what_is_asked_for(tmp_path: Path, store: Said) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    fill(tmp_path / "a.db", stored_events(1500, size=100))
    assert store("prune", url) == (0, "deleted 0 events; there are 1500, from 1\n", "")
    assert store("prune", url, "--retain-events", "700")[1] == "deleted 800 events; there are 700, from 801\n"
    assert json.loads(store("prune", url, "--retain-bytes", "5000", "--json")[1]) == {
        "deleted": 650,
        "oldest": 1451,
        "latest": 1500,
    }
    change(tmp_path / "a.db", "UPDATE events SET at = 0 WHERE seq < 1499")
    assert store("prune", url, "--retain-age", "3600")[1] == "deleted 48 events; there are 2, from 1499\n"
    assert store("prune", url, "--retain-events", "0")[0] == 2
    assert store("verify", url)[0] == 0


# Progress.


def test_progress_is_for_terminals(tmp_path: Path) -> None:
    fill(tmp_path / "a.db", stored_events(600))
    command = [sys.executable, "-m", "opencode_sse_plugin.cli", "store", "verify", f"sqlite:///{tmp_path}/a.db"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("600 events, nothing wrong\n", "")
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
        os.close(theirs)
        shown = terminal.read(4096)
    assert done.stdout == "600 events, nothing wrong\n"
    assert b"checked 0 of 600" in shown
    assert shown.endswith(b"\r\x1b[K")
