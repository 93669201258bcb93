"""What an overflow policy decided about events that one subscriber has not reached yet.

Indexes are absolute, as in the channel. Decided events no longer count as lag.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .channel import Channel, Chunk
from .delivery import DeliveryClasses
from .events import StoredEvent
from .overflow import (
    Backlog,
    Disconnect,
    Lag,
    Limits,
    Merge,
    Outcome,
    OverflowPolicy,
    PolicyRegistry,
    ReadFromStore,
    Skip,
    decide,
)
from .slowness import timed

logger = logging.getLogger("opencode_sse")


class Cause(NamedTuple):
    """Why events are lost: ``exceeded``, the lag before, and the policy's name."""

    exceeded: str
    queued: Lag
    policy: str


@dataclass(order=True, slots=True)
class Range:
    """Skipped events ``start`` to ``stop``."""

    start: int
    stop: int
    size: int = field(compare=False)
    cause: Cause = field(compare=False)


@dataclass(slots=True)
class Removed:
    """Events a policy folded away that retention took before the subscriber reached them."""

    events: int = 0
    bytes: int = 0
    types: Counter[str] = field(default_factory=Counter)


class Edits:
    """A short sorted list of skipped ranges, and single events removed or replaced.

    ``events`` and ``bytes`` are what the decisions take off the lag.
    """

    __slots__ = ("_folds", "_skips", "bytes", "events")

    def __init__(self) -> None:
        self.events = self.bytes = 0
        self._skips: list[Range] = []
        #: index → what is given instead (``None``: nothing), and the size and type of what stood there.
        self._folds: dict[int, tuple[StoredEvent | None, int, str]] = {}

    def __bool__(self) -> bool:
        return bool(self._skips or self._folds)

    def skip_at(self, index: int) -> Range | None:
        """Take the skipped range that begins at an index, if one does."""
        if not self._skips or self._skips[0].start != index:
            return None
        skipped = self._skips.pop(0)
        self.events -= skipped.stop - skipped.start
        self.bytes -= skipped.size
        return skipped

    @property
    def next_skip(self) -> int | None:
        """Where the next skipped range begins."""
        return self._skips[0].start if self._skips else None

    @property
    def folds(self) -> bool:
        """Whether single events are removed or replaced."""
        return bool(self._folds)

    def fold_at(self, index: int, original: StoredEvent) -> StoredEvent | None:
        """Take what is given at an index: the event itself, another in its place, or nothing."""
        if index not in self._folds:
            return original
        given, size, _ = self._folds.pop(index)
        self.events -= given is None
        self.bytes -= size - (given.size if given is not None else 0)
        return given

    def evict(self, channel: Channel[Chunk]) -> Removed:
        """Retention took everything below the channel's base: forget the decisions about it."""
        base = channel.base
        removed = Removed()
        for index in [index for index in self._folds if index < base]:
            given, size, type = self._folds.pop(index)
            self.events -= given is None
            self.bytes -= size - (given.size if given is not None else 0)
            if given is None:
                removed.events += 1
                removed.bytes += size
                removed.types[type] += 1
        while self._skips and self._skips[0].start < base:
            skipped = self._skips.pop(0)
            gone = min(base, skipped.stop)
            size = sum(event.size for event in channel.between(gone, skipped.stop))
            self.events -= gone - skipped.start
            self.bytes -= skipped.size - size
            if gone < skipped.stop:
                self._skips.insert(0, Range(gone, skipped.stop, size, skipped.cause))
        return removed

    def unfold(self) -> None:
        """Take back what was folded and not given yet: what it was folded into may be lost after all."""
        for given, size, _ in self._folds.values():
            self.events -= given is None
            self.bytes -= size - (given.size if given is not None else 0)
        self._folds.clear()

    def truncate(self, total: int, channel: Channel[Chunk]) -> None:
        """The channel forgot everything from an index on: so do the decisions."""
        self.unfold()
        while self._skips and self._skips[-1].stop > total:
            skipped = self._skips.pop()
            kept = max(total, skipped.start)
            size = sum(event.size for event in channel.between(skipped.start, kept))
            self.events -= skipped.stop - kept
            self.bytes -= skipped.size - size
            if kept > skipped.start:
                self._skips.append(Range(skipped.start, kept, size, skipped.cause))

    def backlog(
        self,
        channel: Channel[Chunk],
        index: int,
        lag: Lag,
        limits: Limits,
        blocked: float,
        delivery: DeliveryClasses,
    ) -> Backlog:
        """What a policy may look at: the undecided events from an index on."""
        events: Sequence[StoredEvent] = list(channel.between(index, channel.total))
        if self:
            events = [
                event if at not in self._folds else self._folds[at][0]  # type: ignore[misc]
                for at, event in self._open(events, index)
            ]
        return Backlog(events, lag, limits, blocked, delivery.of, delivery.key, delivery.adds_up, delivery.join)

    def decide(
        self,
        policy: OverflowPolicy | None,
        backlog: Backlog,
        registry: PolicyRegistry,
        channel: Channel[Chunk],
        index: int,
        cause: Cause,
    ) -> Outcome:
        """Ask a policy and take its decision over; one that fails, or leaves too much, disconnects."""
        half = backlog.limits.half
        try:
            with timed(f"overflow policy {cause.policy} held the event loop for"):
                outcome = decide(policy, backlog, registry)
            if not isinstance(outcome, Disconnect | ReadFromStore):
                before = Lag(self.events, self.bytes)
                self.apply(outcome, channel, index, cause)
                events = backlog.lag.events - (self.events - before.events)
                size = backlog.lag.bytes - (self.bytes - before.bytes)
                if events > 1 and (events > half.events or size > half.bytes):
                    raise ValueError(f"its outcome leaves a lag of {events} events and {size} bytes")
            return outcome
        except Exception as error:
            logger.error(
                "overflow policy %s failed, the subscriber is disconnected: %s: %s",
                cause.policy,
                type(error).__name__,
                error,
            )
            return Disconnect()

    def apply(self, outcome: Outcome, channel: Channel[Chunk], index: int, cause: Cause) -> None:
        """Take over a policy's decision.

        :raises ValueError: if it names events that are not in the backlog.
        """
        merge = outcome if isinstance(outcome, Merge) else Merge(skip=outcome) if isinstance(outcome, Skip) else None
        if merge is None:
            raise ValueError(f"{type(outcome).__name__} is not an outcome that can be applied here")
        backlog = list(channel.between(index, channel.total))
        places = [at for at, _ in self._open(backlog, index)] if self else range(index, channel.total)
        for start, stop in merge.skip.ranges:
            if not 0 <= start <= stop <= len(places):
                raise ValueError(f"it skips {start} to {stop} of a backlog of {len(places)}")
        if merge.remove and not 0 <= min(merge.remove) <= max(merge.remove) < len(places):
            raise ValueError(f"it removes events beyond a backlog of {len(places)}")
        for number, event in merge.replace.items():
            self._fold(places[number], backlog[places[number] - index], event)
        for number in merge.remove:
            self._fold(places[number], backlog[places[number] - index], None)
        for start, stop in merge.skip.ranges:
            self._skip([places[number] for number in range(start, stop)], backlog, index, cause)

    def _open(self, events: Sequence[StoredEvent], index: int) -> list[tuple[int, StoredEvent]]:
        """The events about which nothing final was decided, with their absolute indexes."""
        taken = {at for skipped in self._skips for at in range(skipped.start, skipped.stop)}
        taken |= {at for at, (given, _, _) in self._folds.items() if given is None}
        return [(index + n, event) for n, event in enumerate(events) if index + n not in taken]

    def _fold(self, at: int, original: StoredEvent, given: StoredEvent | None) -> None:
        if at in self._folds:
            self.fold_at(at, original)
        if given is not None:
            given.seq = original.seq
        self._folds[at] = (given, original.size, original.type)
        self.events += given is None
        self.bytes += original.size - (given.size if given is not None else 0)

    def _skip(self, places: Sequence[int], backlog: Sequence[StoredEvent], index: int, cause: Cause) -> None:
        lost = set(places)
        for at in places:
            # What was to be given in its place is lost with it, and so is what had been joined to that.
            if at in self._folds:
                self.fold_at(at, backlog[at - index])
                while at - 1 in self._folds and self._folds[at - 1][0] is None:
                    at -= 1
                    self.fold_at(at, backlog[at - index])
                    lost.add(at)
        places = sorted(lost)
        at = 0
        while at < len(places):
            stop = at + 1
            while stop < len(places) and places[stop] == places[stop - 1] + 1:
                stop += 1
            size = sum(backlog[place - index].size for place in places[at:stop])
            self.events += stop - at
            self.bytes += size
            insort(self._skips, Range(places[at], places[stop - 1] + 1, size, cause))
            at = stop
        joined: list[Range] = []
        for skipped in self._skips:
            # What another policy lost before it was replaced is told for itself.
            if joined and joined[-1].stop == skipped.start and joined[-1].cause.policy == skipped.cause.policy:
                joined[-1] = Range(joined[-1].start, skipped.stop, joined[-1].size + skipped.size, skipped.cause)
            else:
                joined.append(skipped)
        self._skips = joined


#: Shared by all about whose events nothing was decided: nearly everyone, nearly always.
UNDECIDED: Final = Edits()
