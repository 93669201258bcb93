"""What happens to subscribers while nothing is published: heartbeats, bookmarks, write timeouts, expiring grants.

One task looks at all of them, since a timer per wait would cost more than the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from .clock import Clock
from .log import Log
from .plugins import Plugins
from .settings import Settings
from .subscription import Subscription


class Liveness:
    """Watches the subscriptions of one bus.

    :param subscriptions: those attached now. :param wall: seconds since 1970, for grants.
    """

    def __init__(
        self,
        log: Log,
        settings: Settings,
        plugins: Plugins,
        clock: Clock,
        subscriptions: Iterable[Subscription[Any]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._settings = settings
        self._plugins = plugins
        self._clock = clock
        self._subscriptions = subscriptions
        self._wall = wall

    async def run(self) -> None:
        """Look at everyone, often enough that nothing is late by more than a tenth; until cancelled."""
        interval = min(1.0, self._settings.heartbeat / 10, self._settings.write_timeout / 10)
        while True:
            await self._clock.sleep(interval)
            self.tick()

    def tick(self) -> None:
        """One look."""
        now, wall, settings = self._clock.now(), self._wall(), self._settings
        for subscription in tuple(self._subscriptions):
            expires = subscription.subscriber.grant.expires_at
            if expires is not None and wall >= expires:
                subscription.cut("grant")
            elif subscription.writing_since is not None:
                # Only where a pump writes: an in-process reader may think as long as it likes.
                if subscription.on_cut is not None and now - subscription.writing_since >= settings.write_timeout:
                    subscription.cut("write-timeout")
            elif now - subscription.last_frame >= settings.heartbeat:
                subscription.heartbeat_due = True
                subscription.wake()

    def woken(self) -> None:
        """Those who wait have been woken: warn of the others, where a plugin wants to know."""
        if self._plugins.warns:
            for subscription in tuple(self._subscriptions):
                subscription.warn()

    def moved(self) -> None:
        """More became visible: whoever is level and has moved past a quarter of what the store retains since its last
        ``id:`` gets a bookmark, or a quiet filter would age out."""
        log = self._log
        oldest = log.head
        for subscription in self._subscriptions:
            if subscription.writing_since is not None or not subscription.is_level():
                continue  # It looks itself before it waits again.
            if log.aged(subscription.last_id):
                subscription.heartbeat_due = True
                subscription.wake()
            else:
                oldest = min(oldest, subscription.last_id)
        log.bookmark(oldest)
