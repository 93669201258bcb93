"""A subscriber's position in the log, and all that follows from it: what to give next, what was lost, when to end.

``next()`` is the whole interface of a pump. A subscription is *paging* (reading the store at the client's pace) or
*live* (at an index of its channel); its limits apply from the moment it was first level with the head.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import anyio.lowlevel

from . import cursors, frames
from .account import Loss
from .channel import BATCH_BYTES, Channel
from .clock import Clock
from .delivery import DeliveryClasses
from .edits import Cause, Edits
from .events import Event, StoredEvent
from .frames import Envelope
from .log import Log
from .overflow import Disconnect, Lag, Limits, Outcome, PolicyRegistry, ReadFromStore, decide
from .plugins import Plugins
from .settings import Settings
from .stores import Evicted
from .subscriber import Snapshot, Subscriber
from .wakeup import new_waiter

logger = logging.getLogger("opencode_sse")
Chunk = TypeVar("Chunk")

PAGE_EVENTS: Final = 500
#: Why the classes that a start left out are not given.
_NOT_ASKED_FOR: Final = Cause("events", Lag(0, 0), "start")
_WARN_AT: Final = 0.75
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


class Subscription(Generic[Chunk]):
    """One stream, from its first frame to its end. ``ending`` and ``reason`` tell how it ended once it has."""

    def __init__(self, services: Services, subscriber: Subscriber, envelope: Envelope[Chunk]) -> None:
        self.services = services
        self.subscriber = subscriber
        self.envelope = envelope
        self.ending: Ending | None = None
        self.reason = "client"
        self.delivered = self.delivered_bytes = self.dropped = self.merged = 0
        #: Up to here everything has been given or reported.
        self.position = 0
        #: Sequence number of the last ``id:`` written.
        self.last_id = 0
        self._now = services.clock.now
        self.last_frame = self._now()
        #: Since when the pump has been busy with what it was given; ``None`` while it waits here.
        self.writing_since: float | None = None
        self.heartbeat_due = False
        self.retry_after_drain: int | None = None
        self.drain_now = False
        #: Set by a pump: gives what is there while the pump waits; whether the pump can go on waiting.
        self.step: Callable[[], bool] | None = None
        #: A write begun by ``step`` that has to wait.
        self.unfinished: Awaitable[None] | None = None
        self._waiting = False
        #: Set by a pump: gets it out of a write that may never return.
        self.on_cut: Callable[[], None] | None = None
        #: Whether it was ever level with the head.
        self.leveled = False
        #: Whether limits apply now; not while it reads what it missed.
        self.limited = False
        self.index = self.bytes_before = 0
        self.overtaken: Counter[str] | None = None
        self._log = services.log
        self._channel: Channel[Chunk] = self._log.channels.get(subscriber.filter, envelope, self._log.head)
        self._live = False
        self._edits = Edits()
        self._loss: Loss | None = None
        self._outbox: deque[Chunk] = deque()
        self._stop: int | None = None
        self._classes_until = 0
        self._expired: str | None = None
        self._told_epoch = self._log.epoch
        self._slow = False
        self._warned = False
        self._blocked = 0.0
        self._started = False
        self._retry: int | None = services.settings.retry
        self._waiter = new_waiter()
        self._log.follow(self, subscriber.limits)

    # The interface of a pump.

    async def next(self) -> Chunk | None:
        """Wait for the next chunk.

        :return: ``None`` at the end; ``ending`` then says how to end the body.
        """
        if self.writing_since is not None:
            self._written()
        chunk = self.quick()
        if chunk is None:
            chunk = await self._next()
        if chunk is not None:
            self.given()
        return chunk

    def quick(self) -> Chunk | None:
        """What a reader that keeps up gets, at once; ``None`` where there is nothing, or anything else to think of."""
        if (
            not self.limited
            or not self._live
            or self.heartbeat_due
            or self.ending is not None
            or self._outbox
            or self._loss is not None
            or self._expired is not None
            or self.retry_after_drain is not None
            or self._edits
        ):
            return None
        channel, index = self._channel, self.index
        count = channel.total - index
        if count == 0 or index < channel.base or channel.disposals:
            return None
        if count > 1:
            limits = self.subscriber.limits
            if count > limits.events or channel.total_bytes - self.bytes_before > limits.bytes:
                return None
        chunk, self.index, size, self.position = channel.batch(index, self._log.epoch)
        self.last_id = self.position
        self.delivered += self.index - index
        self.delivered_bytes += size
        self.bytes_before += size
        return chunk

    def given(self) -> None:
        """What was given is being written from now on."""
        self.last_frame = self.writing_since = self._now()
        self.heartbeat_due = False

    def _written(self) -> None:
        now = self._now()
        assert self.writing_since is not None
        self._blocked = now - self.writing_since
        self.writing_since = None
        self._slow = False
        if now - self.last_frame >= self.services.settings.heartbeat:
            self.heartbeat_due = True

    async def _next(self) -> Chunk | None:
        if not self._started:
            self._started = True
            await self._open()
        while True:
            if self._outbox:
                return self._outbox.popleft()
            if self.ending is not None:
                return None
            if self._expired is not None:
                await self._expire(self._expired)
                continue
            if self.drain_now:
                return self._drain()
            chunk = self.take() if self._live else await self._page()
            if chunk is not None:
                return chunk
            if self._outbox or self.ending is not None or self._expired is not None or not self.is_level():
                continue
            if self.retry_after_drain is not None:
                return self._drain()
            if self.heartbeat_due:
                return self._heartbeat()
            self._blocked = 0.0
            if self.last_id < self._log.oldest_bookmark:
                if self._log.aged(self.last_id):
                    return self._heartbeat()
                self._log.bookmark(self.last_id)
            await self._wait()

    async def _wait(self) -> None:
        if self._live:
            self._channel.waiting[self] = None
        else:
            self._log.wake_at_head(self)
        self._waiting = True
        try:
            await self._waiter.wait()
        finally:
            self._waiting = False
        if self.unfinished is not None:
            rest, self.unfinished = self.unfinished, None
            await rest
            self._written()

    def wake(self) -> None:
        """Let a waiting pump look again, or give what is there in its place."""
        if self.step is not None and self._waiting:
            if self.step():
                self._channel.waiting[self] = None
                return
            # From here on it is the pump's: two writers must never meet.
            self._waiting = False
        self._waiter.wake()

    def close(self) -> None:
        """Give everything back; the pump is gone."""
        self._channel.leave(self)
        self._log.channels.release(self._channel)
        self._log.unfollow(self)
        for name in ("delivered", "dropped", "merged"):
            self.services.counters[name] += getattr(self, name)

    def end(self, reason: str, ending: Ending = "abort") -> None:
        """End without another frame."""
        if self.ending is None:
            self.ending, self.reason = ending, reason
            self._outbox.clear()
            self.wake()

    # What others ask.

    @property
    def lag(self) -> Lag:
        """Matching events and bytes that were not handed over; while paging nothing counts."""
        if not self._live:
            return Lag(0, 0)
        channel, edits = self._channel, self._edits
        return Lag(channel.total - self.index - edits.events, channel.total_bytes - self.bytes_before - edits.bytes)

    def crowded(self, slice: Limits) -> bool:
        """Whether another slice would overflow this reader although it may be keeping up."""
        if not self.limited or self._slow or self.ending is not None:
            return False
        lag, limits = self.lag, self.subscriber.limits
        return lag.events > 0 and (lag.events + slice.events > limits.events or lag.bytes + slice.bytes > limits.bytes)

    def give_up(self) -> None:
        """It had its chance: until it takes something it counts as slow."""
        self._slow = True

    def warn(self) -> None:
        """Tell the plugins once when three quarters of a limit are reached; again after it was down to half of that."""
        lag, limits = self.lag, self.subscriber.limits
        fraction = max(lag.events / limits.events, lag.bytes / limits.bytes) if self.limited else 0.0
        if not self._warned and fraction >= _WARN_AT:
            self._warned = True
            self.services.plugins.subscriber_lag_warning(self.subscriber, fraction)
        elif self._warned and fraction <= _WARN_AT / 2:
            self._warned = False

    def cut(self, reason: str) -> None:
        """End it wherever it is, in the middle of a write if need be."""
        self.end(reason)
        if self.writing_since is not None and self.on_cut is not None:
            self.on_cut()

    def statistics(self, now: float) -> dict[str, Any]:
        """One line of ``/event/status``; ``blocked`` in seconds, ``id`` and counts per connection."""
        subscriber, lag = self.subscriber, self.lag
        return {
            "id": subscriber.id,
            "since": subscriber.since,
            "caller": subscriber.caller,
            "route": subscriber.route,
            "mode": subscriber.mode,
            "filter": subscriber.filter.to_dict(),
            "policy": self._policy_name,
            "limits": subscriber.limits._asdict(),
            "position": self.position,
            "lag": {
                "events": lag.events,
                "bytes": lag.bytes,
                "blocked": 0.0 if self.writing_since is None else now - self.writing_since,
            },
            "delivered": self.delivered,
            "dropped": self.dropped,
            "merged": self.merged,
        }

    def is_level(self) -> bool:
        """Whether there is nothing to do but wait."""
        if self._live:
            return self.index == self._channel.total
        return self._stop is None and self.position >= self._log.head

    # Beginning.

    async def _open(self) -> None:
        await self._begin()
        if self._stop is None and self.ending is None:
            self._join()

    async def _begin(self) -> None:
        """Decide where the stream begins, and say so."""
        subscriber, log = self.subscriber, self._log
        start = subscriber.start
        if subscriber.mode == "live":
            self.position = log.head
            snapshot = await self._snapshot() if subscriber.snapshot else None
            self._say(frames.CONNECTED, id=None if snapshot is not None else self.position)
            self._give_snapshot(snapshot)
            return
        bounds = await log.store.bounds()
        refusal = cursors.refusal(start, bounds, replay=self.services.settings.replay)
        terminal = subscriber.mode == "terminal"
        if refusal is None and start.cursor is not None:
            self.position = start.cursor.seq
            self._classes_until = bounds.latest if start.classes is not None else 0
            self._say(frames.HEARTBEAT if subscriber.mode == "resume" else frames.CONNECTED, id=self.position)
            if terminal:
                self._stop = bounds.latest
            return
        reason = refusal or "malformed"
        snapshot = None if terminal else await self._snapshot()
        self.position = bounds.latest
        self._say(frames.CONNECTED, id=None)
        self._say(
            frames.EXPIRED,
            cursors.expired(start, bounds, reason),
            id=None if snapshot is not None else bounds.latest,
        )
        self._give_snapshot(snapshot)
        if terminal:
            self.ending, self.reason = "clean", "complete"

    async def _expire(self, reason: str) -> None:
        """Tell in mid-stream that what follows the position can no longer be given, and go on at the head."""
        bounds = await self._log.store.bounds()
        terminal = self.subscriber.mode == "terminal"
        snapshot = None if terminal else await self._snapshot()
        self._expired = None
        properties = cursors.expired_at(self._told_epoch, self.position, bounds, reason)
        self._told_epoch = bounds.epoch
        self._go_paging()
        self._edits = Edits()
        self.limited = self.leveled = False
        self.position = bounds.latest
        self._say(frames.EXPIRED, properties, id=None if snapshot is not None else bounds.latest)
        self._give_snapshot(snapshot)
        if terminal:
            self.ending, self.reason = "abort", "expired"

    async def _snapshot(self) -> Snapshot | None:
        head = self._log.head
        snapshot = await self.services.plugins.snapshot(self.subscriber, head)
        if snapshot is None:
            return None
        return snapshot if snapshot.at is not None else Snapshot(snapshot.events, head)

    def _give_snapshot(self, snapshot: Snapshot | None) -> None:
        if snapshot is None or snapshot.at is None:
            return
        for event in snapshot.events:
            complete = event if event.id else Event(event.type, event.properties, self.services.new_id())
            self._outbox.append(self.envelope.control(complete, None, None))
        self.position = snapshot.at
        self._say(frames.HEARTBEAT, id=self.position)

    def epoch_changed(self, end: int, gone: int) -> None:
        """The epoch ended at a sequence number; beyond it this position means nothing.

        :param gone: up to here events had left the live window. Counted as lost beyond ``end``, they never were.
        """
        if self._stop is not None:
            self._stop = min(self._stop, end)
        if self.position > end or (self.overtaken is not None and gone > end):
            self._expired = "epoch"
        else:
            self._told_epoch = self._log.epoch
            self._edits.truncate(self._channel.total, self._channel)
        self.wake()

    # Paging.

    async def _page(self) -> Chunk | None:
        """Read what follows the position from the store; goes live where that leads on without a gap."""
        await anyio.lowlevel.checkpoint()
        log, subscriber = self._log, self.subscriber
        target = log.head if self._stop is None else self._stop
        if self._stop is None and self._join():
            return None
        if self.position >= target:
            if self._stop is not None:
                self.ending, self.reason = "clean", "complete"
            return self._take_loss()
        epoch = log.epoch
        page = await log.store.read(self.position, PAGE_EVENTS, BATCH_BYTES)
        if log.epoch != epoch or self._expired is not None:
            return None
        if isinstance(page, Evicted):
            self._overtaken_by_retention(page.oldest - 1)
            return None
        events: list[StoredEvent] = []
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
            self.position = event.seq
        chunk = self._joined(chunk, events)
        if chunk is None and self.heartbeat_due and self._stop is None and subscriber.mode != "terminal":
            return self._heartbeat()
        return chunk

    def _joined(self, chunk: Chunk | None, events: list[StoredEvent]) -> Chunk | None:
        """Wrap events behind a chunk, and empty the list."""
        if not events:
            return chunk
        self.delivered += len(events)
        self.delivered_bytes += sum(len(event.payload) for event in events)
        self.last_id = events[-1].seq
        wrapped = self.envelope.batch(events, self._log.epoch)
        events.clear()
        return wrapped if chunk is None else chunk + wrapped  # type: ignore[operator]

    def _join(self) -> bool:
        """Go live if the channel holds everything beyond the position."""
        log, channel = self._log, self._channel
        if not max(channel.since, log.channels.oldest(log.head) - 1, self._classes_until) <= self.position <= log.head:
            return False
        self.index, self.bytes_before = channel.join(self, self.position)
        self._live = True
        self._leveled_if_level()
        return True

    def _go_paging(self) -> None:
        if self._live:
            self._channel.leave(self)
            self._live = self.limited = False

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
            self.index = skipped.stop
            self.bytes_before += skipped.size
        if self.index == channel.total:
            self._leveled_if_level()
            return self._take_loss()
        disposal = channel.disposal_after(self.index) if self.leveled else None
        stop = edits.next_skip if edits else disposal
        if edits.folds:
            return self._take_folded(channel.total if stop is None else stop)
        lagged = self._take_loss()
        batch = channel.batch(self.index, self._log.epoch, stop)
        self.delivered += batch.end - self.index
        self.delivered_bytes += batch.size
        self.index = batch.end
        self.bytes_before += batch.size
        self.position = self.last_id = batch.last_seq
        self._leveled_if_level()
        if disposal is not None and batch.end == disposal:
            self.ending, self.reason = "clean", "complete"
        return batch.chunk if lagged is None else lagged + batch.chunk  # type: ignore[operator]

    def _leveled_if_level(self) -> None:
        if not self.limited and self.index == self._channel.total:
            self.leveled = self.limited = True

    def _take_folded(self, stop: int) -> Chunk | None:
        """As ``take``, for a stretch in which a policy removed or replaced events; shared with nobody."""
        channel, edits = self._channel, self._edits
        lagged = self._take_loss()
        events: list[StoredEvent] = []
        size = 0
        for original in channel.between(self.index, stop):
            given = edits.fold_at(self.index, original)
            self.index += 1
            self.bytes_before += len(original.payload)
            self.position = original.seq
            if given is None:
                self.merged += 1
                continue
            events.append(given)
            size += len(given.payload)
            if size >= BATCH_BYTES:
                break
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
        self.position = self._loss.last

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
            loss.dropped_bytes += channel.base_bytes - self.bytes_before - removed.bytes
            loss.by_type.update(channel.lost_types(self))
            loss.by_type.subtract(removed.types)
            loss.by_type = +loss.by_type
            self.dropped += missed
            self.merged += removed.events
            self.index, self.bytes_before = channel.base, channel.base_bytes
            channel.recovered(self)
        else:
            # Nobody in this process counted what went by while it read from the store.
            loss.dropped = loss.dropped_bytes = -1
        self.position = gone
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

    @property
    def _policy_name(self) -> str:
        policy = self.subscriber.policy
        return self.services.settings.overflow if policy is None else policy.name

    def _overflow(self, exceeded: str, lag: Lag) -> None:
        """Ask the policy, and do as it says."""
        channel, subscriber = self._channel, self.subscriber
        backlog = self._edits.backlog(
            channel, self.index, lag, subscriber.limits, self._blocked, self.services.delivery
        )
        outcome: Outcome
        try:
            outcome = decide(subscriber.policy, backlog, self.services.policies)
            cause = Cause(exceeded, lag, self._policy_name)
            if not isinstance(outcome, Disconnect | ReadFromStore):
                self._edits.apply(outcome, channel, self.index, cause)
                half, left = subscriber.limits.half, self.lag
                if left.events > 1 and (left.events > half.events or left.bytes > half.bytes):
                    raise ValueError(f"its outcome leaves a lag of {left.events} events and {left.bytes} bytes")
        except Exception as error:
            logger.error(
                "overflow policy %s failed, the subscriber is disconnected: %s: %s",
                self._policy_name,
                type(error).__name__,
                error,
            )
            outcome = Disconnect()
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
            self._outbox.append(self._lagged(loss, "reconnect"))
            self.ending, self.reason = "abort", "overflow"
        self.services.counters["overflows"] += 1
        self.services.plugins.subscriber_overflow(subscriber, outcome)

    # Control frames.

    def _control(self, type: str, properties: dict[str, Any] | None = None, id: int | None = None) -> Chunk:
        retry, self._retry = self._retry, None
        if id is not None:
            self.last_id = id
        event = Event(type, properties or {}, self.services.new_id())
        return self.envelope.control(event, None if id is None else f"{self._log.epoch}:{id}", retry)

    def _say(self, type: str, properties: dict[str, Any] | None = None, *, id: int | None) -> None:
        self._outbox.append(self._control(type, properties, id))

    def _heartbeat(self) -> Chunk:
        """Where this subscriber is, so that a quiet filter does not age out."""
        self.heartbeat_due = False
        if self._live and self.index == self._channel.total:
            self.position = self._log.head
        return self._control(frames.HEARTBEAT, id=self.position)

    def _drain(self) -> Chunk:
        retry = self.retry_after_drain or 0
        self.ending, self.reason = "abort", "drain"
        self._retry = retry
        return self._control(frames.DRAINING, {"retry": retry})
