"""Publishers that wait for subscribers, where an overflow policy asks for it: before the append, in order, each until
one deadline over all subscribers.

Nobody's room shrinks by more than what becomes visible. So whoever had room for a whole slice need not be asked again
until so much has become visible since: an append asks those who are close to their limits, and not everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

import anyio

from .events import StoredEvent
from .overflow import Limits

_NOTHING: Final = Limits(0, 0)


class Blocker(Protocol):
    """A subscription whose policy may hold publishers back."""

    def has_room_for(self, slice: Limits) -> bool:
        """Whether there is room for so much, or nobody is held back before :meth:`Blocking.look_again` is called."""

    def holds(self, events: Sequence[StoredEvent]) -> float | None:
        """For how many seconds a publisher of these has to wait for room; ``None`` if it need not."""

    def too_late(self) -> None:
        """It kept a publisher for too long, and holds none back until it is below half of its limits."""


class Blocking:
    """Who may hold publishers back, and the waiting for them.

    :param visible: how many events and bytes ever became visible, and how many may at once: at most half of what
        anybody's limits allow.
    """

    def __init__(self, visible: Callable[[], tuple[Limits, Limits]]) -> None:
        #: Never another object, since publishers keep it at hand.
        self.blockers: dict[Blocker, None] = {}
        self._visible = visible
        #: Who had no room for a slice when everyone was asked, and what may be visible until everyone is again.
        self._close: list[Blocker] = []
        self._until = _NOTHING
        self._waiting: set[anyio.Event] = set()
        self._since = 0.0
        self._stopped = False

    def __bool__(self) -> bool:
        return bool(self.blockers)

    def set(self, blocker: Blocker, may_block: bool) -> None:
        """Let a subscription hold publishers back, or no longer."""
        if may_block:
            self.blockers[blocker] = None
        elif self.blockers.pop(blocker, self) is not None:
            return
        self.look_again()
        self.more_room()

    def look_again(self) -> None:
        """Somebody has less room than was known: the next append asks everyone."""
        self._until = _NOTHING

    def more_room(self) -> None:
        """Subscriptions took something, left or changed: whoever waits looks again."""
        for waiting in self._waiting:
            waiting.set()

    def stop(self) -> None:
        """Nobody waits any more; the bus drains."""
        self._stopped = True
        self.more_room()

    def begin(self, since: float) -> None:
        """What is published next was published at this time of the event loop: its deadline counts from there."""
        self._since = since

    def has_room(self, events: Sequence[StoredEvent]) -> bool:
        """Whether nobody holds these back."""
        return self._stopped or all(blocker.holds(events) is None for blocker in self._to_ask(events))

    async def room(self, events: Sequence[StoredEvent]) -> None:
        """Wait until everyone has room for these events; who does not make room in time is on its own."""
        late: set[Blocker] = set()
        while not self._stopped:
            now = anyio.current_time()
            left: list[float] = []
            for blocker in self._to_ask(events):
                seconds = None if blocker in late else blocker.holds(events)
                if seconds is None:
                    continue
                if self._since + seconds > now:
                    left.append(self._since + seconds - now)
                else:
                    late.add(blocker)
                    blocker.too_late()
                    self.look_again()
            if not left:
                return
            more = anyio.Event()
            self._waiting.add(more)
            try:
                with anyio.move_on_after(min(left)):
                    await more.wait()
            finally:
                self._waiting.discard(more)

    def _to_ask(self, events: Sequence[StoredEvent]) -> Collection[Blocker]:
        """Those of whom it is not known that they have room for these."""
        visible, slice = self._visible()
        count, size = len(events), sum(len(event.payload) for event in events)
        if count > slice.events or size > slice.bytes:
            return tuple(self.blockers)  # One event may be larger than a slice.
        if visible.events + count > self._until.events or visible.bytes + size > self._until.bytes:
            self._until = Limits(visible.events + slice.events, visible.bytes + slice.bytes)
            self._close = [blocker for blocker in self.blockers if not blocker.has_room_for(slice)]
        return self._close
