"""The fan-out: who is woken when, in pieces, and how much of the event loop that may take.

A wake-up is for everyone who got something since the last one. The event loop belongs to the host, so a wake-up of many
is followed by a rest, and what comes meanwhile goes out in one write.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from .channels import WAKE_AT_ONCE, Channels
from .wakeup import call_later, call_soon

#: So many readers may read a page of the store in one turn of the event loop.
PAGES_AT_ONCE: Final = 8
#: A rest is drawn out by so much of its length for one more event, which then waits for nothing. At a steady pace this
#: makes each rest end with an event, and saves a sixth of the writes at the same latency (docs/performance.md).
_DRAWN_OUT: Final = 0.5
#: Half of a rest is enough where so many events wait: with one more, a write would carry a tenth more.
_ENOUGH: Final = 10
#: Seconds. Less than this is not worth a timer; nobody waits for more.
_SHORTEST_REST: Final = 0.0005
_LONGEST_REST: Final = 0.05


class Sleeper(Protocol):
    """What is known here of a subscription."""

    def wake(self) -> None: ...


class Fanout:
    """Wakes the readers of one process.

    :param channels: who waits where. :param more_room: called when some have been given what has come.
    :param woken: called once a wake-up. :param loop_share: of the event loop's time, what waking many may take.
    """

    def __init__(
        self, channels: Channels, more_room: Callable[[], None], woken: Callable[[], None], loop_share: float
    ) -> None:
        #: What became visible since the last wake-up was over.
        self.events = self.bytes = 0
        self._channels = channels
        self._more_room = more_room
        self._woken = woken
        self._scheduled = self._waking = self._many = False
        #: How long a wake-up of many is followed by rest, in lengths of that wake-up.
        self._rest_ratio = 1 / loop_share - 1
        self._woke_at = self._took = self._rests_since = self._rest_length = 0.0
        #: What ends a rest that is drawn out, if no event does.
        self._timer: Any = None
        self._at_head: set[Sleeper] = set()
        self._want_page: deque[Sleeper] = deque()

    def start(self) -> None:
        """Begin on the running event loop."""
        self._call_soon = call_soon()
        self._call_later = call_later()

    def schedule(self) -> None:
        """Something became visible: wake everyone who got it, soon."""
        if not self._scheduled:
            self._scheduled = True
            if not self._waking:
                self._call_wake()
        elif self._timer is not None and self._rest_left() <= 0:
            self._stop_timer()
            self._call_soon(self.wake)

    def _rest_left(self) -> float:
        length = self._rest_length if self.events < _ENOUGH else self._rest_length / 2
        return self._rests_since + length - time.perf_counter()

    def _call_wake(self) -> None:
        left = self._rest_left()
        if left > _SHORTEST_REST and self._call_later is not None:
            delay = left + self._rest_length * _DRAWN_OUT
            self._timer = self._call_later(min(delay, _LONGEST_REST), self.wake)
        else:
            self._call_soon(self.wake)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wake(self) -> None:
        """Wake everyone who got something: once for all that has come since the last time."""
        self._scheduled = False
        self._stop_timer()
        if not self._waking:
            self._channels.pumps_due = False
        self._channels.gather()
        if not self._waking:
            self._waking = True
            self._many = len(self._channels.to_wake) >= WAKE_AT_ONCE
            self._woke_at = time.perf_counter()
            self._took = 0.0
            self._wake_some()

    def _wake_some(self) -> None:
        begun = time.perf_counter()
        more_to_wake = self._channels.wake_some()
        self._took += time.perf_counter() - begun
        self._more_room()
        if more_to_wake:
            self._call_soon(self._wake_some)
            return
        # Where a few were given what has come, and nobody else has to be waited for, a turn more would cost as much.
        at_once = not (self._many or self._channels.pumps_due or self._at_head)
        if not at_once:
            self._call_soon(self._rest)  # Behind the turns of all that were woken.
        if self._at_head:
            waiting, self._at_head = self._at_head, set()
            for sleeper in waiting:
                sleeper.wake()
        self._woken()
        if at_once:
            self._rest()

    def _rest(self) -> None:
        """A wake-up of many is followed by a rest: the event loop belongs to the host, and what comes meanwhile goes
        out in one write."""
        if self._channels.to_wake:
            self._wake_some()
            return
        if self._many:
            now = time.perf_counter()
            # What pumps do is done in turns of their own, and cannot be told from what others do in theirs.
            took = now - self._woke_at if self._channels.pumps_due else self._took
            self._rest_length = min(took * self._rest_ratio, _LONGEST_REST)
            self._rests_since = now
        self._waking = False
        self.events = self.bytes = 0
        if self._scheduled:
            self._call_wake()

    def wake_for_page(self, sleeper: Sleeper) -> None:
        """Wake this one when it may read a page: a few in one turn, so that replays do not delay those who are live."""
        self._want_page.append(sleeper)
        if len(self._want_page) == 1:
            self._call_soon(self._let_page)

    def _let_page(self) -> None:
        for _ in range(min(PAGES_AT_ONCE, len(self._want_page))):
            self._want_page.popleft().wake()
        if self._want_page:
            self._call_soon(self._let_page)

    def wake_at_head(self, sleeper: Sleeper) -> None:
        """Wake this one whenever more becomes visible, whatever its filter."""
        self._at_head.add(sleeper)

    def forget(self, sleeper: Sleeper) -> None:
        """It has left."""
        self._at_head.discard(sleeper)
