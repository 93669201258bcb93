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
from ..wakeup import Bell, new_bell
from . import Appended, Retention, Submission, settle
from .redis_history import History
from .redis_link import Backoff, KeptConnection, bulk, may_have_run, new_writer, passes, unavailable
from .redis_log import name_of, packed, seqs_of
from .redis_scripts import APPEND

logger = logging.getLogger("opencode_sse")

#: One call takes so much at most, but always a whole batch: the server does nothing else meanwhile.
_GROUP_EVENTS: Final = 1000
_GROUP_BYTES: Final = 4 * 1024 * 1024
#: More appends than this are divided.
_MUCH: Final = 32


class Append:
    """Events on their way into the log."""

    __slots__ = ("deadline", "over", "sent", "submission")

    def __init__(self, submission: Submission, deadline: float) -> None:
        self.submission = submission
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


class Batch:
    """What goes into one call.

    :param size: payload bytes of its events. :param before: what was submitted before this one, whichever way it goes;
        this one is stored behind it.
    """

    __slots__ = ("_bell", "before", "bodies", "events", "jobs", "names", "number", "over", "size", "writer")

    def __init__(self, jobs: Sequence[Append], events: Sequence[StoredEvent], size: int, before: Batch | None) -> None:
        self.jobs = jobs
        self.events = events
        self.size = size
        self.before = before
        #: The names of its events, and names and bodies as they are sent.
        self.names = [name_of(event) for event in events]
        self.bodies = list(map(packed, self.names, events))
        #: Whose it is, and its number in the order of that writer's batches.
        self.writer = ""
        self.number = 0
        #: Whether it is stored, or never will be.
        self.over = False
        self._bell: Bell | None = None

    @property
    def is_vain(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(job.over for job in self.jobs)

    def finish(self) -> None:
        """It is stored, or never will be."""
        self.before = None  # Which would keep the one before it, and so on.
        self.over = True
        if self._bell is not None:
            self._bell.wake()

    async def wait(self) -> None:
        """Until it is over; for the one behind it."""
        if not self.over:
            self._bell = new_bell()
            await self._bell.woken()


class Writer:
    """Appends what is queued, until its ways end.

    Mostly one call is on its way and all that comes meanwhile goes into the next. Where much waits, half of it goes
    another way at the same time, so that the server has something to do while we put a call together; the script sees
    to it that they are stored in the order of their submission, whatever happens to either.

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
        self._more = new_bell()
        self._much = new_bell()
        self._idle = asyncio.Event()
        self._idle.set()
        self._watching = False
        #: What was taken from the queue last.
        self._last: Batch | None = None
        self.ways = _Way(self, self._more), _Way(self, self._much)

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return any(way.batch is not None for way in self.ways)

    def submit(self, submission: Submission) -> Append:
        """Queue events."""
        job = Append(submission, self._loop.time() + self._patience)
        if not self._queue:  # Else somebody has been woken, and goes on until there is nothing more.
            self._idle.clear()
            self._more.wake()
        self._queue.append(job)
        if not self._watching:
            self._watch(job.deadline)
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
        batches = [way.batch for way in self.ways if way.batch is not None]
        return sorted((job for batch in batches for job in batch.jobs), key=lambda job: job.deadline)

    async def finish(self) -> None:
        """Wait until all that was queued is stored."""
        await self._idle.wait()

    async def give_up(self) -> None:
        """Refuse what is still waiting."""
        for way in self.ways:
            await way.kept.close()
        for job in (*self._sent(), *self._queue):
            job.fail(StoreUnavailable(f"event store {self._where} was closed; {job.stored}"))

    def take(self, way: _Way) -> Batch | None:
        """What goes into one call; nothing if nothing waits."""
        share = len(self._queue)
        if share > _MUCH and way is self.ways[0] and self.ways[1].batch is None:
            share = (share + 1) // 2
            self._much.wake()
        jobs: list[Append] = []
        events: list[StoredEvent] = []
        size = 0
        while share:
            share -= 1
            job = self._queue[0]
            if not job.over:  # Else nobody waits for it any more, and nothing was sent.
                more = job.submission.events
                bytes = sum([len(event.payload) for event in more])
                if jobs and (len(events) + len(more) > _GROUP_EVENTS or size + bytes > _GROUP_BYTES):
                    break
                jobs.append(job)
                events += more
                size += bytes
            self._queue.popleft()
        if jobs:
            self._last = Batch(jobs, events, size, self._last)
            return self._last
        if not self.busy:
            self._idle.set()
        return None


class _Way:
    """One call after another. Numbers its batches, so that the script knows which of them it has answered."""

    def __init__(self, writer: Writer, wanted: Bell) -> None:
        #: What is on its way.
        self.batch: Batch | None = None
        self.kept = KeptConnection(writer.history.link)
        self._writer = writer
        self._history = writer.history
        self._link = writer.history.link
        self._wanted = wanted
        self._name = f"batch:{new_writer()}"
        #: What every call says.
        self._always = [bulk(word) for word in (self._name, *writer.retention)]
        self._number = 0

    async def run(self) -> None:
        """Append what is queued, until cancelled."""
        while True:
            await self._wanted.woken()
            while (batch := self._writer.take(self)) is not None:
                self.batch = batch
                self._number += 1
                batch.writer, batch.number = self._name, self._number
                try:
                    await self._store(batch)
                finally:
                    batch.finish()
                self.batch = None

    async def _store(self, batch: Batch) -> None:
        """Call until there is an answer, or nobody waits for one."""
        backoff, ambiguous = Backoff(), False
        while True:
            for job in batch.jobs:
                job.sent = True
            try:
                await self._call(batch)
                self._writer.trouble = None
                return
            except (RedisError, OSError, TimeoutError, StoreUnavailable) as error:
                self._writer.trouble = error
                if not passes(error):
                    self._refuse(batch, unavailable(self._link.where, error))
                    return
                ambiguous = ambiguous or may_have_run(error)
            except Exception as error:
                logger.exception("appending to event store %s failed", self._link.where)
                self._refuse(batch, error)
                return
            for job in batch.jobs:
                job.sent = ambiguous
            await self._link.forget_connections()
            await backoff.wait()
            if batch.is_vain:
                return

    async def _call(self, batch: Batch) -> None:
        more = [*self._always, *batch.bodies]
        words = len(self._always) + 2 * len(batch.bodies)
        epoch = ""  # The name of one that may begin, where the server is not what it was.
        while True:
            asked, before = self._history.epoch, batch.before
            answer = await self.kept.call(
                APPEND,
                *self._history.evidence,
                self._link.vouched,
                epoch,
                batch.number,
                "" if self._writer.now is None else int(self._writer.now() * 1000),
                batch.size,
                "" if before is None or before.over else f"{before.writer} {before.number}",
                more=more,
                words=words,
            )
            if answer[0] == b"WHO":
                await self._link.look_at_server()
                epoch = new_epoch()
            elif answer[0] == b"LOST":
                await self._history.history_was_lost(asked)
            elif answer[0] == b"STALE":
                raise StoreUnavailable(f"event store {self._link.where}: a later batch was stored before this one")
            elif answer[0] == b"EARLY":
                assert before is not None
                await before.wait()
                if batch.is_vain:
                    return
            else:
                break
        current = self._history.learn(answer, asked)
        self._stored(batch, answer, current=current)

    def _stored(self, batch: Batch, answer: list[Any], *, current: bool) -> None:
        events, names = batch.events, batch.names
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
        for job in batch.jobs:
            submission = job.submission
            after = at + len(submission.events)
            duplicates = sum(place in known for place in range(at, after)) if known else 0
            if not job.over:
                job.over = True
                submission.appended = Appended(seqs[at:after], duplicates)
                submissions.append(submission)
            at = after
        settle(submissions)

    def _refuse(self, batch: Batch, error: Exception) -> None:
        for job in batch.jobs:
            job.fail(error)


def retention_arguments(keep: Retention) -> tuple[int | str, ...]:
    """What is kept, as the scripts take it."""
    return keep.events, keep.bytes, "" if keep.age is None else int(keep.age * 1000)
