"""Reading the stream in-process: what ``bus.subscribe()`` gives to iterate over."""

from __future__ import annotations

from collections.abc import Iterator

from .frames import Delivery
from .subscription import Subscription


class Deliveries:
    """What is iterated over in-process. Not a generator, which would have to be closed by whoever breaks out."""

    def __init__(self, subscription: Subscription[tuple[Delivery, ...]]) -> None:
        self._subscription = subscription
        self._ready: Iterator[Delivery] = iter(())

    def __aiter__(self) -> Deliveries:
        return self

    async def __anext__(self) -> Delivery:
        while (delivery := next(self._ready, None)) is None:
            chunk = await self._subscription.next()
            if chunk is None:
                raise StopAsyncIteration
            self._ready = iter(chunk)
        return delivery
