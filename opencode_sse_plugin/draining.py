"""Ending every stream well: tell everyone, let them read what is queued, cut those that do not read."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

import anyio

from .subscription import Subscription

_FINISH_READERS: Final = 0.5
_FINISH_LAST_FRAMES: Final = 0.1


async def end_streams(
    subscriptions: Collection[Subscription[Any]], retry: int, one_left: Callable[[], Awaitable[None]]
) -> None:
    """Returns when all have ended, after 0.6 s at most.

    :param subscriptions: those attached; whoever leaves leaves the collection too. :param retry: milliseconds.
    :param one_left: waits until the next one has left.
    """
    retry = max(retry, 1)
    for subscription in tuple(subscriptions):
        # Jitter: they must not all come back at once.
        subscription.retry_after_drain = random.randint(retry, 2 * retry)
        subscription.wake()
    await _until_all_ended(subscriptions, _FINISH_READERS, one_left)
    for subscription in tuple(subscriptions):
        subscription.drain_now = True
        subscription.wake()
        if subscription.writing_since is not None:
            subscription.cut("drain")
    await _until_all_ended(subscriptions, _FINISH_LAST_FRAMES, one_left)


async def _until_all_ended(
    subscriptions: Collection[Subscription[Any]], seconds: float, one_left: Callable[[], Awaitable[None]]
) -> None:
    with anyio.move_on_after(seconds):
        while any(subscription.ending is None for subscription in subscriptions):
            await one_left()
