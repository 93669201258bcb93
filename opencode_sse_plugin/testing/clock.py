"""Time that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import time
from heapq import heappop, heappush
from itertools import count
from typing import Final

import anyio
import anyio.lowlevel

_NANO: Final = 1_000_000_000


async def settle() -> None:
    """Let everything that can run, run: return once every other task waits for something.

    Work in threads, sockets and real timers is not waited for.
    """
    try:
        # anyio's own version for asyncio sleeps 0.1 s a round and does not see callbacks that are about to run. The
        # queue does: when it is empty while we run, nothing else can.
        ready = getattr(asyncio.get_running_loop(), "_ready", None)
    except RuntimeError:
        ready = None
    if ready is None:
        await anyio.wait_all_tasks_blocked()
        return
    await anyio.lowlevel.checkpoint()
    while ready:
        await anyio.lowlevel.checkpoint()


class ManualClock:
    """A ``Clock`` that moves only in :meth:`advance`.

    Time is kept in whole nanoseconds, so that ten steps of 0.1 s are one second.

    The time of day moves with it, from that of the machine when this was made on.

    :param start: what ``now()`` gives at first, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = round(start * _NANO)
        self._ahead = time.time() - start
        self._sleepers: list[tuple[int, int, anyio.Event]] = []
        self._order = count()
        self._advancing = False

    def now(self) -> float:
        """Seconds, as far as the test has moved them."""
        return self._now / _NANO

    def wall(self) -> float:
        """Seconds since 1970."""
        return self._ahead + self.now()

    async def sleep(self, seconds: float) -> None:
        """Wait until the test has moved time that far; not at all for zero and less."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        # At least one step, or a rounding error left over in "deadline - now" would make its caller spin.
        sleeper = (self._now + max(1, round(seconds * _NANO)), next(self._order), anyio.Event())
        heappush(self._sleepers, sleeper)
        try:
            await sleeper[2].wait()
        finally:
            if sleeper in self._sleepers:  # cancelled; a list that is not quite a heap any more has to be one again
                self._sleepers.remove(sleeper)
                self._sleepers.sort()

    async def advance(self, seconds: float) -> None:
        """Move time. Sleepers wake in the order of their due times, each at its own, and everything that can run has
        run before the next one wakes and before this returns.

        :raises ValueError: if time would go back. :raises RuntimeError: if time is being moved already.
        """
        if seconds < 0:
            raise ValueError(f"time does not go back: {seconds}")
        if self._advancing:
            raise RuntimeError("the clock is being advanced by another task")
        self._advancing = True
        try:
            await settle()  # whoever is about to sleep does so at the time it is now
            target = self._now + round(seconds * _NANO)
            # One nanosecond of grace: 0.1 + 10.0 and 10.1 need not be the same number.
            while self._sleepers and self._sleepers[0][0] <= target + 1:
                due, _, event = heappop(self._sleepers)
                self._now = max(self._now, due)
                event.set()
                await settle()
            self._now = max(self._now, target)
            await settle()
        finally:
            self._advancing = False
