"""Whether a log holds what it says: every event there, readable, and named as its payload names itself.

Through ``read`` alone, so that it works for every store; one that knows more about itself is asked, too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import anyio

from ..encoding import decode
from ..errors import StoreUnavailable
from ..events import StoredEvent, valid_epoch
from . import Bounds, Checkable, EventStore, Evicted, Readable

PAGE_EVENTS: Final = 500
PAGE_BYTES: Final = 1024 * 1024
#: Called with how many events were looked at, of how many.
Progress = Callable[[int, int], None]


class Fault(NamedTuple):
    """Something wrong; ``first`` and ``last`` number the events it is about, ``None`` where it is about the log."""

    what: str
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        if self.first is None:
            return self.what
        events = f"event {self.first}" if self.first == self.last else f"events {self.first} to {self.last}"
        return f"{events}: {self.what}"


class Nobody:
    """A listener that takes nothing, so that a store reads nothing for it that others store."""

    waiting = 1

    def visible(self, events: Sequence[StoredEvent]) -> None: ...
    def missed(self, oldest: int) -> None: ...
    def epoch_changed(self, bounds: Bounds, end: int) -> None: ...


@asynccontextmanager
async def reading(store: EventStore) -> AsyncIterator[None]:
    """Have it open to be read; as it lies there, where it can do that.

    :raises StoreUnavailable: if there is no log.
    """
    if isinstance(store, Readable):
        await store.open_to_read()
    else:
        await store.open(Nobody())
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await store.close()


async def faults(store: EventStore, progress: Progress) -> AsyncGenerator[Fault]:
    """Look at everything in a store that is not open.

    :raises StoreUnavailable: if there is no log.
    """
    damaged = False
    if isinstance(store, Checkable):
        for what in await store.damage():
            damaged = True
            yield Fault(what)
    try:
        async with reading(store):
            async for fault in faults_of_open(store, progress):
                yield fault
    except StoreUnavailable as error:
        if not damaged:
            raise
        yield Fault(str(error))


async def faults_of_open(store: EventStore, progress: Progress) -> AsyncGenerator[Fault]:
    """Look at everything that can be read."""
    bounds = await store.bounds()
    for what in _faults_of_bounds(bounds):
        yield Fault(what)
    position, limit, begun = bounds.oldest - 1, PAGE_EVENTS, bounds.oldest - 1
    while position < bounds.latest:
        progress(position - begun, bounds.latest - begun)
        try:
            page = await store.read(position, limit, PAGE_BYTES)
        except Exception as error:
            if limit > 1:
                limit = max(1, limit // 8)  # Come close to what cannot be read.
                continue
            end = await _end_of_unreadable(store, position, bounds.latest)
            yield Fault(f"cannot be read: {error}", position + 1, end)
            position = end
            continue
        limit = min(PAGE_EVENTS, limit * 2)
        if isinstance(page, Evicted) or not page.events:
            end = page.oldest - 1 if isinstance(page, Evicted) else bounds.latest
            if end <= position:
                yield Fault("the store says that they begin here, and gives none", position + 1, position + 1)
                return
            if end >= (await store.bounds()).oldest:  # Else retention has been here since.
                yield Fault("missing", position + 1, end)
            position = end
            continue
        for event in page.events:
            for what in _faults_of(event, position + 1):
                yield Fault(what, position + 1, position + 1)
            position += 1
    progress(bounds.latest - begun, bounds.latest - begun)


async def _end_of_unreadable(store: EventStore, position: int, latest: int) -> int:
    """The first position behind this one from which something can be read, in few steps however much cannot."""

    async def readable(after: int) -> bool:
        try:
            await store.read(after, 1, 1)
        except Exception:
            return False
        return True

    low, step = position, 1  # From `low`, nothing can be read.
    while low + step < latest and not await readable(low + step):
        low, step = low + step, step * 2
    high = min(low + step, latest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if await readable(middle) else (middle, high)
    return high


def _faults_of_bounds(bounds: Bounds) -> list[str]:
    found = []
    if not 1 <= bounds.oldest <= bounds.latest + 1:
        found.append(f"its oldest event is {bounds.oldest}, its newest {bounds.latest}")
    if not bounds.epochs:
        found.append("it has no epoch")
    for number, link in enumerate(bounds.epochs):
        if not valid_epoch(link.epoch):
            found.append(f"{link.epoch!r} cannot be an epoch")
        if link.epoch in {other.epoch for other in bounds.epochs[:number]}:
            found.append(f"epoch {link.epoch} began twice")
    return found


def _faults_of(event: StoredEvent, number: int) -> list[str]:
    if event.seq != number:
        return [f"it is found where event {number} should be, as number {event.seq}"]
    try:
        body = decode(event.payload)
        raw = b"\n" in event.payload or b"\r" in event.payload
    except (ValueError, TypeError, RecursionError) as error:
        return [f"its payload is not JSON: {error}"]
    if not isinstance(body, dict):
        return ["its payload is not a JSON object"]
    found = ["a line break in its payload would break its frame"] if raw else []
    for name, said in (("id", event.id), ("type", event.type)):
        if body.get(name) != said:
            found.append(f"its {name} is {said!r}, but its payload says {body.get(name)!r}")
    if event.scope not in ("instance", "global"):
        found.append(f"its scope is {event.scope!r}, neither instance nor global")
    return found
