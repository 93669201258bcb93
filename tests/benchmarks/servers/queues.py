"""What a host writes around a library that has no hub: a bounded queue for every subscriber.

The best it can do: an event is encoded once for all, and a subscriber that is behind loses its oldest one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any, Final

import orjson
from common import payload

LIMIT: Final = 1000
_all: set[asyncio.Queue[Any]] = set()
_of: defaultdict[int, set[asyncio.Queue[Any]]] = defaultdict(set)


def join(session: str | None) -> tuple[asyncio.Queue[Any], set[asyncio.Queue[Any]]]:
    """A queue for a new subscriber, and the set it is to be taken from in the end."""
    queue: asyncio.Queue[Any] = asyncio.Queue(LIMIT)
    group = _all if session is None else _of[int(session.removeprefix("ses_"))]
    group.add(queue)
    return queue, group


def put(item: Any, session: int | None) -> None:
    """Put one item into all queues it belongs to."""
    for queue in _all if session is None else _of.get(session, ()):
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(item)


def encoded(session: int | None) -> bytes:
    return orjson.dumps(payload(session))
