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
from ..events import StoredEvent
from ..ids import new_epoch
from . import Appended, Retention, Submission, settle
from .redis_history import History
from .redis_link import Backoff, KeptConnection, may_have_run, new_writer, passes, unavailable
from .redis_log import packed, seqs_of
from .redis_scripts import APPEND

logger = logging.getLogger("opencode_sse")

#: One call takes so much at most, but always a whole batch: the server does nothing else meanwhile.
_GROUP_EVENTS: Final = 1000
_GROUP_BYTES: Final = 4 * 1024 * 1024
#: More appends than this are divided.
_MUCH: Final = 32


class Append:
    """Events on their way into the log."""

    __slots__ = ("bytes", "deadline", "over", "packed", "sent", "submission")

    def __init__(self, submission: Submission, deadline: float) -> None:
        self.submission = submission
        #: Names, and names and bodies as they are sent.
        self.packed = [packed(event) for event in submission.events]
        self.bytes = sum([len(event.payload) for event in submission.events])
        self.deadline = deadline
        #: Whether it was settled, or nobody waits for that any more.
        self.over = False
        #: Whether it may have been carried out, or be so yet.
        self.sent = False

    def fail(self, error: Exception) -> None:
        """It was not stored, or nobody knows."""
        if not self.over:
            self.over = True
            self.submission.error = error
            self.submission.settle()

    @property
    def stored(self) -> str:
        """Whether it was, as far as one can tell without an answer."""
        return "whether it was stored is not known" if self.sent else "nothing was stored"


class Writer:
    """Appends what is queued, until its ways end.

    Mostly one call is on its way and all that comes meanwhile goes into the next. Where much waits, half of it goes
    another way at the same time, so that the server has something to do while we put a call together.

    :param patience: how long a publisher waits for the server, in seconds.
    """

    def __init__(
        self, history: History, retention: Retention, patience: float, now: Callable[[], float] | None
    ) -> None:
        self.history = history
        self.retention = retention_arguments(retention)
        self.now = now
        self.trouble: Exception | None = None
        self._where = history.link.where
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Append] = deque()
        self._more = asyncio.Event()
        self._much = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._watching = False
        self.ways = _Way(self, self._more), _Way(self, self._much)

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return any(way.sending for way in self.ways)

    def submit(self, submission: Submission) -> Append:
        """Queue events."""
        job = Append(submission, self._loop.time() + self._patience)
        self._queue.append(job)
        if not self._watching:
            self._watch(job.deadline)
        self._idle.clear()
        self._more.set()
        return job

    def _watch(self, deadline: float) -> None:
        self._watching = True
        self._loop.call_at(deadline, self._look_at_deadlines)

    def _look_at_deadlines(self) -> None:
        """Let publishers go that waited too long; one timer does for all."""
        self._watching = False
        now = self._loop.time()
        trouble = self.trouble
        why = f" ({unavailable('', trouble)})".replace("event store : ", "") if trouble is not None else ""
        for job in (*self._sent(), *self._queue):
            if job.over:
                continue
            if job.deadline > now:
                if not self._watching:
                    self._watch(job.deadline)
                continue
            said = f"event store {self._where}: no answer within {self._patience:g} s; {job.stored}{why}"
            error = StoreUnavailable(said)
            error.__cause__ = trouble
            job.fail(error)

    def _sent(self) -> list[Append]:
        return sorted((job for way in self.ways for job in way.sending), key=lambda job: job.deadline)

    async def finish(self) -> None:
        """Wait until all that was queued is stored."""
        await self._idle.wait()

    async def give_up(self) -> None:
        """Refuse what is still waiting."""
        for way in self.ways:
            await way.kept.close()
        for job in (*self._sent(), *self._queue):
            job.fail(StoreUnavailable(f"event store {self._where} was closed; {job.stored}"))

    def take(self, way: _Way) -> list[Append]:
        """What goes into one call."""
        share = len(self._queue)
        if share > _MUCH and way is self.ways[0] and not self.ways[1].sending:
            share = (share + 1) // 2
            self._much.set()
        group: list[Append] = []
        events = size = 0
        while share:
            share -= 1
            job = self._queue[0]
            events += len(job.packed)
            size += job.bytes
            if group and (events > _GROUP_EVENTS or size > _GROUP_BYTES):
                break
            self._queue.popleft()
            if not job.over:  # Else nobody waits for it any more, and nothing was sent.
                group.append(job)
        if not group and not self.busy:
            self._idle.set()
        return group


class _Way:
    """One call after another. Numbers its batches, so that the script knows which of them it has answered."""

    def __init__(self, writer: Writer, wanted: asyncio.Event) -> None:
        self.sending: Sequence[Append] = ()
        self.kept = KeptConnection(writer.history.link)
        self._writer = writer
        self._history = writer.history
        self._link = writer.history.link
        self._wanted = wanted
        self._name = f"batch:{new_writer()}"
        self._number = 0

    async def run(self) -> None:
        """Append what is queued, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while group := self._writer.take(self):
                self.sending = group
                await self._store(group)
                self.sending = ()

    async def _store(self, group: Sequence[Append]) -> None:
        """Call until there is an answer, or nobody waits for one."""
        self._number += 1
        backoff, ambiguous = Backoff(), False
        while True:
            for job in group:
                job.sent = True
            try:
                await self._call(group)
                self._writer.trouble = None
                return
            except (RedisError, OSError, TimeoutError, StoreUnavailable) as error:
                self._writer.trouble = error
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
            if all(job.over for job in group):
                return

    async def _call(self, group: Sequence[Append]) -> None:
        events = [event for job in group for event in job.submission.events]
        names = [name for job in group for name, _ in job.packed]
        arguments = [both for job in group for _, both in job.packed]
        size = sum(job.bytes for job in group)
        while True:
            asked = self._history.epoch
            answer = await self.kept.call(
                APPEND,
                *self._history.evidence,
                new_epoch(),
                self._link.vouched,
                self._name,
                self._number,
                "" if self._writer.now is None else int(self._writer.now() * 1000),
                size,
                *self._writer.retention,
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
            self._history.acknowledged(events, names)
        submissions: list[Submission] = []
        at = 0
        for job in group:
            after = at + len(job.packed)
            duplicates = sum(place in known for place in range(at, after)) if known else 0
            if not job.over:
                job.over = True
                job.submission.appended = Appended(seqs[at:after], duplicates)
                submissions.append(job.submission)
            at = after
        settle(submissions)

    def _refuse(self, group: Sequence[Append], error: Exception) -> None:
        for job in group:
            job.fail(error)


def retention_arguments(keep: Retention) -> tuple[int | str, ...]:
    """What is kept, as the scripts take it."""
    return keep.events, keep.bytes, "" if keep.age is None else int(keep.age * 1000)
