"""What an SQLite log holds: its tables, and what is done with them inside of a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import cache
from itertools import chain
from typing import Any, Final, NamedTuple

from ..events import StoredEvent
from ..ids import new_epoch
from . import KNOWN_MAX, Appended, Bounds, EpochStart, Evicted, Page, Retention

APPLICATION_ID: Final = 0x6F637365  # "ocse"
#: Each step leads from one schema version to the next; a new file takes all of them.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # `lossy` is set while somebody writes who would lose commits if the machine died.
        "CREATE TABLE log (head INTEGER NOT NULL, bytes INTEGER NOT NULL, lossy INTEGER NOT NULL, "
        "pruner TEXT, pruner_until INTEGER NOT NULL)",
        "INSERT INTO log VALUES (0, 0, 0, NULL, 0)",
        "CREATE TABLE epochs (number INTEGER PRIMARY KEY, epoch TEXT NOT NULL, began INTEGER NOT NULL)",
        # Names are text, or where they hold lone surrogates, bytes; `odd` says that one of them is.
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, odd INTEGER NOT NULL, id NOT NULL, "
        "type NOT NULL, session, directory, project, workspace, scope TEXT NOT NULL, payload BLOB NOT NULL)",
        "CREATE INDEX events_id ON events (id)",
    ),
)
#: The chain keeps so many epochs; a cursor of one before them is of a history that is not known any more.
EPOCHS_MAX: Final = 100
#: Pruning deletes at most so much in one transaction.
_PRUNE_EVENTS: Final = 500
_PRUNE_BYTES: Final = 4 * 1024 * 1024
#: For how long the one process that prunes keeps the others from it, in milliseconds.
_LEASE: Final = 5000
#: How many ids one statement looks for; a few sizes, so that their statements stay prepared.
_LOOKUPS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)

_PAGE: Final = (
    "SELECT seq, id, type, session, directory, project, workspace, scope, payload, odd FROM events "
    "WHERE seq > ? ORDER BY seq LIMIT ?"
)
_INSERT: Final = (
    "INSERT INTO events (seq, at, odd, id, type, session, directory, project, workspace, scope, payload) VALUES "
)
#: So many rows in one statement: each step gives up the interpreter's lock, and must have it again.
_ROWS: Final = 50


class Extent(NamedTuple):
    """Oldest and newest number, and payload bytes; an empty log has ``oldest == head + 1``."""

    oldest: int
    head: int
    bytes: int


class Inserted(NamedTuple):
    """What became of batches.

    :param appended: for each of them. :param fresh: the events that are new; the last one is now the newest.
    """

    appended: list[Appended]
    fresh: Sequence[StoredEvent]
    extent: Extent


# The file as a whole.


def versions(connection: sqlite3.Connection) -> tuple[int, int]:
    """Whose file it is, and the version of its schema."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return application, version


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema to the newest version."""
    version = versions(connection)[1]
    for step in MIGRATIONS[version:]:
        for statement in step:
            connection.execute(statement)
    if version < len(MIGRATIONS):
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def extent(connection: sqlite3.Connection) -> Extent:
    """What is stored now."""
    head, size, oldest = connection.execute("SELECT head, bytes, (SELECT min(seq) FROM events) FROM log").fetchone()
    return Extent(head + 1 if oldest is None else oldest, head, size)


def read_bounds(connection: sqlite3.Connection) -> Bounds:
    """What is stored now, with the chain."""
    oldest, head, _ = extent(connection)
    chain = connection.execute("SELECT epoch, began FROM epochs ORDER BY number")
    return Bounds(oldest, head, tuple(EpochStart(*link) for link in chain))


# Epochs.


def add_epoch(connection: sqlite3.Connection, began: int) -> None:
    """Put a new epoch behind the chain."""
    number = connection.execute(
        "INSERT INTO epochs (epoch, began) VALUES (?, ?) RETURNING number", (new_epoch(), began)
    ).fetchone()[0]
    connection.execute("DELETE FROM epochs WHERE number <= ?", (number - EPOCHS_MAX,))


def newest_epoch(connection: sqlite3.Connection) -> int:
    """Which link of the chain is the last."""
    number: int = connection.execute("SELECT max(number) FROM epochs").fetchone()[0]
    return number


def end_after(connection: sqlite3.Connection, number: int) -> int:
    """Up to where numbers still mean what they meant under a link of the chain that is not the last."""
    end: int = connection.execute("SELECT min(began) FROM epochs WHERE number > ?", (number,)).fetchone()[0]
    return end


def cut(connection: sqlite3.Connection, end: int | None) -> None:
    """Lose all history beyond ``end``, by default none, and begin a new epoch."""
    _, head, size = extent(connection)
    end = head if end is None else min(end, head)
    lost = connection.execute("SELECT coalesce(sum(length(payload)), 0) FROM events WHERE seq > ?", (end,))
    connection.execute("UPDATE log SET head = ?, bytes = ?", (end, size - lost.fetchone()[0]))
    connection.execute("DELETE FROM events WHERE seq > ?", (end,))
    add_epoch(connection, end)


# Reading.


def read_page(connection: sqlite3.Connection, after: int, limit: int, max_bytes: int) -> Page | Evicted:
    """One page, found by index and read in one statement, whose view of the log does not change."""
    events: list[StoredEvent] = []
    size = 0
    with closing(connection.execute(_PAGE, (after, limit))) as rows:
        for row in rows:
            if row[0] != after + 1 + len(events):
                if events:
                    break  # A hole, which only damage can make: the next page says so.
                return Evicted(row[0])
            size += len(row[8])
            if events and size > max_bytes:
                break
            events.append(StoredEvent(*(_named(row) if row[9] else row[:9])))
    if events:
        return Page(events, events[-1].seq)
    # Something may have been stored between the two statements, and then nothing is missing before it.
    oldest = extent(connection).oldest
    return Evicted(oldest) if after < oldest - 1 else Page([], after)


def _named(row: tuple[Any, ...]) -> list[Any]:
    """A row with names as bytes, as it was given."""
    names = [name.decode("utf-8", "surrogatepass") if isinstance(name, bytes) else name for name in row[:8]]
    return [*names, row[8]]


def contradictions(connection: sqlite3.Connection) -> list[str]:
    """What the table of events says otherwise than the row about it."""
    found = []
    head, size = connection.execute("SELECT head, bytes FROM log").fetchone()
    newest, held = connection.execute("SELECT max(seq), coalesce(sum(length(payload)), 0) FROM events").fetchone()
    if newest is not None and newest > head:
        found.append(f"its head is {head}, but there is an event {newest}")
    if held != size:
        found.append(f"it says that its events have {size} bytes, but they have {held}")
    return found


# Writing.


def insert(
    connection: sqlite3.Connection, batches: Sequence[Sequence[StoredEvent]], at: int, before: Extent | None = None
) -> Inserted:
    """Store what is not known.

    :param at: now, in milliseconds since 1970. :param before: what is stored now, where that is known.
    """
    oldest, head, size = before or extent(connection)
    fresh: Sequence[StoredEvent] = list(chain.from_iterable(batches))
    seqs = list(range(head + 1, head + 1 + len(fresh)))
    doubtful = [_stored(event.id) for event in fresh if not event.unseen or event.seq]
    if doubtful:
        seqs, fresh = _numbered(fresh, head, _known(connection, doubtful, head))
    first = head + 1
    for start in range(0, len(fresh), _ROWS):
        row: list[object] = []
        for seq, event in enumerate(fresh[start : start + _ROWS], first + start):
            row += _row(seq, at, event)
        connection.execute(_insert_statement(min(_ROWS, len(fresh) - start)), row)
    size += sum([len(event.payload) for event in fresh])
    head += len(fresh)
    connection.execute("UPDATE log SET head = ?, bytes = ?", (head, size))
    appended: list[Appended] = []
    place, newest = 0, first - 1
    for batch in batches:
        answer = seqs[place : place + len(batch)]
        place += len(batch)
        duplicates = 0
        if doubtful:
            duplicates = len(batch) - len({seq for seq in answer if seq > newest})
            newest = max(newest, *answer)
        appended.append(Appended(answer, duplicates))
    return Inserted(appended, fresh, Extent(oldest, head, size))


def _numbered(
    events: Sequence[StoredEvent], head: int, known: dict[tuple[object, ...], int]
) -> tuple[list[int], list[StoredEvent]]:
    """A number for each, and those that are new."""
    seqs: list[int] = []
    fresh: list[StoredEvent] = []
    for event in events:
        name = (_stored(event.id), _stored(event.type))
        seq = known.get(name)
        if seq is None:
            known[name] = seq = head + 1 + len(fresh)
            fresh.append(event)
        seqs.append(seq)
    return seqs, fresh


@cache
def _insert_statement(rows: int) -> str:
    return _INSERT + ",".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * rows)


def _known(
    connection: sqlite3.Connection, doubtful: Iterable[str | bytes | None], head: int
) -> dict[tuple[object, ...], int]:
    """Which (id, type) with one of these ids are among the newest, and their numbers."""
    found: dict[tuple[object, ...], int] = {}
    ids = list(dict.fromkeys(doubtful))
    while ids:
        size = next((size for size in _LOOKUPS if size >= len(ids) > size // 2), _LOOKUPS[-1])
        asked, ids = ids[:size], ids[size:]
        marks = ",".join("?" * size)
        rows = connection.execute(
            f"SELECT id, type, seq FROM events WHERE id IN ({marks}) AND seq > ?",
            (*asked, *[None] * (size - len(asked)), head - KNOWN_MAX),
        )
        found.update(((id, type), seq) for id, type, seq in rows)
    return found


def _row(seq: int, at: int, event: StoredEvent) -> tuple[object, ...]:
    id, type, session = event.id, event.type, event.session
    directory, project, workspace = event.directory, event.project, event.workspace
    if f"{id}{type}{session}{directory}{project}{workspace}".isascii():
        return (seq, at, False, id, type, session, directory, project, workspace, event.scope, event.payload)
    stored = tuple(map(_stored, (id, type, session, directory, project, workspace)))
    odd = any(isinstance(name, bytes) for name in stored)
    return (seq, at, odd, *stored, event.scope, event.payload)


def _stored(name: str | None) -> str | bytes | None:
    """A name as the table holds it."""
    if name is None or name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")
    return name


def is_older(connection: sqlite3.Connection, at: int) -> bool:
    """Whether the oldest event was stored before a time, in milliseconds since 1970."""
    oldest = connection.execute("SELECT at FROM events ORDER BY seq LIMIT 1").fetchone()
    return oldest is not None and oldest[0] < at


def prune(connection: sqlite3.Connection, keep: Retention, now: int, pruner: str, *, forced: bool) -> bool | None:
    """Delete a little of what is beyond retention.

    :param now: milliseconds since 1970. :param pruner: who does it. :param forced: whoever else is at it.
    :return: whether something was deleted, and there may be more; ``None`` if another one is at it.
    """
    other, until = connection.execute("SELECT pruner, pruner_until FROM log").fetchone()
    if not forced and other != pruner and until > now:
        return None
    oldest, head, size = extent(connection)
    limit = 0 if keep.age is None else now - int(keep.age * 1000)
    left, gone, last = head - oldest + 1, 0, 0
    for seq, at, length in connection.execute(
        "SELECT seq, at, length(payload) FROM events ORDER BY seq LIMIT ?", (_PRUNE_EVENTS,)
    ).fetchall():
        over = left > 1 and (left > keep.events or size - gone > keep.bytes)
        if not (over or at < limit) or gone >= _PRUNE_BYTES:
            break
        left, gone, last = left - 1, gone + length, seq
    if not last:
        return False
    connection.execute("DELETE FROM events WHERE seq <= ?", (last,))
    connection.execute("UPDATE log SET bytes = ?, pruner = ?, pruner_until = ?", (size - gone, pruner, now + _LEASE))
    return True
