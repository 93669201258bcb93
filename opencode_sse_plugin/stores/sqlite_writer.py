"""The one thread of a process that writes to an SQLite log, and tells its event loop what anybody wrote."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from ..errors import StoreUnavailable
from ..events import StoredEvent
from . import Bounds, Evicted, Retention, StoreListener, Submission, settle
from .sqlite_file import close_log, is_busy, open_log, patiently, transaction, unavailable
from .sqlite_log import (
    Extent,
    Inserted,
    cut,
    end_after,
    extent,
    insert,
    is_older,
    newest_epoch,
    prune,
    read_bounds,
    read_page,
)
from .threads import CallSoon, Job, Worker

logger = logging.getLogger("opencode_sse")

#: What other processes appended is looked for so often, in seconds: soon after something happened, rarely else.
_SOON: Final = 0.005
_RARELY: Final = 0.025
#: A page of others' appends is told at once.
_PAGE_EVENTS: Final = 500
_PAGE_BYTES: Final = 1024 * 1024
#: After a commit, others that write have so long to begin theirs; and others write if they did within a second.
_LET_OTHERS: Final = 0.001
_OTHERS: Final = 1.0
#: Pruning begins at one part in so many above what is kept.
_SLACK: Final = 64
#: Seconds between two looks at age, and at whether another one still prunes.
_LOOK_AT_AGE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a log is kept.

    :param lossy: whether the newest commits may be lost when the machine dies (``synchronous=NORMAL``).
    :param patience: how long to wait for others, in seconds. :param now: seconds since 1970.
    """

    path: Path
    retention: Retention
    lossy: bool
    patience: float
    now: Callable[[], float]


class Append(Job):
    """What was submitted in one turn of the event loop.

    :param deadline: by ``time.monotonic``; until then it waits for others that write.
    """

    __slots__ = ("deadline", "submissions")

    def __init__(self, submissions: Sequence[Submission], deadline: float) -> None:
        self.submissions = submissions
        self.deadline = deadline


