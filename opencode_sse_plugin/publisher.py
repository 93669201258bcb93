"""From a host's call to the store: plugins, checks, encoding once, and the bounded buffer in front of a store whose
append takes time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self

import anyio

from .errors import BusClosed, InvalidEvent, PublishBufferFull, StoreUnavailable
from .events import Event, Scope, StoredEvent, check_event, check_parts, encode_body, session_of
from .log import Log
from .plugins import Plugins
from .settings import Settings
from .stores import Appended, Submission
from .wakeup import Bell, bells

#: How much longer than its deadline a store may take to say that it failed, in seconds.
_GRACE: Final = 1.0
_DRAINING: Final = "the bus is draining and the store did not answer in time"


class _Pending(Submission):
    """A publish on its way to the store."""

    __slots__ = ("done", "ended", "publisher", "since")

    def __init__(self, publisher: Publisher, events: Sequence[StoredEvent], done: Bell | None, since: float) -> None:
        self.publisher = publisher
        self.events = events
        self.appended = self.error = None
        #: ``None`` where nobody waits (``publish_nowait``).
        self.done = done
        #: When it was published, by the event loop's clock, where somebody might be waited for.
        self.since = since
        #: Whether its publisher knows; after a drain the store may still answer.
        self.ended = False

    def settle(self) -> None:
        self.publisher.settled((self,))

    @classmethod
    def settle_all(cls, submissions: Sequence[Self]) -> None:
        submissions[0].publisher.settled(submissions)


class Publisher:
    """Puts events into the store in call order.

    A store that appends at once is called directly, and one that groups by itself is handed each publish as it comes.
    For any other, and while a subscriber may hold publishers back, all that waits goes into one append, so that many
    publishers share one commit.
    """

    def __init__(self, log: Log, plugins: Plugins, settings: Settings, new_id: Callable[[], str]) -> None:
        self._log = log
        self._plugins = plugins
        self._settings = settings
        self._new_id = new_id
        # At hand, since every publish asks.
        self._publish_hooks = plugins.publish_hooks
        self._published_hooks = plugins.published_hooks
        self._arrivals = log.arrivals
        self._blockers = log.blocking.blockers
        self._max_event_bytes = settings.max_event_bytes
        self._append_now: Any = getattr(log.store, "append_now", None)
        self._submit = getattr(log.store, "submit", None)
        #: What the store was handed, oldest first, and when, by ``time.monotonic``.
        self._submitted: dict[_Pending, float] = {}
        self._buffer: deque[_Pending] = deque()
        self._buffered = 0
        self._new_bell = bells()
        self._more = self._new_bell()
        self._unwatched = self._new_bell()
        self._watched = self._finished = False
        #: Where somebody waits for the buffer to shrink.
        self._less: anyio.Event | None = None
        self.published = self.duplicates = self.vetoed = 0

    @property
    def buffered(self) -> int:
        """Events accepted and not stored yet."""
        return self._buffered

    @property
    def counters(self) -> dict[str, int]:
        """Sums since the start, for status."""
        return {
            "published": self.published,
            "duplicates": self.duplicates,
            "vetoed": self.vetoed,
            "buffered": self._buffered,
        }

    def prepare(self, event: Event, index: int = 0) -> StoredEvent | None:
        """Let the plugins look, check and encode.

        :return: ``None`` if a plugin dropped it.
        :raises InvalidEvent: with ``index``; nothing was stored.
        """
        check_event(event, index)
        made = "" if event.id else self._new_id()
        if made:
            event = replace(event, id=made)
        if any(self._publish_hooks):
            kept = self._plugins.event_publish(event)
            if kept is None:
                self.vetoed += 1
                return None
            if kept is not event:
                check_event(kept, index)
                event = kept if kept.id else replace(kept, id=event.id)
        stored = StoredEvent.encode(event, index=index)
        stored.unseen = event.id == made
        if stored.size > self._max_event_bytes:
            raise self._too_large(stored, index)
        return stored

    def prepare_parts(
        self,
        type: str,
        properties: Mapping[str, Any],
        id: str,
        directory: str | None,
        project: str | None,
        workspace: str | None,
        scope: Scope,
    ) -> StoredEvent | None:
        """As :meth:`prepare`, from the parts of an event."""
        if any(self._publish_hooks):
            return self.prepare(Event(type, properties, id, directory, project, workspace, scope))
        check_parts(type, properties, id, directory, project, workspace, scope)
        made = id or self._new_id()
        # Without an Event, which costs more than its JSON.
        session = session_of(type, properties)
        payload = encode_body({"id": made, "type": type, "properties": properties})
        stored = StoredEvent(0, made, type, session, directory, project, workspace, scope, payload)
        stored.unseen = not id
        if len(payload) > self._max_event_bytes:
            raise self._too_large(stored, 0)
        return stored

    def _too_large(self, stored: StoredEvent, index: int) -> InvalidEvent:
        limit = self._max_event_bytes
        return InvalidEvent(
            f"event {stored.type!r} has {stored.size} bytes, more than max_event_bytes ({limit})",
            index=index,
            too_large=True,
        )

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        """Store all or none, and return with the store's promise.

        :raises StoreUnavailable: if the store did not take them.
        """
        log = self._log
        if self._append_now is not None and not self._buffer and not self._blockers:
            appended = self._append_at_once(events)
            if self._arrivals:
                await log.pace()
            return appended
        since = anyio.current_time() if self._blockers else 0.0
        while True:
            if self._finished:
                raise StoreUnavailable(_DRAINING)
            if self._buffered and self._buffered + len(events) > self._settings.publish_buffer:
                await self._shrunk()
            elif self._submit is not None and self._arrivals:
                await log.pace()
            else:
                break
        done = self._new_bell()
        pending = _Pending(self, events, done, since)
        self._accept(pending)
        await done.woken()
        if pending.error is not None:
            raise pending.error
        assert pending.appended is not None
        return pending.appended

    def append_nowait(self, events: Sequence[StoredEvent]) -> None:
        """Accept events for storing, in call order.

        :raises PublishBufferFull: if too much is waiting already; nothing was accepted.
        """
        if self._buffered or self._arrivals:
            waiting, most = self._buffered + len(self._arrivals), self._settings.publish_buffer
            if waiting + len(events) > most:
                raise PublishBufferFull(
                    f"{waiting} events wait already (publish_buffer is {most}); await publish() to wait for room"
                )
        if self._append_now is not None and not self._buffer and not self._blockers:
            self._append_at_once(events)
        else:
            since = anyio.current_time() if self._blockers else 0.0
            self._accept(_Pending(self, events, None, since))

    def _append_at_once(self, events: Sequence[StoredEvent]) -> Appended:
        """Store, count and tell the plugins, where nobody has to wait."""
        appended: Appended = self._append_now(events)
        duplicates = appended.duplicates
        self.published += len(events) - duplicates
        if duplicates:
            self.duplicates += duplicates
        if any(self._published_hooks):
            self._tell(events, appended)
        return appended

    def _accept(self, pending: _Pending) -> None:
        self._buffered += len(pending.events)
        if self._submit is None or self._buffer or self._blockers:
            self._buffer.append(pending)
            self._more.wake()
            return
        self._submitted[pending] = time.monotonic()
        try:
            self._submit(pending)
        except BaseException:
            del self._submitted[pending]
            self._buffered -= len(pending.events)
            raise
        if not self._watched:
            self._watched = True
            self._unwatched.wake()

    async def _shrunk(self) -> None:
        if self._less is None:
            self._less = anyio.Event()
        await self._less.wait()

    async def watch(self) -> None:
        """Let publishers go whose store gives no answer, as where its disk hangs, until cancelled."""
        limit = self._settings.publish_deadline + _GRACE
        while True:
            await self._unwatched.woken()
            while self._submitted:
                pending, since = next(iter(self._submitted.items()))
                left = since + limit - time.monotonic()
                if left > 0:
                    await anyio.sleep(left)
                else:
                    pending.error = StoreUnavailable(
                        f"the event store gave no answer within {limit:g} s; whether it was stored is not known"
                    )
                    pending.settle()
            self._watched = False

    async def run(self) -> None:
        """Bring what is buffered to the store, until cancelled."""
        while True:
            await self._more.woken()
            while self._submitted:  # What the store was handed before comes first.
                await self._shrunk()
            while self._buffer:
                taken = await self._with_room() if self._blockers else tuple(self._buffer)
                await self._flush(taken)
                for _ in taken:
                    self._buffer.popleft()
                self._end(taken)
                if self._arrivals:
                    await self._log.pace()

    async def _with_room(self) -> Sequence[_Pending]:
        """The first of those that wait, once every subscriber that may hold it back has room or was too slow, and as
        many of the next as there is room for."""
        blocking, first = self._log.blocking, self._buffer[0]
        blocking.begin(first.since or anyio.current_time())
        await blocking.room(self._log.first_slice(first.events))
        taken: list[_Pending] = []
        count = size = 0
        for pending in self._buffer:
            count += len(pending.events)
            size += sum(len(event.payload) for event in pending.events)
            if taken and not self._log.fits_slice(count, size):
                break
            taken.append(pending)
        # Not one by one, since whoever is close to its limits is asked each time.
        while len(taken) > 1 and not blocking.has_room([event for pending in taken for event in pending.events]):
            taken = taken[: len(taken) // 2]
        return taken

    async def _flush(self, taken: Sequence[_Pending]) -> None:
        events = [event for pending in taken for event in pending.events]
        try:
            seqs, duplicates = await self._log.store.append(events)
        except Exception as error:
            for pending in taken:
                pending.error = error
            return
        at = 0
        for pending in taken:
            own = seqs[at : at + len(pending.events)]
            at += len(pending.events)
            known = 0
            if duplicates:
                known = sum(event.seq != seq for event, seq in zip(pending.events, own, strict=True))
            pending.appended = Appended(own, known)

    def settled(self, pendings: Sequence[_Pending]) -> None:
        """The store has told what became of publishes."""
        for pending in pendings:
            self._submitted.pop(pending, None)
        self._end(pendings)

    def _end(self, pendings: Sequence[_Pending]) -> None:
        """Count publishes, tell the plugins, and let those who wait go on."""
        tells = any(self._published_hooks)
        events = known = 0
        for pending in pendings:
            if pending.ended:
                continue
            pending.ended = True
            appended, done = pending.appended, pending.done
            self._buffered -= len(pending.events)
            if appended is not None and pending.error is None:
                events += len(pending.events)
                known += appended.duplicates
                if tells:
                    self._tell(pending.events, appended)
            elif done is None:
                assert pending.error is not None
                self._plugins.publish_failed([event.event for event in pending.events], pending.error)
            if done is not None:
                done.wake()
        self.published += events - known
        self.duplicates += known
        if self._less is not None:
            self._less.set()
            self._less = None

    def _tell(self, events: Sequence[StoredEvent], appended: Appended) -> None:
        for event, seq in zip(events, appended.seqs, strict=True):
            if event.seq == seq:
                self._plugins.event_published(event, seq)

    async def finish(self, seconds: float) -> None:
        """Wait for what was accepted, then fail the rest with ``StoreUnavailable``."""
        self._log.blocking.stop()
        with anyio.move_on_after(seconds):
            while self._buffered:
                await self._shrunk()
            await self._log.pace()
        self._finished = True
        left = (*self._submitted, *self._buffer)
        for pending in left:
            pending.error = StoreUnavailable(_DRAINING)
        self._submitted.clear()
        self._end(left)


def closed() -> BusClosed:
    """The error of a bus that takes nothing."""
    return BusClosed("the event bus is not running: it was not started, is draining, or was closed")
