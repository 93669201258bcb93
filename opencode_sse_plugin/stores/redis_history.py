"""What one process knows of a log in Redis: how far its listener was told, under which epoch, and how it finds out that
the log is not what it was.

The server can lose what it acknowledged: it restarts from an older file or empty, or a replica that was behind takes
over. Numbers are then given again, to other events. So every script is told the epoch, the newest number and the name
of its event that the asking process knows, and compares; see ``stores/redis.py`` for what is concluded from it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from ..events import StoredEvent
from ..ids import new_epoch
from . import Bounds, StoreListener
from .redis_link import Link
from .redis_log import Extent, extent_of
from .redis_scripts import BEGIN, OPEN, PAGE

#: Of so many of the newest events told their names are kept, to find the last one that still is where it was.
_TRAIL: Final = 1000


class History:
    """Shared by those who append and who read for one store; all of it runs on one event loop."""

    def __init__(self, link: Link, listener: StoreListener) -> None:
        self.link = link
        self.listener = listener
        #: The chain, as it was told last.
        self.bounds = Bounds(1, 0, ())
        #: The last number told.
        self.told = 0
        #: Oldest and newest number and payload bytes, as seen last.
        self.seen = Extent("", (), 1, 0, 0)
        #: Set when an answer to an append says that something is stored which was not told yet.
        self.behind = asyncio.Event()
        self._trail: deque[tuple[int, bytes]] = deque(maxlen=_TRAIL)
        self._last: tuple[int | str, bytes] = ("", b"")
        #: Events of ours that were acknowledged before something that comes before them was told, by first number.
        self._early: dict[int, tuple[Sequence[StoredEvent], Sequence[bytes]]] = {}

    @property
    def epoch(self) -> str:
        """The epoch we know."""
        return self.bounds.epoch if self.bounds.epochs else ""

    @property
    def evidence(self) -> tuple[str, int | str, bytes]:
        """Epoch, number and name of the newest event we know; what a script compares."""
        return (self.epoch, *self._last)

    async def open(self) -> Bounds:
        """Begin at the head of the log, or begin the log. :raises RedisError, OSError: whatever went wrong."""
        while True:
            await self.link.look_at_server()
            answer = await self.link.call(OPEN, new_epoch(), self.link.vouched)
            if answer[0] != b"WHO":
                break
        self.seen = extent_of(answer)
        self.bounds = self.seen.bounds
        self.told = self.seen.head
        if answer[5]:
            self._know(self.told, answer[5])
        return self.bounds

    def learn(self, answer: Sequence[Any], asked: str) -> bool:
        """Take in what an answer says of the log, and tell a new epoch.

        :param asked: the epoch that was ours when the question was asked.
        :return: whether the numbers of the answer mean what ours do.
        """
        if self.epoch != asked:
            return False  # It was given while another answer, of another time, told a new epoch.
        self.seen = extent = extent_of(answer)
        if extent.epoch != asked:
            bounds = extent.bounds
            end = _common_end(self.bounds._replace(latest=self.told), bounds)
            self.bounds = bounds
            self.told = min(self.told, end)
            while self._trail and self._trail[-1][0] > end:
                self._trail.pop()
            self._last = self._trail[-1] if self._trail else ("", b"")
            self._early.clear()
            self.listener.epoch_changed(bounds, end)
        return True

    def tell(self, events: Sequence[StoredEvent], names: Sequence[bytes]) -> None:
        """Tell what follows."""
        self._trail.extend(zip(range(self.told + 1, self.told + 1 + len(names)), names, strict=True))
        self.told = events[-1].seq
        self._last = self._trail[-1]
        self.listener.visible(events)

    def tell_missed(self, oldest: int) -> None:
        """Tell that everything before ``oldest`` was evicted."""
        self.told = oldest - 1
        self._trail.clear()
        self._last = ("", b"")
        self.listener.missed(oldest)

    def acknowledged(self, events: Sequence[StoredEvent], names: Sequence[bytes]) -> None:
        """Our own events have their numbers: tell them if they follow, else when what is before them was told."""
        first = events[0].seq
        if first > self.told + 1:
            self._last = (events[-1].seq, names[-1])
            self._early[first] = (events, names)
            self.behind.set()
        elif first == self.told + 1:
            self.tell(events, names)
            while (early := self._early.pop(self.told + 1, None)) is not None:
                self.tell(*early)
            if not self._early:
                self.behind.clear()

    def forget_early(self) -> None:
        """The reader was faster, and has told them."""
        if self._early:
            self._early = {first: early for first, early in self._early.items() if first > self.told}

    def _know(self, seq: int, name: bytes) -> None:
        self._trail.append((seq, name))
        self._last = (seq, name)

    async def begin_epoch(self, expected: str, end: int | None = None, *, cut: bool = False) -> None:
        """Begin a new epoch, unless somebody was faster.

        :param expected: the epoch that is to end; empty for whichever is the newest. :param end: the last number that
            means what it meant; by default the head. :param cut: whether to delete what is beyond it.
        """
        while True:
            await self.link.look_at_server()
            asked = self.epoch
            good = "" if end is None else end
            answer = await self.link.call(BEGIN, expected, new_epoch(), self.link.vouched, good, int(cut))
            if answer[0] != b"WHO":
                self.learn(answer, asked)
                return

    async def history_was_lost(self, epoch: str) -> None:
        """Our newest event is not where it was in this epoch: find the newest that is, and begin one behind it."""
        trail = list(self._trail)
        answer = await self.link.call(PAGE, "", "", b"", 0, 0, 0)
        good = None  # So much is gone that nothing can be compared; what is lost, is lost from the end.
        if answer[0] != b"NONE" and trail and trail[0][0] <= extent_of(answer).head:
            now = await self.link.scores([name for _, name in trail])
            right = [seq for (seq, _), found in zip(trail, now, strict=True) if seq == found]
            good = right[-1] if right else 0
        await self.begin_epoch(epoch, good)


def _common_end(ours: Bounds, now: Bounds) -> int:
    """Up to where two chains tell the same history."""
    for link in reversed(ours.epochs):
        end, then = now.end_of(link.epoch), ours.end_of(link.epoch)
        if end is not None and then is not None:
            return min(end, then)
    return 0