class Writer(Worker):
    """Everything queued goes into one transaction, and is acknowledged and told after its commit.

    Other processes' appends are noticed by SQLite's data version and told in their place, so that every process tells
    one sequence without holes.
    """

    def __init__(self, options: Options, listener: StoreListener, call_soon: CallSoon, later: CallSoon) -> None:
        self._options = options
        self._path = options.path
        self._listener = listener
        self._me = f"{os.getpid()}.{id(self)}"
        #: The last number told, and whether more is stored than that.
        self._told = 0
        self._behind = False
        #: Pages handed to the event loop, and taken there.
        self._handed = self._taken = 0
        self._epoch_number = self._data_version = 0
        self._others_until = 0.0
        self._wait = _SOON
        self._opened = self._failing = self._pruning = False
        self._prune_after = self._look_at_age = 0.0
        #: Oldest and newest number and payload bytes, as last seen.
        self.seen = Extent(1, 0, 0)
        #: The data version since which nobody else changed what was seen; none where it must be read again.
        self._seen_version: int | None = None
        #: What this turn of the event loop submitted. The thread gets it as a whole: it would begin with the first.
        self._submitted: list[Submission] = []
        self._handing = False
        self._later = later
        super().__init__(f"opencode-sse {options.path.name}", call_soon)

    async def start(self) -> Bounds:
        """Open the log. :raises StoreUnavailable: if it cannot be had."""
        return await self.do(self._open)

    def submit(self, submission: Submission) -> None:
        """Queue events."""
        self._submitted.append(submission)
        if not self._handing:
            self._hand_over_soon()

    def _hand_over_soon(self) -> None:
        """Behind all that runs in this turn of the event loop."""
        self._handing = True
        self._later(self._hand_over)

    def _hand_over(self) -> None:
        self._handing = False
        if self._submitted:
            self.put(Append(self._submitted, time.monotonic() + self._options.patience))
            self._submitted = []

    async def stop(self, patience: float) -> None:
        self._hand_over()
        await super().stop(patience)

    async def begin_epoch(self, end: int | None = None) -> None:
        """Lose all history beyond ``end``, by default none, and go on under a new epoch."""
        self._hand_over()
        await self.do(lambda: self._begin_epoch(end))

    async def prune(self) -> None:
        """Delete what is beyond retention, in small steps, whoever else may be at it."""
        while await self.do(lambda: self._prune_some(forced=True)):
            pass

    # The thread.

    def _open(self) -> Bounds:
        self._log, self._presence = open_log(self._path, lossy=self._options.lossy, patience=self._options.patience)
        self._log.execute("BEGIN")
        with transaction(self._log):
            bounds = read_bounds(self._log)
            self.seen = extent(self._log)
        self._told = bounds.latest
        self._epoch_number = newest_epoch(self._log)
        self._data_version = self._version()
        self._opened = True
        return bounds

    def _end(self) -> None:
        if self._opened:
            close_log(self._log, self._presence)

    def _pause(self) -> float | None:
        if not self._opened:
            return None
        return 0.0 if self._pruning else self._wait

    def _turn(self, jobs: list[Job]) -> None:
        group: list[Append] = []
        for job in jobs:
            if isinstance(job, Append):
                group.append(job)
                continue
            self._commit(group)
            group = []
            self._run(job)
        self._commit(group)
        if self._opened:
            try:
                if self._behind or not group:  # Else the commit has looked already.
                    self._look()
                self._prune()
                self._failing = False
            except (sqlite3.Error, StoreUnavailable) as error:
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            logger.error("%s; trying again until it goes", unavailable(self._path, error))
        self._wait = _LOOK_AT_AGE

    def _begin(self, deadline: float) -> None:
        patiently(lambda: self._log.execute("BEGIN IMMEDIATE"), deadline, self._look_meanwhile)

    def _version(self) -> int:
        version: int = self._log.execute("PRAGMA data_version").fetchone()[0]
        return version

    # Writing.

    def _commit(self, group: list[Append]) -> None:
        """Store what waits, in one transaction."""
        while group:
            try:
                self._begin(min(job.deadline for job in group))
                break
            except sqlite3.Error as error:
                now = time.monotonic()
                late = [job for job in group if job.deadline <= now or not is_busy(error)]
                group = [job for job in group if job not in late]
                self._refuse(late, error)
        else:
            return
        try:
            submissions = [submission for job in group for submission in job.submissions]
            with transaction(self._log):
                version = self._version()
                before = self.seen if version == self._seen_version else None
                self._seen_version = None  # Until it is committed.
                batches, at = [submission.events for submission in submissions], int(self._options.now() * 1000)
                inserted = insert(self._log, batches, at, before)
        except Exception as error:
            if len(submissions) == 1:
                self._refuse(group, error)
            else:  # One that cannot be stored must not take the others with it.
                deadline, half = min(job.deadline for job in group), len(submissions) // 2
                self._commit([Append(submissions[:half], deadline)])
                self._commit([Append(submissions[half:], deadline)])
            return
        self.seen, self._seen_version = inserted.extent, version
        self._committed(submissions, inserted, others=version != self._data_version)

    def _refuse(self, group: Iterable[Append], error: Exception) -> None:
        for job in group:
            for submission in job.submissions:
                submission.error = unavailable(self._path, error)
            self._tell(partial(settle, job.submissions))

    def _committed(self, submissions: Sequence[Submission], inserted: Inserted, *, others: bool) -> None:
        for submission, appended in zip(submissions, inserted.appended, strict=True):
            submission.appended = appended
        events = inserted.fresh
        for seq, event in enumerate(events, inserted.extent.head - len(events) + 1):
            event.seq = seq
        if others or self._behind:
            try:
                # Others have stored something before these.
                self._look()
            except sqlite3.Error as error:
                self._behind = True
                self._complain(error)
        if events and not self._behind and self._told == events[0].seq - 1:
            self._told = events[-1].seq
            self._hand(events, submissions)
        else:
            self._behind = self._behind or bool(events and self._told < events[-1].seq)
            self._tell(partial(settle, submissions))
        if time.monotonic() < self._others_until:
            time.sleep(_LET_OTHERS)

    def _begin_epoch(self, end: int | None) -> None:
        try:
            self._begin(time.monotonic() + self._options.patience)
            self._seen_version = None
            with transaction(self._log):
                cut(self._log, end)
            self._tell_page()
        except sqlite3.Error as error:
            raise unavailable(self._path, error) from error

    # Telling.

    def _look_meanwhile(self) -> None:
        """Others' appends go on being told while we wait for our turn."""
        try:
            self._look()
        except sqlite3.Error as error:
            if not is_busy(error):
                raise

    def _look(self) -> None:
        """Tell a page of what is stored and was not told yet."""
        version = self._version()
        if version != self._data_version:
            self._data_version = version
            self._others_until = time.monotonic() + _OTHERS
            self._behind = True
        elif not self._behind:
            self._wait = min(_RARELY, self._wait * 1.1)
            return
        self._wait = _SOON
        # The next page when the last one has been shown, or a fast process would fill a slow one's memory.
        if self._handed == self._taken and not self._listener.waiting:
            self._tell_page()

    def _tell_page(self) -> None:
        self._log.execute("BEGIN")
        with transaction(self._log):
            if newest_epoch(self._log) != self._epoch_number:
                self._tell_epoch()
            self.seen = extent(self._log)
            page = read_page(self._log, self._told, _PAGE_EVENTS, _PAGE_BYTES)
        if isinstance(page, Evicted):
            listener, oldest = self._listener, page.oldest
            self._told = oldest - 1
            self._tell(lambda: listener.missed(oldest))
        elif page.events:
            self._told = page.last
            self._hand(page.events, ())
        self._behind = self._told < self.seen.head

    def _tell_epoch(self) -> None:
        bounds, end, listener = read_bounds(self._log), end_after(self._log, self._epoch_number), self._listener
        self._epoch_number = newest_epoch(self._log)
        self._told = min(self._told, end)
        self._tell(lambda: listener.epoch_changed(bounds, end))

    def _hand(self, events: Sequence[StoredEvent], submissions: Sequence[Submission]) -> None:
        """Give events, and the acknowledgements of their publishers, to the event loop."""
        self._handed += 1

        def take() -> None:
            self._taken += 1
            try:
                self._listener.visible(events)
            finally:
                settle(submissions)
                if not self._handing:  # In the turn of those who were woken just now, not in the one after it.
                    self._hand_over_soon()

        self._tell(take)

    # Pruning.

    def _prune(self) -> None:
        """Delete a little of what is beyond retention, where it is time for it and nobody else does."""
        now = time.monotonic()
        if self._behind:
            return  # What is not told here yet should not be lost by our own doing.
        if (self._pruning or self._too_much() or self._too_old(now)) and now >= self._prune_after:
            try:
                self._pruning = self._prune_some()
            except StoreUnavailable:
                self._pruning = False  # Somebody writes, or nobody can; appending will say so.
                self._prune_after = now + _LOOK_AT_AGE

    def _too_much(self) -> bool:
        keep = self._options.retention
        oldest, head, size = self.seen
        events = head - oldest + 1
        return events > keep.events + keep.events // _SLACK or (events > 1 and size > keep.bytes + keep.bytes // _SLACK)

    def _too_old(self, now: float) -> bool:
        age = self._options.retention.age
        if age is None or now < self._look_at_age:
            return False
        self._look_at_age = now + _LOOK_AT_AGE
        return is_older(self._log, int((self._options.now() - age) * 1000))

    def _prune_some(self, *, forced: bool = False) -> bool:
        """One step; whether there is more to do for us."""
        try:
            self._begin(time.monotonic() + self._options.patience)
            self._seen_version = None
            with transaction(self._log):
                now = int(self._options.now() * 1000)
                more = prune(self._log, self._options.retention, now, self._me, forced=forced)
                self.seen = extent(self._log)
        except sqlite3.Error as error:
            raise unavailable(self._path, error) from error
        if more is None:
            self._prune_after = time.monotonic() + _LOOK_AT_AGE
        return bool(more)
