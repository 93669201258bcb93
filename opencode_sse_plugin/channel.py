"""A channel: all that subscribers with the same filter on the same route can still be given, held once for all of them.

A subscriber is a position in it: an absolute index that counts matching events since the channel began. Lag, loss and
delivery are differences of such counts, so that nothing is copied or counted per subscriber.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from .events import StoredEvent
from .filters import Filter
from .frames import Envelope

Chunk = TypeVar("Chunk")

#: A wake-up hands over at most so many payload bytes at once, or one event: a big backlog must not delay the others.
BATCH_BYTES: Final = 64 * 1024
_CACHED_BATCHES: Final = 8
_KEPT_PAGES: Final = 32
_DISPOSED: Final = "server.instance.disposed"


class Reader(Protocol):
    """What a channel knows of a subscription."""

    place: Place
    #: The channel's count of evicted events by type when retention overtook this reader; ``None`` if it did not.
    overtaken: Counter[str] | None

    def give(self) -> bool: ...


class Place(NamedTuple):
    """Where a reader of a channel is. One object for all who are there, never changed but replaced: to move a reader on
    takes one assignment, and whether two are at the same place is seen without looking into it.

    :param at: absolute index of the first event not given or reported. :param bytes_before: payload bytes before that.
    :param position: the sequence number up to which everything has been given or reported.
    :param last_id: the sequence number of the last ``id:`` written.
    """

    at: int = 0
    bytes_before: int = 0
    position: int = 0
    last_id: int = 0


class Batch(NamedTuple, Generic[Chunk]):
    """Neighbouring events, wrapped once for everyone at the same place, and the place behind them."""

    chunk: Chunk
    end: Place


class Step(NamedTuple, Generic[Chunk]):
    """A batch for everyone who waits at one place: whether it leads to the head, and when it was made."""

    chunk: Chunk
    end: Place
    is_level: bool
    at: float


class Page(NamedTuple, Generic[Chunk]):
    """A page of the store as a channel sees it; ``chunk`` is ``None`` where nothing matched."""

    chunk: Chunk | None
    matches: int
    last_match: int
    last: int


class Channel(Generic[Chunk]):
    """One filter and envelope.

    ``events`` holds matching events with a sequence number beyond ``since`` as long as the live window does; ``base``
    and ``base_bytes`` count those that have left it, ``total`` and ``total_bytes`` all.
    """

    # Where everyone has a session of its own there is one for each.
    __slots__ = (
        "_behind",
        "_directory",
        "_evicted_types",
        "_floor",
        "_newest_place",
        "_passes_all",
        "base",
        "base_bytes",
        "dirty",
        "disposals",
        "envelope",
        "events",
        "filter",
        "members",
        "pages",
        "readers",
        "ready",
        "since",
        "start",
        "step",
        "suits",
        "total",
        "total_bytes",
        "waiting",
    )

    def __init__(self, filter: Filter, envelope: Envelope[Chunk], since: int) -> None:
        self.filter = filter
        self.envelope = envelope
        self.since = since
        self.events: deque[StoredEvent] = deque()
        self.base = self.base_bytes = self.total = self.total_bytes = 0
        self.readers: set[Reader] = set()
        self.members = 0
        #: Readers with nothing to do but wait for more. Who is given what has come without its pump stays here.
        self.waiting: dict[Reader, None] = {}
        self.dirty = False
        #: Indexes behind an ``server.instance.disposed`` of the one directory this channel is filtered to.
        self.disposals: list[int] = []
        self._passes_all = filter.everything
        #: Whether every event found under one of its sessions passes its filter.
        self.suits = filter == Filter(sessions=filter.sessions)
        self._directory = (
            next(iter(filter.directories)) if filter.directories and len(filter.directories) == 1 else None
        )
        #: Batches by where they begin, until the next event.
        self.ready: dict[int, Batch[Chunk]] = {}
        #: What readers who wait at one place are given, and that place, until the next event.
        self.start: Place | None = None
        self.step: Step[Chunk] | None = None
        self._newest_place = Place()
        #: Pages of the store by the position before them, wrapped for all who read on from there.
        self.pages: dict[int, Page[Chunk]] = {}
        self._floor = 0
        self._behind = 0
        self._evicted_types: Counter[str] = Counter()

    def accepts(self, event: StoredEvent) -> bool:
        """Whether an event belongs here."""
        return self.envelope.sees(event) and (self._passes_all or self.filter.matches(event))

    def append(self, event: StoredEvent) -> None:
        """Take a matching event."""
        self.events.append(event)
        self.total += 1
        self.total_bytes += len(event.payload)
        if self.ready:
            self.ready.clear()
        self.start = None
        if self._directory is not None and event.type == _DISPOSED and self._ends_with(event):
            self.disposals.append(self.total)

    def _ends_with(self, disposal: StoredEvent) -> bool:
        return self.envelope.name == "event" and (disposal.event.properties or {}).get("directory") == self._directory

    def evict_oldest(self) -> None:
        """Let go of the oldest event, since the live window did; readers that missed it are marked."""
        if self.base >= self._floor:
            self._mark_overtaken()
        event = self.events.popleft()
        if self._behind:
            self._evicted_types[event.type] += 1
        self.start = None
        self.base += 1
        self.base_bytes += len(event.payload)

    def truncate(self, end: int) -> None:
        """Forget the events beyond a sequence number: their history was lost."""
        while self.events and self.events[-1].seq > end:
            event = self.events.pop()
            self.total -= 1
            self.total_bytes -= len(event.payload)
        while self.disposals and self.disposals[-1] > self.total:
            self.disposals.pop()
        self._floor = min(self._floor, self.total)
        self.ready.clear()
        self.pages.clear()
        self.start = None

    def join(self, reader: Reader) -> Place:
        """Begin to track a reader; where it is, by its position."""
        events, place = self.events, reader.place
        offset = bisect_right(events, place.position, key=lambda event: event.seq)
        index = self.base + offset
        before = self.total_bytes - sum(len(events[i].payload) for i in range(offset, len(events)))
        found = Place(index, before, place.position, place.last_id)
        if found != self._newest_place:
            self._newest_place = found
        self.readers.add(reader)
        self._floor = min(self._floor, index)
        return self._newest_place

    def leave(self, reader: Reader) -> None:
        """Stop tracking a reader."""
        self.recovered(reader)
        self.readers.discard(reader)
        self.waiting.pop(reader, None)

    def recovered(self, reader: Reader) -> None:
        """A reader's loss to retention is accounted for; it is at ``reader.place`` again."""
        if reader.overtaken is not None:
            reader.overtaken = None
            self._behind -= 1
            if not self._behind:
                self._evicted_types.clear()
        self._floor = min(self._floor, reader.place.at)

    def lost_types(self, reader: Reader) -> Counter[str]:
        """The evicted events by type that an overtaken reader never got."""
        assert reader.overtaken is not None
        lost = Counter(self._evicted_types)
        lost.subtract(reader.overtaken)
        return +lost

    def _mark_overtaken(self) -> None:
        """Find who has not read the event about to go. The floor is a lower bound of all positions, so that this looks
        at every reader once in a whole window, not once an event."""
        floor = self.total
        for reader in self.readers:
            if reader.overtaken is None:
                if reader.place.at <= self.base:
                    reader.overtaken = Counter(self._evicted_types)
                    self._behind += 1
                else:
                    floor = min(floor, reader.place.at)
        self._floor = floor

    def batch(self, place: Place, epoch: str, stop: int | None = None) -> Batch[Chunk]:
        """Wrap what follows a place, at most ``BATCH_BYTES`` or one event; shared by everyone who asks from there.

        :param stop: the index before which to end.
        """
        index = place.at
        if stop is None:
            found = self.ready.get(index)
            if found is not None:
                return found
        events: list[StoredEvent] = []
        size = 0
        if stop is None and index + 1 == self.total:
            events.append(self.events[-1])
            size = len(events[0].payload)
        else:
            for event in self.between(index, self.total if stop is None else stop):
                if events and size + len(event.payload) > BATCH_BYTES:
                    break
                size += len(event.payload)
                events.append(event)
        last = events[-1].seq
        end = Place(index + len(events), place.bytes_before + size, last, last)
        batch = Batch(self.envelope.batch(events, epoch), end)
        if stop is None and self.members > 1:
            if len(self.ready) >= _CACHED_BATCHES:
                self.ready.clear()
            self.ready[index] = batch
        return batch

    def keep_page(self, position: int, page: Page[Chunk]) -> None:
        """Keep a page for the others who read on from a position."""
        if self.members > 1:
            if len(self.pages) >= _KEPT_PAGES:
                del self.pages[next(iter(self.pages))]
            self.pages[position] = page

    def between(self, start: int, stop: int) -> Iterator[StoredEvent]:
        """The events at absolute indexes ``start`` to ``stop``; both must still be held."""
        events, base = self.events, self.base
        for offset in range(start - base, stop - base):
            yield events[offset]

    def disposal_after(self, index: int) -> int | None:
        """The first index behind a disposal of this channel's directory that lies beyond ``index``."""
        if not self.disposals:
            return None
        at = bisect_right(self.disposals, index)
        return self.disposals[at] if at < len(self.disposals) else None
