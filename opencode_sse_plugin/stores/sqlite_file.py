"""The file behind ``sqlite://``: opening it without touching what is not ours, waiting for others, and what its errors
mean."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from random import uniform
from typing import Final, Literal, TypeVar

from ..errors import StoreUnavailable
from .sqlite_log import APPLICATION_ID, MIGRATIONS, add_epoch, migrate, versions

if sys.platform != "win32":
    import fcntl

Result = TypeVar("Result")

#: How long opening may look for damage, in seconds.
_LOOK: Final = 1.0
_OPS: Final = 10_000

_MEANING: Final = {
    "SQLITE_NOTADB": "it is not an SQLite database",
    "SQLITE_CORRUPT": "it is damaged; `opencode-sse store verify` says where",
    "SQLITE_FULL": "the database or the disk is full",
    "SQLITE_BUSY": "another program keeps it locked",
    "SQLITE_LOCKED": "another program keeps it locked",
    "SQLITE_CANTOPEN": "it cannot be opened; is there such a folder, and may we use it?",
    "SQLITE_READONLY": "it is read-only",
    "SQLITE_IOERR": "the disk gave an error",
}


def unavailable(path: Path, error: Exception) -> StoreUnavailable:
    """What an error means, for whoever wanted something of the store."""
    if isinstance(error, StoreUnavailable):
        return error
    name = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
    meaning = _MEANING.get(name)
    said = getattr(error, "strerror", None) or error
    return StoreUnavailable(f"event store {path}: {said if meaning is None else f'{meaning} ({said})'}")


def is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else is at it just now."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def connect(path: Path, mode: Literal["ro", "rwc"], *, timeout: float = 0.0) -> sqlite3.Connection:
    """Open the file; transactions are begun and ended by hand."""
    # Connections move between threads only while they are opened; each is used by one.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
    )


def patiently(attempt: Callable[[], Result], deadline: float, meanwhile: Callable[[], None] = lambda: None) -> Result:
    """Try until nobody else is at it. SQLite's own waiting lets a writer starve beside busy ones.

    :raises sqlite3.Error: as the attempt does, where that is not the reason, and once the deadline is over.
    """
    while True:
        try:
            return attempt()
        except sqlite3.Error as error:
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
        meanwhile()
        time.sleep(uniform(0.0002, 0.001))


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What was begun is committed, or rolled back where something fails."""
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


class Presence:
    """Says who has the log open, by a lock on a file beside it that the system drops with the process.

    Beside it: on the database itself, closing our handle would drop the locks that SQLite holds there.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(f"{path}-open", os.O_RDWR | os.O_CREAT, 0o666)

    def enter(self, deadline: float) -> bool:
        """Take part; whether nobody else does. Then others that come wait until :meth:`settle`."""
        while not self.alone():
            if self._lock(exclusive=False):
                return False
            if time.monotonic() >= deadline:
                raise TimeoutError("another process is opening it")
            time.sleep(0.001)
        return True

    def alone(self) -> bool:
        """Whether nobody else takes part."""
        return self._lock(exclusive=True)

    def settle(self) -> None:
        """Let others in."""
        while not self._lock(exclusive=False):
            time.sleep(0.001)  # Changing a lock is not atomic: another one opens it just now.

    def leave(self) -> None:
        """Take part no longer."""
        os.close(self._file)

    def _lock(self, *, exclusive: bool) -> bool:
        if sys.platform == "win32":
            return exclusive  # Every start may then be after a crash, which costs no more than an epoch.
        try:
            fcntl.flock(self._file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def open_log(path: Path, *, lossy: bool, patience: float) -> tuple[sqlite3.Connection, Presence]:
    """Open the log, or make it where there is none.

    :param lossy: whether commits may be lost when the machine dies.
    :raises StoreUnavailable: if it cannot be had, or is not ours; then nothing was touched.
    """
    deadline = time.monotonic() + patience
    try:
        _look(path, deadline)
        presence = Presence(path)
        try:
            alone = presence.enter(deadline)
            if alone:
                _look_for_damage(path)
            connection = connect(path, "rwc")
            try:
                _prepare(connection, deadline, alone=alone, lossy=lossy)
            except BaseException:
                connection.close()
                raise
            presence.settle()
        except BaseException:
            presence.leave()
            raise
    except (sqlite3.Error, OSError) as error:
        raise unavailable(path, error) from error
    return connection, presence


def open_to_read(path: Path, patience: float) -> sqlite3.Connection:
    """Open a log that is there, and only read it.

    :raises StoreUnavailable: if there is none, or one that is older or newer than this program.
    """
    try:
        version = _look(path, time.monotonic() + patience)
        if version == 0:
            raise StoreUnavailable(f"event store {path}: there is no such log")
        if version < len(MIGRATIONS):
            raise StoreUnavailable(
                f"event store {path}: its schema has version {version}, this program reads {len(MIGRATIONS)}; "
                "whoever opens it to write, as `opencode-sse serve` does, brings it up to date"
            )
        return connect(path, "ro", timeout=patience)
    except (sqlite3.Error, OSError) as error:
        raise unavailable(path, error) from error


def integrity(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with the whole file; it reads all of it."""
    found = [row[0] for row in connection.execute("PRAGMA integrity_check(20)")]
    return [] if found == ["ok"] else [_one_line(text) for text in found]


