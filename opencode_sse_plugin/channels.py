"""All channels of a process, the live window that bounds what they hold together, and who waits on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from .channel import Channel, Chunk, Reader
from .events import StoredEvent
from .filters import Filter
from .frames import Envelope

#: So many readers are given something in one turn of the event loop, each a write of some 6 µs (docs/performance.md).
WAKE_AT_ONCE: Final = 100

_Index = dict[str | None, list[Channel[object]]]


class Channels:
    """All channels of a process, found by index, and the live window that bounds what they hold together.

    The window keeps the newest visible events within ``max_events`` and ``max_bytes``, each with the channels that
    took it.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self.max_events = max_events
        self.max_bytes = max_bytes
        #: Payload bytes of everything ever visible here, less what was lost with its history, for distances in bytes;
        #: and what of them came before the window.
        self.total_bytes = self._bytes_before = 0
        #: Each event with ``total_bytes`` as it was then.
        self._window: deque[tuple[StoredEvent, Sequence[Channel[object]], int]] = deque()
        self._channels: dict[tuple[Filter, str], Channel[object]] = {}
        #: Where an event finds them: under one of their sessions, else of their types where those are plain names.
        self._by_session: _Index = {}
        self._by_type: _Index = {}
        self._others: _Index = {}
        self._dirty: list[Channel[object]] = []
        #: Who is to be given something by :meth:`wake_some`.
        self.to_wake: deque[Reader] = deque()
        #: Whether a pump needs its turn before this wake-up is over: it was only woken, or was busy.
        self.pumps_due = False

    def __iter__(self) -> Iterator[Channel[object]]:
        return iter(self._channels.values())

    def __len__(self) -> int:
        return len(self._window)

    @property
    def bytes(self) -> int:
        """Payload bytes that the window holds."""
        return self.total_bytes - self._bytes_before

    def get(self, filter: Filter, envelope: Envelope[Chunk], since: int) -> Channel[Chunk]:
        """The channel of a filter and envelope, made if nobody uses it yet; give it back with :meth:`release`."""
        key = (filter, envelope.name)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = Channel(filter, envelope, since)
            for index, place in self._places(filter):
                index.setdefault(place, []).append(channel)
        channel.members += 1
        return channel  # type: ignore[return-value]

    def release(self, channel: Channel[Chunk]) -> None:
        """A subscription no longer uses its channel; the last one closes it."""
        channel.members -= 1
        if channel.members == 0:
            del self._channels[(channel.filter, channel.envelope.name)]
            for index, place in self._places(channel.filter):
                index[place].remove(channel)  # type: ignore[arg-type]
                if not index[place]:
                    del index[place]

    def publish(self, event: StoredEvent) -> None:
        """Make one event visible: give it to the channels it belongs to, let the window's oldest go."""
        taken: Sequence[Channel[object]] = self._taking(event) if self._channels else ()
        for channel in taken:
            channel.append(event)
            if not channel.dirty:
                channel.dirty = True
                self._dirty.append(channel)
        self.total_bytes = total = self.total_bytes + len(event.payload)
        window = self._window
        window.append((event, taken, total))
        if len(window) > self.max_events or total - self._bytes_before > self.max_bytes:
            self._evict(self.max_events, self.max_bytes)

    def keep(self, events: Sequence[StoredEvent]) -> None:
        """Let events into the window for which there is no channel."""
        total, window = self.total_bytes, self._window
        for event in events:
            total += len(event.payload)
            window.append((event, (), total))
        self.total_bytes = total
        if len(window) > self.max_events or total - self._bytes_before > self.max_bytes:
            self._evict(self.max_events, self.max_bytes)

    def skip(self, events: Sequence[StoredEvent]) -> None:
        """Let events pass for which there is no channel, and which a store keeps."""
        if self._window:
            self.forget()
        self.total_bytes = self._bytes_before = self.total_bytes + sum([len(event.payload) for event in events])

    def _taking(self, event: StoredEvent) -> list[Channel[object]]:
        taken: list[Channel[object]] = []
        if self._others:
            taken = [channel for channel in self._others[None] if channel.accepts(event)]
        if self._by_type and (found := self._by_type.get(event.type)):
            taken += [channel for channel in found if channel.accepts(event)]
        if self._by_session and (found := self._by_session.get(event.session)):
            for channel in found:
                if channel.envelope.sees(event) if channel.suits else channel.accepts(event):
                    taken.append(channel)
        return taken

    def _places(self, filter: Filter) -> list[tuple[_Index, str | None]]:
        """Where a channel is looked for: each event finds it at most once."""
        if filter.sessions is not None:
            return [(self._by_session, value) for value in filter.sessions]
        if filter.types and not any("*" in value or "?" in value for value in filter.types[0]):
            return [(self._by_type, value) for value in filter.types[0]]
        return [(self._others, None)]

    def forget(self) -> None:
        """Empty the window."""
        self._evict(0, -1)

    def _evict(self, most: int, most_bytes: int) -> None:
        """Let the oldest go until so much is left at most; the newest stays, unless nothing may."""
        window, total = self._window, self.total_bytes
        while len(window) > most or (total - self._bytes_before > most_bytes and len(window) > 1):
            _, channels, self._bytes_before = window.popleft()
            for channel in channels:
                channel.evict_oldest()

    def truncate(self, end: int) -> None:
        """Forget everything beyond a sequence number."""
        while self._window and self._window[-1][0].seq > end:
            self.total_bytes -= len(self._window.pop()[0].payload)
        for channel in self:
            channel.since = min(channel.since, end)
            channel.truncate(end)

    def gather(self) -> None:
        """Let all who wait on a channel that got something be given it by :meth:`wake_some`."""
        dirty, self._dirty = self._dirty, []
        for channel in dirty:
            channel.dirty = False
            self.to_wake.extend(channel.waiting)
            if len(channel.waiting) < len(channel.readers):
                self.pumps_due = True

    def wake_some(self) -> bool:
        """Give to the next of them, so many that others on the event loop have their turn; whether more are left."""
        to_wake = self.to_wake
        for _ in range(min(WAKE_AT_ONCE, len(to_wake))):
            if not to_wake.popleft().give():
                self.pumps_due = True
        return bool(to_wake)

    def oldest(self, head: int) -> int:
        """The first sequence number the window holds, ``head + 1`` when it is empty."""
        return self._window[0][0].seq if self._window else head + 1

    def bytes_after(self, position: int) -> int:
        """Payload bytes visible after a sequence number, or everything the window holds where it is older."""
        offset = position - self.oldest(position)
        if offset < 0:
            return self.bytes
        return self.total_bytes - self._window[min(offset, len(self._window) - 1)][2]
