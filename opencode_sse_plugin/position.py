"""Where a reader is in the log, what it is given next, and what it lost.

A position is *paging* (reading the store at the client's pace) or *live* (at an index of its channel). Limits apply
from the moment it was first level with the head. Nothing here waits for anything but the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from . import frames
from .account import Loss
from .channel import BATCH_BYTES, Channel, Page, Place
from .clock import Clock
from .delivery import DeliveryClasses
from .edits import UNDECIDED, Cause, Edits
from .events import Event, StoredEvent
from .frames import Envelope
from .log import Log
from .overflow import Backlog, Block, Disconnect, Lag, Limits, OverflowPolicy, PolicyRegistry, ReadFromStore
from .plugins import Plugins
from .settings import Settings
from .stores import Evicted
from .subscriber import Subscriber

Chunk = TypeVar("Chunk")
Taken = TypeVar("Taken", contravariant=True)

#: Pages end where the sequence number is a multiple of this, so that all who replay come to read the same ones.
PAGE_EVENTS: Final = 192
#: Why the classes that a start left out are not given.
_NOT_ASKED_FOR: Final = Cause("events", Lag(0, 0), "start")
Ending = Literal["clean", "abort"]


@dataclass(frozen=True, slots=True)
class Services:
    """What every subscription of a bus shares."""

    log: Log
    settings: Settings
    plugins: Plugins
    policies: PolicyRegistry
    delivery: DeliveryClasses
    clock: Clock
    new_id: Callable[[], str]
    #: Sums over all subscribers there were, for status.
    counters: Counter[str]


class Writer(Protocol[Taken]):
    """Writes for a pump that waits."""

    def write(self, chunk: Taken) -> bool:
        """Write a chunk at once; ``False`` if only the pump can."""
        ...


class _Often(Generic[Chunk]):
    """What every delivery reads and writes: Python sorts slots by name, and a base class's come first, so that these
    lie side by side in the processor's cache."""

    __slots__ = ("_channel", "_waiting", "last_frame", "place", "writer")

    _channel: Channel[Chunk]
    #: Whether a pump waits, and what comes next is just the next events.
    _waiting: bool
    #: When something was written last, by the bus's clock.
    last_frame: float
    place: Place
    #: Set by a pump.
    writer: Writer[Chunk] | None


