"""Who is attached: how a subscriber is let in, finds its policy and leaves, and what all of them came to."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar

import anyio

from .errors import ConfigurationError, Reject
from .events import Cursor
from .frames import Envelope
from .overflow import OverflowPolicy, PolicyRegistry
from .plugins import Plugins
from .settings import Settings
from .subscriber import Grant, Subscriber
from .subscription import Services, Subscription

logger = logging.getLogger("opencode_sse")
Chunk = TypeVar("Chunk")

_SUMS: Final = ("delivered", "dropped", "merged")


class Roster:
    """The subscriptions of a bus.

    :param running: whether it takes any.
    """

    #: Set when the bus opens.
    services: Services

    def __init__(
        self, settings: Settings, plugins: Plugins, policies: PolicyRegistry, running: Callable[[], bool]
    ) -> None:
        self.subscriptions: dict[Subscription[Any], None] = {}
        #: Sums over all that have left, and over what happened here.
        self.counters = Counter({name: 0 for name in ("attached", "rejected", "overflows", *_SUMS)})
        self._settings = settings
        self._plugins = plugins
        self._policies = policies
        self._running = running
        self._left = anyio.Event()

    async def attach(self, subscriber: Subscriber, envelope: Envelope[Chunk], request: Any) -> Subscription[Chunk]:
        """Let a subscriber in; see :meth:`.EventBus.attach`."""
        self._refuse_if_full()
        try:
            await self._plugins.subscriber_attach(subscriber, request)
            self._refuse_if_full()  # Others may have come while the plugins looked.
        except Reject:
            self.counters["rejected"] += 1
            raise
        if subscriber.mode == "live" and subscriber.start.cursor is not None:
            subscriber.mode = "resume"
        if subscriber.policy is None:
            subscriber.policy = self._policy_for(subscriber)
        subscription = Subscription(self.services, subscriber, envelope)
        self.subscriptions[subscription] = None
        self.counters["attached"] += 1
        return subscription

    def detach(self, subscription: Subscription[Any]) -> None:
        """A subscriber left."""
        if self.subscriptions.pop(subscription, self) is None:
            subscription.close()
            subscription.subscriber.position = Cursor(self.services.log.epoch, subscription.position)
            self._left.set()
            self._plugins.subscriber_detach(subscription.subscriber, subscription.reason)

    async def one_left(self) -> None:
        """Wait until the next one leaves."""
        self._left = anyio.Event()
        await self._left.wait()

    def set_overflow_policy(self, subscriber: Subscriber, policy: OverflowPolicy) -> None:
        """Put another policy in charge. :raises LookupError: if the subscriber has left."""
        for subscription in self.subscriptions:
            if subscription.subscriber is subscriber:
                subscription.set_policy(policy)
                return
        raise LookupError(f"subscriber {subscriber.id} is not attached")

    def statistics(self, now: float, caller: Grant | None) -> list[dict[str, Any]]:
        """A line of ``/event/status`` for each that a grant may see; ``None`` sees all."""
        return [
            subscription.statistics(now)
            for subscription in self.subscriptions
            if caller is None or caller.filter.everything or subscription.subscriber.caller == caller.caller
        ]

    def sums(self) -> Counter[str]:
        """Sums over all there ever were."""
        sums = self.counters.copy()
        for subscription in self.subscriptions:
            sums.update({name: getattr(subscription, name) for name in _SUMS})
        return sums

    def _refuse_if_full(self) -> None:
        if not self._running():
            raise Reject(503, "the event stream is draining", {"Retry-After": "1"})
        if len(self.subscriptions) >= self._settings.max_subscribers:
            raise Reject(503, f"there are {self._settings.max_subscribers} subscribers already", {"Retry-After": "5"})

    def _policy_for(self, subscriber: Subscriber) -> OverflowPolicy:
        chosen = self._plugins.overflow_policy(subscriber)
        if chosen is not None and not isinstance(chosen, str):
            return chosen
        try:
            return self._policies.create(chosen or self._settings.overflow)
        except ConfigurationError as error:
            logger.error("sse_overflow_policy chose %r, %s is taken: %s", chosen, self._settings.overflow, error)
            return self._policies.create(self._settings.overflow)
