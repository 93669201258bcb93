"""What is visible in this process: the store's events in sequence order, made visible in slices that cannot overflow a
reader who keeps up.

*Visible* is what this process has handed to its channels, *head* what the store holds; with one process and nothing
under way they are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import anyio
import anyio.lowlevel

from .blocking import Blocking
from .channels import Channels
from .events import StoredEvent
from .fanout import Fanout
from .overflow import Limits
from .stores import Bounds, EventStore

#: The live window of a store that keeps more than fits into memory.
WINDOW_EVENTS: Final = 10_000
WINDOW_BYTES: Final = 64 * 1024 * 1024
#: How long a slice waits for a reader that is in the middle of a write and would overflow, in seconds and steps. One
#: that takes longer is slow, and what happens to it is its overflow policy's business.
_STEP: Final = 0.001
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
        self.fanout = Fanout(self.channels, self.blocking.more_room, woken, loop_share)
        self._moved = moved
        #: The smallest of all subscribers; a lag within them needs no policy.
        self.limits = self._usual = limits
        self._slice = self._slice_for(limits)
        #: Stored but not visible yet; never another object, since publishers keep it at hand.
        self.arrivals: deque[StoredEvent] = deque()
        self._arrived = anyio.Event()
        self._shown = anyio.Event()

    @property
    def waiting(self) -> int:
        """Events stored but not visible yet."""
        return len(self.arrivals)

    async def open(self) -> None:
        """Open the store and begin at its head."""
        self.fanout.start()
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
        self.fanout.forget(follower)
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
        self.fanout.schedule()

    # Making visible.

    def _show(self, event: StoredEvent) -> None:
        self.channels.publish(event)
        self.head = event.seq
        fanout = self.fanout
        fanout.events += 1
        fanout.bytes += len(event.payload)

    def _finish_slice(self) -> None:
        if self.head > self._look_at_head or self.channels.total_bytes > self._look_at_bytes:
            self._moved()
        self.fanout.schedule()

    def _slice_is_full(self, event: StoredEvent) -> bool:
        shown, slice = self.fanout, self._slice
        return shown.events > 0 and (shown.events >= slice.events or shown.bytes + len(event.payload) > slice.bytes)

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
        self.fanout.wake()
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