def _look(path: Path, deadline: float) -> int:
    """Refuse what is not ours, before anything is written.

    :return: the version of its schema; 0 where there is none yet. :raises StoreUnavailable: saying what it is.
    """
    if path.is_dir():
        raise StoreUnavailable(f"event store {path}: it is a folder")
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with closing(connect(path, "ro")) as connection:
        application, version = patiently(lambda: versions(connection), deadline)
        if application == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            return 0  # Somebody who made it did not get far.
    if application != APPLICATION_ID:
        raise StoreUnavailable(f"event store {path}: it is an SQLite database of another program")
    if version > len(MIGRATIONS):
        raise StoreUnavailable(
            f"event store {path}: its schema has version {version}, this program knows {len(MIGRATIONS)}; "
            "a newer opencode-sse-plugin wrote it"
        )
    return version


def _look_for_damage(path: Path) -> None:
    """Look at as much of the file as a second allows. :raises StoreUnavailable: if a part of it is damaged."""
    if not path.exists() or path.stat().st_size == 0:
        return
    until = time.monotonic() + _LOOK
    with closing(connect(path, "ro")) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > until, _OPS)
        try:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                return
            raise
    if found != "ok":
        raise StoreUnavailable(f"event store {path}: {_MEANING['SQLITE_CORRUPT']} ({_one_line(found)})")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prepare(connection: sqlite3.Connection, deadline: float, *, alone: bool, lossy: bool) -> None:
    patiently(lambda: connection.execute("PRAGMA journal_mode = WAL"), deadline)
    connection.execute("PRAGMA journal_size_limit = 67108864")
    # Whoever may lose commits says so first, and that must not get lost.
    connection.execute("PRAGMA synchronous = FULL")
    patiently(lambda: connection.execute("BEGIN IMMEDIATE"), deadline)
    with transaction(connection):
        migrate(connection)
        head, was_lossy = connection.execute("SELECT head, lossy FROM log").fetchone()
        if connection.execute("SELECT count(*) FROM epochs").fetchone()[0] == 0:
            add_epoch(connection, 0)
        elif was_lossy and alone:
            add_epoch(connection, head)
        if lossy or (was_lossy and alone):
            connection.execute("UPDATE log SET lossy = ?", (int(lossy),))
    if lossy:
        connection.execute("PRAGMA synchronous = NORMAL")


def close_log(connection: sqlite3.Connection, presence: Presence) -> None:
    """Close it; the last one says that nothing can be lost any more."""
    with suppress(sqlite3.Error):
        if presence.alone():
            connection.execute("UPDATE log SET lossy = 0 WHERE lossy")
    with suppress(sqlite3.Error):
        connection.close()
    presence.leave()
