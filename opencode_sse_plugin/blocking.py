"""Publishers that wait for subscribers, where an overflow policy asks for it: before the append, in order, each until
one deadline over all subscribers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import anyio

from .events import StoredEvent


class Blocker(Protocol):
    """A subscription whose policy may hold publishers back."""

    def holds(self, events: Sequence[StoredEvent]) -> float | None:
        """For how many seconds a publisher of these has to wait for room; ``None`` if it need not."""

    def too_late(self) -> None:
        """It kept a publisher for too long, and holds none back until it is below half of its limits."""


class Blocking:
    """Who may hold publishers back, and the waiting for them."""

    def __init__(self) -> None:
        self.blockers: dict[Blocker, None] = {}
        self._waiting: set[anyio.Event] = set()
        self._since = 0.0
        self._stopped = False

    def __bool__(self) -> bool:
        return bool(self.blockers)

    def set(self, blocker: Blocker, may_block: bool) -> None:
        """Let a subscription hold publishers back, or no longer."""
        if may_block:
            self.blockers[blocker] = None
        elif self.blockers.pop(blocker, self) is None:
            self.more_room()

    def more_room(self) -> None:
        """A subscription took something, left or changed: whoever waits looks again."""
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
        return self._stopped or all(blocker.holds(events) is None for blocker in self.blockers)

    async def room(self, events: Sequence[StoredEvent]) -> None:
        """Wait until everyone has room for these events; who does not make room in time is on its own."""
        late: set[Blocker] = set()
        while not self._stopped:
            now = anyio.current_time()
            left: list[float] = []
            for blocker in tuple(self.blockers):
                seconds = None if blocker in late else blocker.holds(events)
                if seconds is None:
                    continue
                if self._since + seconds > now:
                    left.append(self._since + seconds - now)
                else:
                    late.add(blocker)
                    blocker.too_late()
            if not left:
                return
            more = anyio.Event()
            self._waiting.add(more)
            try:
                with anyio.move_on_after(min(left)):
                    await more.wait()
            finally:
                self._waiting.discard(more)
