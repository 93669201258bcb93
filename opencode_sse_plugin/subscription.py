"""One subscriber's stream: how it begins, what the pump is given and when, its heartbeats, how it ends.

``next()`` is the whole interface of a pump. Where the reader is and what it lost is :mod:`.position`'s business.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from . import cursors, frames
from .channel import Step
from .edits import UNDECIDED
from .frames import Envelope
from .overflow import Limits
from .position import Chunk, Ending, Position, Services
from .stores import Bounds
from .subscriber import Snapshot, Subscriber
from .wakeup import Bell, new_bell

__all__ = ["Services", "Subscription"]

_WARN_AT: Final = 0.75


class Subscription(Position[Chunk]):
    """One stream, from its first frame to its end."""

    __slots__ = (
        "_bell",
        "_now",
        "_slow",
        "_started",
        "_told_epoch",
        "_warned",
        "drain_now",
        "heartbeat_due",
        "on_cut",
        "retry_after_drain",
        "writing_since",
    )

    def __init__(self, services: Services, subscriber: Subscriber, envelope: Envelope[Chunk]) -> None:
        super().__init__(services, subscriber, envelope)
        self._now = services.clock.now
        self.last_frame = self._now()
        #: Since when the pump has been busy with what it was given; ``None`` while it waits here.
        self.writing_since: float | None = None
        self.heartbeat_due = False
        self.retry_after_drain: int | None = None
        self.drain_now = False
        self.writer = None
        #: Set by a pump that is busy: gets it out of a write that may never return.
        self.on_cut: Callable[[], object] | None = None
        self._waiting = False
        self._told_epoch = self._log.epoch
        self._slow = False
        self._warned = False
        self._started = False
        self._bell = new_bell()
        self._log.follow(self, subscriber.limits)
        self._log.blocking.set(self, self._blocks)

    # The interface of a pump.

    async def next(self) -> Chunk | None:
        """Wait for the next chunk.

        :return: ``None`` at the end; ``ending`` then says how to end the body.
        """
        while True:
            chunk = await self.look()
            if chunk is not None or self.ending is not None:
                return chunk
            await self.news()

    async def look(self) -> Chunk | None:
        """The next chunk, as far as there is one.

        :return: ``None`` at the end, and where nothing is left but to wait for :meth:`news`.
        """
        if self.writing_since is not None:
            self._written()
        else:
            self._stop_waiting()
        chunk = self.quick()
        if chunk is None:
            chunk = await self._next()
        if chunk is not None:
            self.given()
        return chunk

    def news(self) -> Awaitable[object]:
        """What to wait for before the next look: at once after one that found nothing, since otherwise what came in
        between could be missed. Not a coroutine, so that nothing is kept for one that waits for long."""
        if self._live:
            self._channel.waiting[self] = None
        else:
            self._log.fanout.wake_at_head(self)
        # Where what comes next is not just the next events, only the pump can tell.
        self._waiting = self._live and not self._edits
        return self._bell.woken()

    def wait_at(self, bell: Bell) -> None:
        """Have a pump woken there."""
        self._bell = bell

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
        if not count or index < channel.base or channel.disposals or not self._within_limits(count):
            return None
        batch = channel.batch(self.place, self._log.epoch)
        self.place = batch.end
        return batch.chunk

    def given(self) -> None:
        """What was given is being written from now on."""
        self.last_frame = self.writing_since = self._now()
        self.heartbeat_due = False
        if self._blocks:
            if self._late and not self._is_late(self.lag):
                self._log.blocking.look_again()
            self._log.blocking.more_room()

    def _written(self) -> None:
        now = self._now()
        assert self.writing_since is not None
        self._blocked = now - self.writing_since
        self.writing_since = None
        self._slow = False
        if now >= self.last_frame + self.services.settings.heartbeat:
            self.heartbeat_due = True

    async def _next(self) -> Chunk | None:
        if not self._started:
            self._started = True
            await self._open()
        while True:
            if self._outbox:
                return self._first_put()
            if self.ending is not None:
                return None
            if self._expired is not None:
                await self._expire(self._expired)
                continue
            if self.drain_now:
                return self._drain()
            if self._live:
                chunk = self.take()
            else:
                chunk = await self._page()
                if chunk is None and self._must_tell_where():
                    return self._heartbeat()
            if chunk is not None:
                return chunk
            if self._outbox or self.ending is not None or self._expired is not None or not self.is_level():
                continue
            if self._loss is not None:
                continue  # It has just gone live; nothing may acknowledge what was not told yet.
            if self.retry_after_drain is not None:
                return self._drain()
            if self.heartbeat_due:
                return self._heartbeat()
            self._blocked = 0.0
            if self.last_id < self._log.oldest_bookmark:
                if self._log.aged(self.last_id):
                    return self._heartbeat()
                self._log.bookmark(self.last_id)
            return None

    def _first_put(self) -> Chunk:
        assert self._outbox
        chunk = self._outbox.pop(0)
        if not self._outbox:
            self._outbox = None
        return chunk

    def _must_tell_where(self) -> bool:
        """Whether a long search through pages without a match has been silent for too long."""
        if self._loss is not None or self._expired is not None:
            return False  # Its ``id:`` would acknowledge what was not told yet.
        return self.heartbeat_due and self._stop is None and self.subscriber.mode != "terminal"

    async def _turn(self) -> None:
        self._log.fanout.wake_for_page(self)
        await self._bell.woken()

    def _stop_waiting(self) -> None:
        self._waiting = False
        self._channel.waiting.pop(self, None)

    def give(self) -> bool:
        """More has come: write it in place of a pump that waits, or let the pump look.

        :return: ``False`` for the latter.

        A pump waits only where nothing but events can come next, and whatever changes that calls :meth:`wake`.
        """
        writer = self.writer
        if self._waiting and writer is not None:
            channel = self._channel
            step = channel.step if channel.start is self.place else self._step()
            if step is not None and writer.write(step.chunk):
                self.place = step.end
                self.last_frame = step.at
                if step.is_level:
                    return True
            elif self.place.at == channel.total:
                return True
        self.wake()  # A big backlog goes on in turns with the others.
        return False

    def _step(self) -> Step[Chunk] | None:
        """What is written in place of a pump that waits, the same for everyone at this place; ``None`` if that is the
        pump's business."""
        channel, place = self._channel, self.place
        count = channel.total - place.at
        if place.at < channel.base or channel.disposals or not count or not self._within_limits(count):
            return None
        batch = channel.batch(place, self._log.epoch)
        step = Step(batch.chunk, batch.end, batch.end.at == channel.total, self._now())
        if channel.members > 1 and self._log.limits.allow(self.lag):
            channel.start, channel.step = place, step
        return step

    def wake(self) -> None:
        """Let a waiting pump look again. From here on it is the pump's: two writers must never meet."""
        if self._waiting:
            self._stop_waiting()
        self._bell.wake()

    def close(self) -> None:
        """Give everything back; the pump is gone."""
        self._stop_waiting()
        self._channel.leave(self)
        self._log.blocking.set(self, False)
        self._log.channels.release(self._channel)
        self._log.unfollow(self)
        for name in ("delivered", "dropped", "merged"):
            self.services.counters[name] += getattr(self, name)

    def end(self, reason: str, ending: Ending = "abort") -> None:
        """End without another frame."""
        if self.ending is None:
            self.ending, self.reason = ending, reason
            self._outbox = None
            self.wake()

    # What others ask.

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

    # Beginning.

    async def _open(self) -> None:
        has_snapshot = await self._begin()
        if self._stop is None and self.ending is None and not has_snapshot:
            self._join()  # Behind a snapshot it is level only when that was given.

    async def _begin(self) -> bool:
        """Decide where the stream begins, and say so; whether with a snapshot."""
        subscriber, log = self.subscriber, self._log
        start = subscriber.start
        if subscriber.mode == "live":
            head, snapshot = log.head, None
            if subscriber.snapshot:
                _, head, snapshot = await self._look(snapshot=True)
            self._at(head)
            self._say(frames.CONNECTED, id=None if snapshot is not None else self.position)
            return self._give_snapshot(snapshot)
        bounds, _, _ = await self._look()
        refusal = cursors.refusal(start, bounds, replay=self.services.settings.replay)
        terminal = subscriber.mode == "terminal"
        if refusal is None and start.cursor is not None:
            self._at(start.cursor.seq)
            self._classes_until = bounds.latest if start.classes is not None else 0
            self._say(frames.HEARTBEAT if subscriber.mode == "resume" else frames.CONNECTED, id=self.position)
            if terminal:
                self._stop = bounds.latest
            return False
        reason, snapshot = refusal or "malformed", None
        if not terminal:
            bounds, _, snapshot = await self._look(snapshot=True)
        self._at(bounds.latest)
        self._say(frames.CONNECTED, id=None)
        self._say(
            frames.EXPIRED,
            cursors.expired(start, bounds, reason),
            id=None if snapshot is not None else bounds.latest,
        )
        if terminal:
            self.ending, self.reason = "clean", "complete"
        return self._give_snapshot(snapshot)

    async def _expire(self, reason: str) -> None:
        """Tell in mid-stream that what follows the position can no longer be given, and go on at the head."""
        terminal = self.subscriber.mode == "terminal"
        bounds, _, snapshot = await self._look(snapshot=not terminal)
        self._expired = None
        properties = cursors.expired_at(self._told_epoch, self.position, bounds, reason)
        self._told_epoch = bounds.epoch
        self._go_paging()
        self._edits = UNDECIDED
        self.limited = self.leveled = False
        self._at(bounds.latest)
        self._say(frames.EXPIRED, properties, id=None if snapshot is not None else bounds.latest)
        self._give_snapshot(snapshot)
        if terminal:
            self.ending, self.reason = "abort", "expired"

    async def _look(self, *, snapshot: bool = False) -> tuple[Bounds, int, Snapshot | None]:
        """What the store holds, what this process had shown before, and the state that a plugin gives for it.

        All of one epoch: a number that was looked up in another would be told as one of this.
        """
        log, state = self._log, None
        while True:
            epoch, head = log.epoch, log.head
            if snapshot:
                state = await self.services.plugins.snapshot(self.subscriber, head, log.store.bounds)
            bounds = await log.store.bounds()
            if log.epoch == epoch:
                break
        return bounds, head, Snapshot(state.events, head) if state is not None and state.at is None else state

    def _give_snapshot(self, snapshot: Snapshot | None) -> bool:
        if snapshot is None or snapshot.at is None:
            return False
        for event in snapshot.events:
            if self.envelope.sees(event):
                complete = event if event.id else replace(event, id=self.services.new_id())
                self._put(self.envelope.control(complete, None, None))
        self._at(snapshot.at)
        self._say(frames.HEARTBEAT, id=self.position)
        return True

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

    # Control frames.

    def _heartbeat(self) -> Chunk:
        """Where this subscriber is, so that a quiet filter does not age out."""
        self.heartbeat_due = False
        if self._live and self.index == self._channel.total:
            self._at(self._log.head)
        return self._control(frames.HEARTBEAT, id=self.position)

    def _drain(self) -> Chunk:
        retry = self.retry_after_drain or 0
        self.ending, self.reason = "abort", "drain"
        self._retry = retry
        return self._control(frames.DRAINING, {"retry": retry})
