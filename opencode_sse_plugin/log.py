"""What is visible in this process: the store's events in sequence order, made visible in slices that cannot overflow a
reader who keeps up.

*Visible* is what this process has handed to its channels, *head* what the store holds; with one process and nothing
under way they are the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel

from .blocking import Blocking
from .channel import WAKE_AT_ONCE, Channels
from .events import StoredEvent
from .overflow import Limits
from .stores import Bounds, EventStore
from .wakeup import call_later, call_soon

#: The live window of a store that keeps more than fits into memory.
WINDOW_EVENTS: Final = 10_000
WINDOW_BYTES: Final = 64 * 1024 * 1024
#: So many readers may read a page of the store in one turn of the event loop.
PAGES_AT_ONCE: Final = 8
#: How long a slice waits for a reader that is in the middle of a write and would overflow, in seconds and steps. One
#: that takes longer is slow, and what happens to it is its overflow policy's business.
_STEP: Final = 0.001
#: A rest is drawn out by so much of its length for one more event, which then waits for nothing. At a steady pace this
#: makes each rest end with an event, and saves a sixth of the writes at the same latency (docs/performance.md).
_DRAWN_OUT: Final = 0.5
#: Half of a rest is enough where so many events wait: with one more, a write would carry a tenth more.
_ENOUGH: Final = 10
#: Seconds. Less than this is not worth a timer; nobody waits for more.
_SHORTEST_REST: Final = 0.0005
_LONGEST_REST: Final = 0.05
_PATIENCE_STEPS: Final = 50


class Follower(Protocol):
    """What the log knows of a subscription."""

    def wake(self) -> None: ...
    def epoch_changed(self, end: int, gone: int) -> None: ...
    def missed(self) -> None: ...
    def crowded(self, slice: Limits) -> bool: ...
    def give_up(self) -> None: ...


class Log:
    """The store as this process sees it.

    :param store: opened by :meth:`open`. :param limits: those of a subscriber for whom nobody changed them.
    :param moved: called whenever something became visible. :param woken: called once a wake-up.
    :param loop_share: of the event loop's time, what waking many may take.
    """

    def __init__(
        self,
        store: EventStore,
        limits: Limits,
        moved: Callable[[], None],
        woken: Callable[[], None],
        loop_share: float = 1.0,
    ) -> None:
        self.store = store
        self.head = 0
        self.bounds = Bounds(1, 0, ())
        #: The current epoch; that of ``bounds``, at hand for every delivery.
        self.epoch = ""
        #: No waiting subscriber's last ``id:`` is older than this.
        self.oldest_bookmark = 0
        #: Whether the window holds whatever the store does, so that what leaves it is gone.
        self.window_is_store = store.kind == "memory"
        keep = store.retention
        self._quarter = Limits(max(1, keep.events // 4), max(1, keep.bytes // 4))
        self.channels = (
            Channels(keep.events, keep.bytes)
            if self.window_is_store
            else Channels(max(WINDOW_EVENTS, 2 * limits.events), max(WINDOW_BYTES, 2 * limits.bytes))
        )
        self.followers: set[Follower] = set()
        #: Who may hold publishers back.
        self.blocking = Blocking(lambda: (Limits(self.head, self.channels.total_bytes), self._slice))
        self._moved = moved
        self._woken = woken
        #: The smallest of all subscribers; a lag within them needs no policy.
        self.limits = self._usual = limits
        self._slice = self._slice_for(limits)
        #: Stored but not visible yet; never another object, since publishers keep it at hand.
        self.arrivals: deque[StoredEvent] = deque()
        self._arrived = anyio.Event()
        self._shown = anyio.Event()
        self._burst_events = self._burst_bytes = 0
        self._wake_scheduled = self._waking = self._many = False
        #: How long a wake-up of many is followed by rest, in lengths of that wake-up.
        self._rest_ratio = 1 / loop_share - 1
        self._woke_at = self._rests_since = self._rest_length = 0.0
        #: What ends a rest that is drawn out, if no event does.
        self._timer: Any = None
        self._waiting_for_head: set[Follower] = set()
        self._want_page: deque[Follower] = deque()

    @property
    def waiting(self) -> int:
        """Events stored but not visible yet."""
        return len(self.arrivals)

    async def open(self) -> None:
        """Open the store and begin at its head."""
        self._call_soon = call_soon()
        self._call_later = call_later()
        self.bounds = await self.store.open(self)
        self.epoch = self.bounds.epoch
        self.head = self.bounds.latest
        self.bookmark(self.head)

    def aged(self, position: int, share: float = 1.0) -> bool:
        """Whether a bookmark lies further back than a quarter of what the store retains, or a share of that."""
        quarter, channels = self._quarter, self.channels
        return self.head - position > quarter.events * share or channels.bytes_after(position) > quarter.bytes * share

    def bookmark(self, oldest: int) -> None:
        """Say what the oldest bookmark is now; ``moved`` is called when it has aged, not before."""
        self.oldest_bookmark = oldest
        self._look_at_head = oldest + self._quarter.events
        channels = self.channels
        self._look_at_bytes = channels.total_bytes - channels.bytes_after(oldest) + self._quarter.bytes

    def follow(self, follower: Follower, limits: Limits) -> None:
        """A subscription attached; slices fit the smallest limits there are."""
        self.followers.add(follower)
        self.limits = Limits(min(self.limits.events, limits.events), min(self.limits.bytes, limits.bytes))
        self._slice = self._slice_for(self.limits)

    def unfollow(self, follower: Follower) -> None:
        """A subscription left."""
        self.followers.discard(follower)
        self._waiting_for_head.discard(follower)
        if not self.followers:
            self.limits = self._usual
            self._slice = self._slice_for(self.limits)

    def _slice_for(self, limits: Limits) -> Limits:
        """Half of the smallest limits, and a quarter of what the window holds, so that nobody is overtaken by it."""
        return Limits(
            max(1, min(limits.events // 2, self.channels.max_events // 4)),
            max(1, min(limits.bytes // 2, self.channels.max_bytes // 4)),
        )

    # What the store tells.

    def visible(self, events: Sequence[StoredEvent]) -> None:
        """Take what follows in the store: a slice is shown at once, the rest after the readers had their turn."""
        if not self.followers and not self.arrivals:
            channels = self.channels
            if self.window_is_store:
                channels.keep(events)
            else:
                channels.skip(events)
            self.head = head = events[-1].seq
            if head > self._look_at_head or channels.total_bytes > self._look_at_bytes:
                self.bookmark(head)
            return
        for event in events:
            if self.arrivals or self._slice_is_full(event):
                self.arrivals.append(event)
            else:
                self._show(event)
        if self.arrivals:
            if self._shown.is_set():
                self._shown = anyio.Event()
            self._arrived.set()
        self._finish_slice()

    def missed(self, oldest: int) -> None:
        """What lies before ``oldest`` was evicted unseen: everyone goes on from the store, which says what is gone."""
        for follower in tuple(self.followers):
            follower.missed()
        self.arrivals.clear()
        self.channels.forget()
        self.head = oldest - 1
        self._finish_slice()

    def epoch_changed(self, bounds: Bounds, end: int) -> None:
        """History beyond ``end`` was lost: forget it, and let everyone beyond it know."""
        self.bounds, self.epoch = bounds, bounds.epoch
        while self.arrivals and self.arrivals[-1].seq > end:
            self.arrivals.pop()
        gone = self.channels.oldest(self.head) - 1  # Before the head moves: an empty window begins behind it.
        self.head = min(self.head, end)
        self.channels.truncate(end)
        self.bookmark(min(self.oldest_bookmark, end))
        self.blocking.look_again()
        for follower in tuple(self.followers):
            follower.epoch_changed(end, gone)
        self._schedule_wake()

    # Making visible.

    def _show(self, event: StoredEvent) -> None:
        self.channels.publish(event)
        self.head = event.seq
        self._burst_events += 1
        self._burst_bytes += len(event.payload)

    def _finish_slice(self) -> None:
        if self.head > self._look_at_head or self.channels.total_bytes > self._look_at_bytes:
            self._moved()
        self._schedule_wake()

    def _schedule_wake(self) -> None:
        if not self._wake_scheduled:
            self._wake_scheduled = True
            if not self._waking:
                self._call_wake()
        elif self._timer is not None and self._rest_left() <= 0:
            self._stop_timer()
            self._call_soon(self.wake)

    def _rest_left(self) -> float:
        length = self._rest_length if self._burst_events < _ENOUGH else self._rest_length / 2
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
        self._wake_scheduled = False
        self._stop_timer()
        if not self._waking:
            self.channels.pumps_due = False
        self.channels.gather()
        if not self._waking:
            self._waking = True
            self._many = len(self.channels.to_wake) >= WAKE_AT_ONCE
            self._woke_at = time.perf_counter()
            self._wake_some()

    def _wake_some(self) -> None:
        more_to_wake = self.channels.wake_some()
        self.blocking.more_room()
        if more_to_wake:
            self._call_soon(self._wake_some)
            return
        # Where a few were given what has come, and nobody else has to be waited for, a turn more would cost as much.
        at_once = not (self._many or self.channels.pumps_due or self._waiting_for_head)
        if not at_once:
            self._call_soon(self._rest)  # Behind the turns of all that were woken.
        if self._waiting_for_head:
            waiting, self._waiting_for_head = self._waiting_for_head, set()
            for follower in waiting:
                follower.wake()
        self._woken()
        if at_once:
            self._rest()

    def _rest(self) -> None:
        """A wake-up of many is followed by a rest: the event loop belongs to the host, and what comes meanwhile goes
        out in one write."""
        if self.channels.to_wake:
            self._wake_some()
            return
        if self._many:
            now = time.perf_counter()
            self._rest_length = min((now - self._woke_at) * self._rest_ratio, _LONGEST_REST)
            self._rests_since = now
        self._waking = False
        self._burst_events = self._burst_bytes = 0
        if self._wake_scheduled:
            self._call_wake()

    def wake_for_page(self, follower: Follower) -> None:
        """Wake this one when it may read a page: a few in one turn, so that replays do not delay those who are live."""
        self._want_page.append(follower)
        if len(self._want_page) == 1:
            self._call_soon(self._let_page)

    def _let_page(self) -> None:
        for _ in range(min(PAGES_AT_ONCE, len(self._want_page))):
            self._want_page.popleft().wake()
        if self._want_page:
            self._call_soon(self._let_page)

    def wake_at_head(self, follower: Follower) -> None:
        """Wake this one whenever more becomes visible, whatever its filter."""
        self._waiting_for_head.add(follower)

    def _slice_is_full(self, event: StoredEvent) -> bool:
        count = self._burst_events
        return count > 0 and (count >= self._slice.events or self._burst_bytes + len(event.payload) > self._slice.bytes)

    def fits_slice(self, events: int, bytes: int) -> bool:
        """Whether so much can become visible at once."""
        return events <= self._slice.events and bytes <= self._slice.bytes

    def first_slice(self, events: Iterable[StoredEvent]) -> list[StoredEvent]:
        """So many of these events, from the first on, as can become visible at once."""
        taken: list[StoredEvent] = []
        size = 0
        for event in events:
            size += len(event.payload)
            if taken and (len(taken) >= self._slice.events or size > self._slice.bytes):
                break
            taken.append(event)
        return taken

    async def pace(self) -> None:
        """Wait until all that is stored is visible, as a publisher should that stores faster than readers read."""
        while self.arrivals:
            await self._shown.wait()

    async def show_arrivals(self) -> None:
        """Show what arrived in bulk, slice by slice, until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived = anyio.Event()
            while self.arrivals:
                await self._let_read()
                if self.blocking:
                    await self.blocking.room(self.first_slice(self.arrivals))
                while self.arrivals and not self._slice_is_full(self.arrivals[0]):
                    self._show(self.arrivals.popleft())
                self._finish_slice()
            self._shown.set()

    async def _let_read(self) -> None:
        """Wake the readers and wait until those that keep up have room for another slice."""
        self.wake()
        await anyio.lowlevel.checkpoint()
        for _ in range(_PATIENCE_STEPS):
            if not self._crowded():
                return
            await anyio.sleep(_STEP)
        for follower in self._crowded():
            follower.give_up()

    def _crowded(self) -> list[Follower]:
        # One event may be larger than a slice.
        first = self.arrivals[0].size if self.arrivals else 0
        next_slice = Limits(self._slice.events, max(self._slice.bytes, first))
        return [follower for follower in self.followers if follower.crowded(next_slice)]
