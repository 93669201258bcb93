"""What happens to subscribers while nothing is published: heartbeats, bookmarks, write timeouts, expiring grants.

One task looks at them, since a timer per wait would cost more than the wait. It looks at each when something may be due
by what was known at the last look: what is delivered meanwhile only postpones that, and need not tell.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import anyio.lowlevel

from .channels import WAKE_AT_ONCE
from .clock import Clock
from .log import Log
from .plugins import Plugins
from .settings import Settings
from .subscription import Subscription

#: Seconds after which everyone is looked at again, however long heartbeats and writes may take.
_LONGEST: Final = 60.0
#: The share of the way to a needed bookmark at which one is given together with those who need it.
_NEARLY: Final = 7 / 8


class Liveness:
    """Watches the subscriptions of one bus, each between :meth:`watch` and :meth:`forget`.

    :param subscriptions: those attached now.
    """

    def __init__(
        self,
        log: Log,
        settings: Settings,
        plugins: Plugins,
        clock: Clock,
        subscriptions: Collection[Subscription[Any]],
    ) -> None:
        self._log = log
        self._settings = settings
        self._plugins = plugins
        self._clock = clock
        self._subscriptions = subscriptions
        #: Seconds between looks, so that nothing is late by more than a tenth.
        self._interval = min(1.0, settings.heartbeat / 10, settings.write_timeout / 10)
        #: A frame or a write that begins after a look makes nothing due sooner than so many seconds after that look.
        self._longest = min(settings.heartbeat, settings.write_timeout, _LONGEST)
        #: Whom to look at, by when: in intervals since the clock began, sixty of which are in use at most.
        self._due: dict[int, dict[Subscription[Any], None]] = {}
        #: What the wall clock shows when the other shows 0; somebody may set it.
        self._offset = clock.wall() - clock.now()

    def watch(self, subscription: Subscription[Any]) -> None:
        """It has attached: look at it from the next time on."""
        self._look_at(subscription, self._clock.now())

    def forget(self, subscription: Subscription[Any]) -> None:
        """It has left."""
        for due in self._due.values():
            due.pop(subscription, None)

    async def run(self) -> None:
        """Look at whoever may need it, time and again; until cancelled."""
        while True:
            await self._clock.sleep(self._interval)
            await self._tick()

    async def _tick(self) -> None:
        now, wall = self._clock.now(), self._clock.wall()
        for number, subscription in enumerate(self._take_due(now, wall), 1):
            if subscription not in self._subscriptions:
                continue  # It left while others were looked at.
            when = self._look(subscription, now, wall)
            if subscription in self._subscriptions:  # It may have left for that.
                self._look_at(subscription, when)
            if number % WAKE_AT_ONCE == 0:  # Those who came together have their heartbeats together.
                await anyio.lowlevel.checkpoint()

    def _take_due(self, now: float, wall: float) -> list[Subscription[Any]]:
        was_set = abs(wall - now - self._offset) > self._interval
        if was_set:
            self._offset = wall - now
        turn = self._turn(now)
        turns = [at for at in self._due if at <= turn or was_set]
        return [subscription for at in turns for subscription in self._due.pop(at)]

    def _look(self, subscription: Subscription[Any], now: float, wall: float) -> float:
        """Do what is due; when more may be."""
        grant, since = subscription.subscriber.grant, subscription.writing_since
        quiet = subscription.last_frame + self._settings.heartbeat
        when = now + self._longest
        if now < quiet:
            when = min(when, quiet)
        if grant.expires_at is not None:
            if wall >= grant.expires_at:
                subscription.cut("grant")
                return when
            when = min(when, max(now, grant.expires_at - self._offset))
        # Only where a pump writes: an in-process reader may think as long as it likes.
        if since is not None and subscription.on_cut is not None:
            stalled = since + self._settings.write_timeout
            if now >= stalled:
                subscription.cut("write-timeout")
                return when
            when = min(when, stalled)
        if since is None and now >= quiet:
            subscription.heartbeat_due = True
            subscription.wake()
        return when

    def _look_at(self, subscription: Subscription[Any], when: float) -> None:
        self._due.setdefault(self._turn(when), {})[subscription] = None

    def _turn(self, when: float) -> int:
        return int(when / self._interval)

    def woken(self) -> None:
        """Those who wait have been woken: warn of the others, where a plugin wants to know."""
        if self._plugins.warns:
            for subscription in tuple(self._subscriptions):
                subscription.warn()

    def moved(self) -> None:
        """More became visible: whoever is level and has moved past a quarter of what the store retains since its last
        ``id:`` gets a bookmark, or a quiet filter would age out. Whoever is close to that gets one as well: thousands
        who follow each other event by event must not all be looked at for each."""
        log = self._log
        oldest = log.head
        for subscription in self._subscriptions:
            if subscription.writing_since is not None or not subscription.is_level():
                continue  # It looks itself before it waits again.
            if log.aged(subscription.last_id, _NEARLY):
                subscription.heartbeat_due = True
                subscription.wake()
            else:
                oldest = min(oldest, subscription.last_id)
        log.bookmark(oldest)
