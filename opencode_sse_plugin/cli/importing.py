"""Putting lines into a log: all of them are checked first, then they are stored in batches, under a new epoch."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import IO, Final, NamedTuple

import anyio

from ..bus import EventBus
from ..errors import InvalidEvent, SSEPluginError, StoreUnavailable
from ..events import StoredEvent
from ..ids import event_ids
from ..log import Log
from ..overflow import Limits
from ..plugins import Plugins
from ..publisher import Publisher
from ..settings import Settings
from ..stores import EventStore, Replaceable
from ..stores.verifying import PAGE_BYTES, PAGE_EVENTS, Nobody, Progress
from .lines import read_line

#: How much longer than its event a line may be: other programs escape more than we do.
_ESCAPED: Final = 6


class BadLine(SSEPluginError):
    """A line that is no event; nothing was stored."""


class Imported(NamedTuple):
    """What became of the lines."""

    lines: int
    imported: int
    duplicates: int
    dropped: int
    epoch: str
    first: int | None
    last: int | None


class _Batch(NamedTuple):
    events: list[StoredEvent]
    dropped: int
    #: The last line it was made of.
    line: int


@contextmanager
def opened_lines(path: Path | None) -> Iterator[IO[bytes]]:
    """A file that can be read twice: the one at ``path``, or what standard input has."""
    if path is not None and path != Path("-"):
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        copyfileobj(sys.stdin.buffer, copy)
        yield copy


async def bring_in(bus: EventBus, lines: IO[bytes], from_line: int, progress: Progress) -> Imported:
    """Check all lines, then store those from one on.

    :param bus: not started; it has the store, the settings and the plugins.
    :raises BadLine: naming line and what would be right; nothing was stored.
    :raises StoreUnavailable: saying up to which line they were stored.
    """
    store, settings = bus.store, bus.settings
    log = Log(store, Limits(settings.queue_max, settings.queue_max_bytes), _nothing, _nothing)
    total = 0
    for batch in _batches(lines, from_line, Publisher(log, Plugins(discover=False), settings, event_ids()), settings):
        total = batch.line
    if not total:
        return Imported(0, 0, 0, 0, "", None, None)
    await store.open(Nobody())
    try:
        await _begin_epoch(store)
        done = from_line - 1
        imported = duplicates = dropped = 0
        first = last = None
        try:
            for batch in _batches(lines, from_line, Publisher(log, bus.plugins, settings, event_ids()), settings):
                appended = await store.append(batch.events)
                duplicates += appended.duplicates
                for event, seq in zip(batch.events, appended.seqs, strict=True):
                    if event.seq == seq:
                        first, last = first or seq, seq
                        imported += 1
                dropped += batch.dropped
                done = batch.line
                progress(done, total)
        except BaseException as error:
            said = f"the lines up to {done} are stored, those behind are not: `--from-line {done + 1}` goes on"
            if isinstance(error, Exception):
                raise StoreUnavailable(f"{error}; {said}") from error
            print(f"opencode-sse: stopped; {said}", file=sys.stderr)
            raise
        epoch = (await store.bounds()).epoch
    finally:
        with anyio.CancelScope(shield=True):
            await store.close()
    return Imported(total - from_line + 1, imported, duplicates, dropped, epoch, first, last)


async def _begin_epoch(store: EventStore) -> None:
    """What is imported was another history's: whoever has cursors of that must be told."""
    if isinstance(store, Replaceable):
        await store.begin_epoch()
    elif (await store.bounds()).latest:
        raise StoreUnavailable(f"a {store.kind} store cannot begin an epoch: import into one that is empty")


def _batches(lines: IO[bytes], from_line: int, publisher: Publisher, settings: Settings) -> Iterator[_Batch]:
    """Events ready to be stored, so many at a time. :raises BadLine: naming the first line that is none."""
    lines.seek(0)
    longest = settings.max_event_bytes * _ESCAPED + 4096
    events: list[StoredEvent] = []
    number = size = dropped = 0
    while line := lines.readline(longest):
        number += 1
        if number < from_line or not line.strip():
            continue
        try:
            if len(line) == longest and not line.endswith(b"\n"):
                raise ValueError(f"it is longer than {longest} bytes")
            event = publisher.prepare(read_line(line))
        except (ValueError, InvalidEvent) as error:
            raise BadLine(f"line {number}: {error}") from None
        if event is None:
            dropped += 1
            continue
        events.append(event)
        size += event.size
        if len(events) >= PAGE_EVENTS or size >= PAGE_BYTES:
            yield _Batch(events, dropped, number)
            events, size, dropped = [], 0, 0
    if events or dropped:
        yield _Batch(events, dropped, number)


def _nothing() -> None:
    pass