class Position(_Often[Chunk]):
    """One reader of the log. ``ending`` and ``reason`` tell how its stream ended once it has."""

    # So many attributes in a dict are read more slowly and take 1 KB more.
    __slots__ = (
        "_blocked",
        "_blocks",
        "_classes_until",
        "_edits",
        "_expired",
        "_late",
        "_live",
        "_log",
        "_loss",
        "_not_given",
        "_outbox",
        "_retry",
        "_stop",
        "dropped",
        "ending",
        "envelope",
        "leveled",
        "limited",
        "merged",
        "overtaken",
        "reason",
        "services",
        "subscriber",
    )

    def __init__(self, services: Services, subscriber: Subscriber, envelope: Envelope[Chunk]) -> None:
        self.services = services
        self.subscriber = subscriber
        self.envelope = envelope
        self.ending: Ending | None = None
        self.reason = "client"
        self.dropped = self.merged = 0
        self.place = Place()
        #: Events passed by in the channel without being given, less those that were given from elsewhere.
        self._not_given = 0
        #: Whether it was ever level with the head.
        self.leveled = False
        #: Whether limits apply now; not while it reads what it missed.
        self.limited = False
        self.overtaken: Counter[str] | None = None
        self._log = services.log
        self._channel = self._log.channels.get(subscriber.filter, envelope, self._log.head)
        subscriber.filter = self._channel.filter  # An equal one, kept once for all who share it.
        self._live = False
        self._edits = UNDECIDED
        self._loss: Loss | None = None
        #: What is given before anything else; a list only while there is something.
        self._outbox: list[Chunk] | None = None
        self._stop: int | None = None
        self._classes_until = 0
        self._expired: str | None = None
        self._blocked = 0.0
        self._blocks: bool = getattr(subscriber.policy, "blocks", False)
        self._late = False
        self._retry: int | None = services.settings.retry

    def wake(self) -> None:
        """There is something to look at."""
        raise NotImplementedError

    def give(self) -> bool:
        """There are more events; whether nothing is left to do."""
        raise NotImplementedError

    @property
    def index(self) -> int:
        """See ``Place``."""
        return self.place.at

    @property
    def position(self) -> int:
        """See ``Place``."""
        return self.place.position

    @property
    def last_id(self) -> int:
        """See ``Place``."""
        return self.place.last_id

    @property
    def delivered(self) -> int:
        """Events handed over."""
        return self.place.at - self._not_given

    @property
    def lag(self) -> Lag:
        """Matching events and bytes that were not handed over; while paging nothing counts."""
        if not self._live:
            return Lag(0, 0)
        channel, edits, place = self._channel, self._edits, self.place
        return Lag(channel.total - place.at - edits.events, channel.total_bytes - place.bytes_before - edits.bytes)

    def _move(self, index: int, bytes_before: int, position: int) -> None:
        """Be elsewhere in the channel; nothing in between was given."""
        self._not_given += index - self.index
        self.place = Place(index, bytes_before, position, self.last_id)

    def _gave(self, events: int, last_id: int) -> None:
        """Events were given of which the index does not tell."""
        self._not_given -= events
        self.place = self.place._replace(last_id=last_id)

    def _at(self, position: int) -> None:
        """Everything up to a sequence number was given or reported."""
        self.place = self.place._replace(position=position)

    def is_level(self) -> bool:
        """Whether there is nothing to do but wait."""
        if self._live:
            return self.index == self._channel.total
        return self._stop is None and self.position >= self._log.head

    # Paging.

    async def _page(self) -> Chunk | None:
        """Read what follows the position from the store; goes live where that leads on without a gap."""
        await self._turn()
        log = self._log
        target = log.head if self._stop is None else self._stop
        if self._stop is None and self._join():
            return None
        if self.position >= target:
            if self._stop is not None:
                self.ending, self.reason = "clean", "complete"
            return self._take_loss()
        shared = self._loss is None and self.position >= self._classes_until
        kept = self._channel.pages.get(self.position) if shared else None
        if kept is not None and kept.last <= target:
            return self._take_page(kept)
        epoch = log.epoch
        page = await log.store.read(self.position, PAGE_EVENTS - self.position % PAGE_EVENTS, BATCH_BYTES)
        if log.epoch != epoch or self._expired is not None:
            return None
        if isinstance(page, Evicted):
            self._overtaken_by_retention(page.oldest - 1)
            return None
        events: list[StoredEvent] = []
        if shared and page.last <= target:
            events = [event for event in page.events if self._channel.accepts(event)]
            wrapped = self.envelope.batch(events, epoch) if events else None
            read = Page(wrapped, len(events), events[-1].seq if events else 0, page.last)
            self._channel.keep_page(self.position, read)
            return self._take_page(read)
        chunk: Chunk | None = None
        before = self.position
        for event in page.events:
            if event.seq > target:
                break
            if self._channel.accepts(event):
                if before < self._classes_until and not self._in_classes(event):
                    chunk = self._joined(chunk, events)
                    self._lose((event,), _NOT_ASKED_FOR)
                else:
                    lagged = self._take_loss()
                    chunk = lagged if chunk is None else chunk if lagged is None else chunk + lagged  # type: ignore[operator]
                    events.append(event)
            self._at(event.seq)
        return self._joined(chunk, events)

    async def _turn(self) -> None:
        """Wait for the turn to read a page."""
        raise NotImplementedError

    def _take_page(self, page: Page[Chunk]) -> Chunk | None:
        self._at(page.last)
        if page.matches:
            self._gave(page.matches, page.last_match)
        return page.chunk

    def _joined(self, chunk: Chunk | None, events: list[StoredEvent]) -> Chunk | None:
        """Wrap events behind a chunk, and empty the list."""
        if not events:
            return chunk
        self._gave(len(events), events[-1].seq)
        wrapped = self.envelope.batch(events, self._log.epoch)
        events.clear()
        return wrapped if chunk is None else chunk + wrapped  # type: ignore[operator]

    def _join(self) -> bool:
        """Go live if the channel holds everything beyond the position."""
        log, channel = self._log, self._channel
        if not max(channel.since, log.channels.oldest(log.head) - 1, self._classes_until) <= self.position <= log.head:
            return False
        place = channel.join(self)
        self._not_given += place.at - self.index
        self.place = place
        self._live = True
        self._leveled_if_level()
        return True

    def _go_paging(self) -> None:
        if self._live:
            self._channel.leave(self)
            self._live = self.limited = False

    def missed(self) -> None:
        """What follows was never shown here: look for it in the store."""
        if self._live:
            if self.index == self._channel.total:
                self._at(self._log.head)
            self._go_paging()
        self.wake()

    def _in_classes(self, event: StoredEvent) -> bool:
        classes = self.subscriber.start.classes
        return classes is None or self.services.delivery.of(event) in classes

    # Live.

    def take(self) -> Chunk | None:
        """Give what is there, at once: at most one batch, with what was lost before it. Lets the policy act first."""
        channel = self._channel
        if self.index < channel.base:
            self._overtaken_by_retention(self._log.channels.oldest(self._log.head) - 1)
            if not self._live or self._expired is not None:
                return None
        if self.limited:
            lag = self.lag
            exceeded = self.subscriber.limits.exceeded(lag)
            if exceeded is not None:
                self._overflow(exceeded, lag)
                if self.ending is not None or not self._live:
                    return None
        edits = self._edits
        while edits and (skipped := edits.skip_at(self.index)) is not None:
            self._lose(channel.between(skipped.start, skipped.stop), skipped.cause)
            self._move(skipped.stop, self.place.bytes_before + skipped.size, self.position)
            if edits.next_skip == self.index:
                return self._take_loss()  # What follows was lost under another policy.
        if self.index == channel.total:
            self._leveled_if_level()
            return self._take_loss()
        disposal = channel.disposal_after(self.index) if self.leveled else None
        stop = edits.next_skip if edits else disposal
        if edits.folds:
            return self._take_folded(channel.total if stop is None else stop)
        lagged = self._take_loss()
        batch = channel.batch(self.place, self._log.epoch, stop)
        self.place = batch.end
        self._leveled_if_level()
        if disposal is not None and self.index == disposal:
            self.ending, self.reason = "clean", "complete"
        return batch.chunk if lagged is None else lagged + batch.chunk  # type: ignore[operator]

    def _within_limits(self, count: int) -> bool:
        """Whether its policy need not be asked about a lag of so many events; one event never exceeds a limit."""
        limits = self.subscriber.limits
        distance = self._channel.total_bytes - self.place.bytes_before
        return count == 1 or (count <= limits.events and distance <= limits.bytes)

    def _leveled_if_level(self) -> None:
        if not self.limited and self.index == self._channel.total:
            self.leveled = self.limited = True

    def _take_folded(self, stop: int) -> Chunk | None:
        """As ``take``, for a stretch in which a policy removed or replaced events; shared with nobody."""
        channel, edits = self._channel, self._edits
        lagged = self._take_loss()
        events: list[StoredEvent] = []
        size = 0
        index, before, position, _ = self.place
        for original in channel.between(index, stop):
            given = edits.fold_at(index, original)
            index += 1
            before += len(original.payload)
            position = original.seq
            if given is None:
                self.merged += 1
                continue
            events.append(given)
            size += len(given.payload)
            if size >= BATCH_BYTES:
                break
        self._move(index, before, position)
        self._leveled_if_level()
        return self._joined(lagged, events)

    # Losing.

    def _lose(self, events: Iterable[StoredEvent], cause: Cause) -> None:
        """Count neighbouring events as lost; they are told with the next chunk."""
        if self._loss is None:
            self._loss = Loss(self.position, *cause)
        before = self._loss.dropped
        self._loss.add_all(events)
        self.dropped += self._loss.dropped - before
        self._at(self._loss.last)

    def _overtaken_by_retention(self, gone: int) -> None:
        """Everything up to ``gone`` left the store (or the live window) before this subscriber was given it."""
        channel, log = self._channel, self._log
        if self._live and not log.window_is_store:
            self._go_paging()
            return
        if not self.leveled:
            self._expired = "evicted"
            return
        loss = self._loss = self._loss or Loss(self.position, "retention", self.lag, self._policy_name)
        loss.first = loss.first or self.position + 1
        loss.last = gone
        if self._live:
            removed = self._edits.evict(channel)
            missed = channel.base - self.index - removed.events
            loss.dropped += missed
            loss.dropped_bytes += channel.base_bytes - self.place.bytes_before - removed.bytes
            loss.by_type.update(channel.lost_types(self))
            loss.by_type.subtract(removed.types)
            loss.by_type = +loss.by_type
            self.dropped += missed
            self.merged += removed.events
            self._move(channel.base, channel.base_bytes, gone)
            channel.recovered(self)
        else:
            # Nobody in this process counted what went by while it read from the store.
            loss.dropped = loss.dropped_bytes = -1
            self._at(gone)
        self._leveled_if_level()

    def _take_loss(self) -> Chunk | None:
        """The pending loss as a frame."""
        loss, self._loss = self._loss, None
        if loss is None or not loss.dropped:
            return None
        return self._lagged(loss, "continue")

    def _lagged(self, loss: Loss, action: str) -> Chunk:
        cursor = f"{self._log.epoch}:{loss.after}"
        return self._control(frames.LAGGED, loss.properties(self.subscriber.limits, action, cursor))

    def set_policy(self, policy: OverflowPolicy) -> None:
        """Put another policy in charge from now on: what was lost is told first, what was folded comes as it was."""
        if (lagged := self._take_loss()) is not None:
            self._put(lagged)
        self._edits.unfold()
        self.subscriber.policy = policy
        self._blocks = getattr(policy, "blocks", False)
        self._log.blocking.set(self, self._blocks)

    def has_room_for(self, slice: Limits) -> bool:
        """Whether no publisher of a slice has to wait, now or once this reader is limited."""
        if not self.limited or not self._live or self.ending is not None:
            return True  # It will be limited when it is level, and then there is.
        if self.index == self._channel.total:
            self._late = False
            return True
        lag, limits = self.lag, self.subscriber.limits
        return self._is_late(lag) or (
            lag.events + slice.events <= limits.events and lag.bytes + slice.bytes <= limits.bytes
        )

    def holds(self, events: Sequence[StoredEvent]) -> float | None:
        """For how many seconds its policy lets a publisher of these events wait; ``None`` if it need not."""
        if not self.limited or not self._live or self.ending is not None:
            return None
        if self.index == self._channel.total:
            self._late = False
            return None  # What becomes visible at once fits whoever is level; this is asked of everyone.
        lag, limits = self.lag, self.subscriber.limits
        if self._is_late(lag):
            return None
        if limits.allow(Lag(lag.events + len(events), lag.bytes + sum(len(event.payload) for event in events))):
            return None
        sizes = [event.size for event in events if self._channel.accepts(event)]
        if not sizes or limits.allow(Lag(lag.events + len(sizes), lag.bytes + sum(sizes))):
            return None
        try:
            outcome = self.subscriber.policy(self._backlog(lag)) if self.subscriber.policy is not None else None
        except Exception:
            return None  # It is asked again when it is over its limits, and what it raises is told there.
        return outcome.deadline if isinstance(outcome, Block) else None

    def too_late(self) -> None:
        """It kept a publisher for too long: it is on its policy's ``then`` until it is below half of its limits."""
        self._late = True

    def _is_late(self, lag: Lag) -> bool:
        self._late = self._late and not self.subscriber.limits.half.allow(lag)
        return self._late

    def _backlog(self, lag: Lag) -> Backlog:
        return self._edits.backlog(
            self._channel, self.index, lag, self.subscriber.limits, self._blocked, self.services.delivery
        )

    @property
    def _policy_name(self) -> str:
        policy = self.subscriber.policy
        return self.services.settings.overflow if policy is None else policy.name

    def _overflow(self, exceeded: str, lag: Lag) -> None:
        """Ask the policy, and do as it says."""
        channel, subscriber = self._channel, self.subscriber
        cause = Cause(exceeded, lag, self._policy_name)
        if self._edits is UNDECIDED:
            self._edits = Edits()
        outcome = self._edits.decide(
            subscriber.policy, self._backlog(lag), self.services.policies, channel, self.index, cause
        )
        if isinstance(outcome, Disconnect) and not subscriber.sees_abort:
            # Over HTTP/1.0 an abort looks like a clean end, after which no client comes back.
            outcome = ReadFromStore()
        if isinstance(outcome, ReadFromStore):
            self.limited = False
        elif isinstance(outcome, Disconnect):
            loss = self._loss or Loss(self.position, exceeded, lag, self._policy_name)
            loss.exceeded, loss.queued = exceeded, lag
            before = loss.dropped
            loss.add_all(channel.between(self.index, channel.total))
            self.dropped += loss.dropped - before
            self._loss = None
            self._put(self._lagged(loss, "reconnect"))
            self.ending, self.reason = "abort", "overflow"
        self.services.counters["overflows"] += 1
        self.services.plugins.subscriber_overflow(subscriber, outcome)

    # Control frames.

    def _control(self, type: str, properties: dict[str, Any] | None = None, id: int | None = None) -> Chunk:
        retry, self._retry = self._retry, None
        if id is not None:
            self.place = self.place._replace(last_id=id)
        event = Event(type, properties or {}, self.services.new_id())
        return self.envelope.control(event, None if id is None else f"{self._log.epoch}:{id}", retry)

    def _say(self, type: str, properties: dict[str, Any] | None = None, *, id: int | None) -> None:
        self._put(self._control(type, properties, id))

    def _put(self, chunk: Chunk) -> None:
        """Have a chunk given before anything else, behind those that are already."""
        if self._outbox is None:
            self._outbox = []
        self._outbox.append(chunk)
