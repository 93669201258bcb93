"""Threads that work for an event loop: a task hands over a job and waits, the thread answers through the loop."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

import anyio

from ..wakeup import new_waiter

Result = TypeVar("Result")
CallSoon = Callable[[Callable[[], None]], Any]


class Job:
    """Something for a thread to do."""

    __slots__ = ()


class Call(Job, Generic[Result]):
    """A function to call, for a task that waits."""

    _result: Result

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._done = new_waiter()

    def run(self) -> None:
        """Call it, in the thread."""
        try:
            self._result = self._work()
        except Exception as error:
            self._error = error

    def tell(self) -> None:
        """Let the task go on, on the event loop."""
        self._done.wake()

    async def outcome(self) -> Result:
        """Wait until it was told. :raises Exception: what the function raised."""
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class Worker:
    """A thread that runs jobs in the order they were given.

    It dies with the process: a host that never closes its store must be able to exit.

    :param call_soon: calls a function on the event loop, from any thread.
    """

    def __init__(self, name: str, call_soon: CallSoon) -> None:
        self._call_soon = call_soon
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._stopped = anyio.Event()
        self._thread = Thread(target=self._main, name=name, daemon=True)
        self._running = True
        self._thread.start()

    async def do(self, work: Callable[[], Result]) -> Result:
        """Run a function in the thread. :raises Exception: what it raises."""
        call = Call(work)
        self.put(call)
        return await call.outcome()

    def put(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    async def stop(self, patience: float) -> None:
        """Finish what was queued and end; a thread that is stuck in the kernel is left to itself."""
        self._jobs.put(None)
        with anyio.move_on_after(patience, shield=True):
            await self._stopped.wait()
            self._thread.join()

    def _main(self) -> None:
        try:
            while self._running:
                self._turn(self._take())
        finally:
            self._end()
        self._tell(self._stopped.set)

    def _tell(self, callback: Callable[[], None]) -> None:
        """Call something on the event loop."""
        try:
            self._call_soon(callback)
        except RuntimeError:  # The loop is gone, and with it everyone who could want something.
            self._running = False

    def _take(self) -> list[Job]:
        """All that is queued; waits for the first of it, as long as ``_pause`` says."""
        jobs: list[Job] = []
        try:
            job = self._jobs.get(timeout=self._pause())
            while job is not None:
                jobs.append(job)
                job = self._jobs.get_nowait()
            self._running = False
        except Empty:
            pass
        return jobs

    # For subclasses.

    def _pause(self) -> float | None:
        """How long to wait for the next job, in seconds; ``None`` for ever."""
        return None

    def _turn(self, jobs: list[Job]) -> None:
        """Do what was queued, or what is to be done where nothing was."""
        for job in jobs:
            self._run(job)

    def _run(self, job: Job) -> None:
        assert isinstance(job, Call)
        job.run()
        self._tell(job.tell)

    def _end(self) -> None:
        """The last thing the thread does."""
