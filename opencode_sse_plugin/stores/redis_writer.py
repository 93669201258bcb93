"""Appending to a log in Redis: what waits goes into one script call, which is repeated until it is answered.

A batch has a number that counts up, and the script remembers the answer to the newest one of each writer, so that a
call may be repeated whose answer got lost: it is carried out once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.exceptions import RedisError

from ..errors import StoreUnavailable
from ..events import StoredEvent, new_epoch
from . import Appended, Retention
from .redis_history import History
from .redis_link import Backoff, Way, may_have_run, new_writer, passes, unavailable
from .redis_log import packed, seqs_of
from .redis_scripts import APPEND

logger = logging.getLogger("opencode_sse")

#: One call takes so much at most, but always a whole batch: the server does nothing else meanwhile.
_GROUP_EVENTS: Final = 1000
_GROUP_BYTES: Final = 4 * 1024 * 1024


class Append:
    """Events on their way into the log."""

    __slots__ = ("answer", "bytes", "deadline", "events", "packed", "sent")

    def __init__(self, events: Sequence[StoredEvent], loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.events = events
        #: Names, and names and bodies as they are sent.
        self.packed = [packed(event) for event in events]
        self.bytes = sum([len(event.payload) for event in events])
        self.answer: asyncio.Future[Appended] = loop.create_future()
        self.deadline = deadline
        #: Whether it may have been carried out, or be so yet.
        self.sent = False

    @property
    def stored(self) -> str:
        """Whether it was, as far as one can tell without an answer."""
        return "whether it was stored is not known" if self.sent else "nothing was stored"


class Writer:
    """Appends what is queued, one call after another, until cancelled.

    :param patience: how long a publisher waits for the server, in seconds.
    """

    def __init__(
        self, history: History, retention: Retention, patience: float, now: Callable[[], float] | None
    ) -> None:
        self._history = history
        self._link = history.link
        self._way = Way(history.link)
        self._patience = patience
        self._retention = retention_arguments(retention)
        self._now = now
        self._queue: deque[Append] = deque()
        self._sending: Sequence[Append] = ()
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._name = f"batch:{new_writer()}"
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._number = 0
        self._trouble: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return not self._idle.is_set()

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        """Store all or none. :raises StoreUnavailable: if nothing was stored, or it cannot be known in time."""
        job = Append(events, self._loop, self._loop.time() + self._patience)
        self._queue.append(job)
        if not self._watching:
            self._watch(job.deadline)
        self._idle.clear()
        self._more.set()
        return await job.answer

    def _watch(self, deadline: float) -> None:
        self._watching = True
        self._loop.call_at(deadline, self._look_at_deadlines)

    def _look_at_deadlines(self) -> None:
        """Let publishers go that waited too long; one timer does, as they came in this order."""
        self._watching = False
        now = self._loop.time()
        trouble = self._trouble
        why = f" ({unavailable('', trouble)})".replace("event store : ", "") if trouble is not None else ""
        for job in (*self._sending, *self._queue):
            if job.answer.done():
                continue
            if job.deadline > now:
                self._watch(job.deadline)
                return
            said = f"event store {self._link.where}: no answer within {self._patience:g} s; {job.stored}{why}"
            error = StoreUnavailable(said)
            error.__cause__ = trouble
            job.answer.set_exception(error)

    async def finish(self) -> None:
        """Wait until all that was queued is stored."""
        await self._idle.wait()

    async def give_up(self) -> None:
        """Refuse what is still waiting."""
        await self._way.close()
        for job in (*self._sending, *self._queue):
            if not job.answer.done():
                job.answer.set_exception(StoreUnavailable(f"event store {self._link.where} was closed; {job.stored}"))

    async def run(self) -> None:
        """Append what is queued, until cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            while group := self._take():
                self._sending = group
                await self._store(group)
            self._idle.set()

    def _take(self) -> list[Append]:
        """What goes into one call."""
        group: list[Append] = []
        events = size = 0
        while self._queue:
            job = self._queue[0]
            events += len(job.events)
            size += job.bytes
            if group and (events > _GROUP_EVENTS or size > _GROUP_BYTES):
                break
            self._queue.popleft()
            if not job.answer.done():  # Nobody waits for it any more, and nothing was sent.
                group.append(job)
        return group

    async def _store(self, group: Sequence[Append]) -> None:
        """Call until there is an answer, or nobody waits for one."""
        self._number += 1
        backoff, ambiguous = Backoff(), False
        while True:
            for job in group:
                job.sent = True
            try:
                await self._call(group)
                self._trouble = None
                return
            except (RedisError, OSError, TimeoutError, StoreUnavailable) as error:
                self._trouble = error
                if not passes(error):
                    self._refuse(group, unavailable(self._link.where, error))
                    return
                ambiguous = ambiguous or may_have_run(error)
            except Exception as error:
                logger.exception("appending to event store %s failed", self._link.where)
                self._refuse(group, error)
                return
            for job in group:
                job.sent = ambiguous
            await self._link.forget_connections()
            await backoff.wait()
            if all(job.answer.done() for job in group):
                return

    async def _call(self, group: Sequence[Append]) -> None:
        events = [event for job in group for event in job.events]
        names = [name for job in group for name, _ in job.packed]
        arguments = [both for job in group for _, both in job.packed]
        size = sum(job.bytes for job in group)
        while True:
            asked = self._history.epoch
            answer = await self._way.call(
                APPEND,
                *self._history.evidence,
                new_epoch(),
                self._link.vouched,
                self._name,
                self._number,
                "" if self._now is None else int(self._now() * 1000),
                size,
                *self._retention,
                more=arguments,
            )
            if answer[0] == b"WHO":
                await self._link.look_at_server()
            elif answer[0] == b"LOST":
                await self._history.history_was_lost(asked)
            elif answer[0] == b"STALE":
                raise StoreUnavailable(f"event store {self._link.where}: a later batch was stored before this one")
            else:
                break
        current = self._history.learn(answer, asked)
        self._stored(group, events, names, answer, current=current)

    def _stored(
        self,
        group: Sequence[Append],
        events: list[StoredEvent],
        names: list[bytes],
        answer: list[Any],
        *,
        current: bool,
    ) -> None:
        seqs, known = seqs_of(answer[5], len(events))
        numbers = seqs
        if known:
            events = [event for place, event in enumerate(events) if place not in known]
            names = [name for place, name in enumerate(names) if place not in known]
            numbers = [seq for place, seq in enumerate(seqs) if place not in known]
        for event, seq in zip(events, numbers, strict=True):
            event.seq = seq
        if events and current:
            # Else others stored something before these, and the reader tells all of it.
            if self._history.told == numbers[0] - 1:
                self._history.tell(events, names)
            else:
                self._history.acknowledged(numbers[-1], names[-1])
        at = 0
        for job in group:
            after = at + len(job.events)
            if not job.answer.done():
                duplicates = sum(place in known for place in range(at, after)) if known else 0
                job.answer.set_result(Appended(seqs[at:after], duplicates))
            at = after

    def _refuse(self, group: Sequence[Append], error: Exception) -> None:
        for job in group:
            if not job.answer.done():
                job.answer.set_exception(error)


def retention_arguments(keep: Retention) -> tuple[int | str, ...]:
    """What is kept, as the scripts take it."""
    return keep.events, keep.bytes, "" if keep.age is None else int(keep.age * 1000)
