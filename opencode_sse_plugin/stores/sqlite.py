"""``sqlite:///path``: a log in one SQLite file, shared by all processes of a machine that open it.

``sqlite:///relative.db``, ``sqlite:////absolute.db``. With ``?synchronous=normal`` commits are not flushed to the disk:
several times faster, and what was acknowledged last may be gone when the machine (not the process) dies.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio

from ..errors import ConfigurationError, StoreUnavailable
from ..events import StoredEvent
from ..settings import Settings
from ..wakeup import call_soon, thread_safe_call_soon
from . import (
    DURABLE_RETENTION,
    Appended,
    Awaited,
    Bounds,
    Evicted,
    Page,
    Retention,
    StoreListener,
    Submission,
    retention_of,
)
from .sqlite_file import integrity, open_to_read, transaction, unavailable
from .sqlite_log import Extent, contradictions, extent, read_bounds, read_page
from .sqlite_writer import Options, Writer
from .threads import Worker

Result = TypeVar("Result")

#: How much longer than its patience an append waits for the thread to answer, in seconds.
_GRACE: Final = 1.0


class SQLiteEventStore:
    """Acknowledges and shows what is committed; the newest events within ``retention`` are kept, and a little more
    until they are pruned.

    :param lossy: whether commits may be lost when the machine dies (``synchronous=normal``).
    :param patience: how long to wait for another process that writes, in seconds.
    :param now: seconds since 1970, by which events grow old.
    """

    kind = "sqlite"

    def __init__(
        self,
        path: Path,
        retention: Retention = DURABLE_RETENTION,
        *,
        lossy: bool = False,
        patience: float = 5.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.retention = retention
        self._options = Options(path, retention, lossy, patience, now)
        self._writer: Writer | None = None
        self._reader: _Reader | None = None
        self._looked: Extent | None = None

    async def open(self, listener: StoreListener) -> Bounds:
        soon = thread_safe_call_soon()
        with anyio.CancelScope(shield=True):  # Half opened, it could not be closed.
            writer = Writer(self._options, listener, soon, call_soon())
            try:
                bounds = await writer.start()
            except BaseException:
                await writer.stop(self._options.patience)
                raise
            self._writer, self._reader = writer, _Reader(self._options, soon)
        return bounds

    async def open_to_read(self) -> Bounds:
        """As it lies there: no file, no schema and no epoch is made.

        :raises StoreUnavailable: if there is no log.
        """
        self._reader = reader = _Reader(self._options, thread_safe_call_soon())
        try:
            self._looked = await reader.extent()
            return await reader.bounds()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close()
            raise

    async def close(self) -> None:
        writer, reader = self._writer, self._reader
        self._writer = self._reader = self._looked = None
        if reader is not None:
            await reader.stop(self._options.patience)
        if writer is not None:
            await writer.stop(self._options.patience)

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        writer = self._open_writer()
        if not events:
            return Appended([], 0)
        submission = Awaited(events)
        writer.submit(submission)
        with anyio.move_on_after(self._options.patience + _GRACE):
            return await submission.outcome()
        raise StoreUnavailable(f"event store {self.path}: no answer in time; whether it was stored is not known")

    def submit(self, submission: Submission) -> None:
        """As :meth:`append`; see :class:`.GroupingStore`."""
        writer = self._writer or self._open_writer()
        writer.submit(submission)

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return await self._open_reader().page(after, limit, max_bytes)

    async def bounds(self) -> Bounds:
        return await self._open_reader().bounds()

    async def begin_epoch(self, end: int | None = None) -> None:
        """Lose all history beyond ``end``, by default none, and go on under a new epoch."""
        await self._open_writer().begin_epoch(end)

    async def prune(self) -> None:
        """Delete all that is beyond retention now."""
        await self._open_writer().prune()

    async def damage(self) -> list[str]:
        """What SQLite finds wrong with the file, and where its tables contradict each other; it reads all of it."""
        reader = _Reader(self._options, thread_safe_call_soon())
        try:
            return await reader.damage()
        finally:
            with anyio.CancelScope(shield=True):
                await reader.stop(self._options.patience)

    def statistics(self) -> dict[str, int]:
        """Bounds, events and bytes, as this process saw them last."""
        oldest, latest, size = self._looked if self._looked is not None else self._open_writer().seen
        return {"oldest": oldest, "latest": latest, "events": latest - oldest + 1, "bytes": size}

    def _open_writer(self) -> Writer:
        if self._writer is None:
            raise StoreUnavailable(f"event store {self.path} is not open")
        return self._writer

    def _open_reader(self) -> _Reader:
        if self._reader is None:
            raise StoreUnavailable(f"event store {self.path} is not open")
        return self._reader


class _Reader(Worker):
    """A thread for pages and bounds, so that replay does not wait for commits, nor they for it."""

    def __init__(self, options: Options, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._options = options
        self._connection: sqlite3.Connection | None = None
        super().__init__(f"opencode-sse {options.path.name} reader", call_soon)

    async def page(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return await self.do(lambda: self._reading(lambda log: read_page(log, after, limit, max_bytes)))

    async def bounds(self) -> Bounds:
        return await self.do(lambda: self._reading(lambda log: _at_once(log, read_bounds)))

    async def extent(self) -> Extent:
        return await self.do(lambda: self._reading(extent))

    async def damage(self) -> list[str]:
        return await self.do(lambda: self._reading(_damage))

    def _reading(self, read: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            if self._connection is None:
                self._connection = open_to_read(self._options.path, self._options.patience)
            return read(self._connection)
        except sqlite3.Error as error:
            raise unavailable(self._options.path, error) from error

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _at_once(log: sqlite3.Connection, read: Callable[[sqlite3.Connection], Result]) -> Result:
    """Read with several statements that see the same."""
    log.execute("BEGIN")
    with transaction(log):
        return read(log)


def _damage(log: sqlite3.Connection) -> list[str]:
    try:
        return integrity(log) or _at_once(log, contradictions)
    except sqlite3.DatabaseError as error:
        return [str(error)]


def open_sqlite(url: str, settings: Settings) -> SQLiteEventStore:
    """Make the store of a URL with the retention of the settings.

    :raises ConfigurationError: if the URL makes no sense.
    """
    parts = urlsplit(url)
    path = unquote(parts.path[1:])
    if parts.netloc or not path or path == ":memory:" or parts.fragment:
        raise ConfigurationError(f"{url!r} names no file; sqlite:///relative.db and sqlite:////absolute.db do")
    lossy = False
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name != "synchronous" or value not in ("full", "normal"):
            raise ConfigurationError(f"{url!r}: sqlite:// takes ?synchronous=full or normal, not {name}={value}")
        lossy = value == "normal"
    retention = retention_of(settings, DURABLE_RETENTION)
    return SQLiteEventStore(Path(path), retention, lossy=lossy, patience=settings.publish_deadline)
