"""The store behind ``redis://``: one writer, one reader, and pages for whoever asks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from redis.exceptions import RedisError

from ..errors import StoreUnavailable
from ..events import StoredEvent
from ..wakeup import on_asyncio
from . import DURABLE_RETENTION, Appended, Awaited, Bounds, Evicted, Page, Retention, StoreListener, Submission
from .redis_history import History
from .redis_link import Backoff, Link, passes, unavailable
from .redis_log import Extent, extent_of, keys_of
from .redis_reader import Reader, page_of
from .redis_scripts import PAGE
from .redis_writer import Writer

logger = logging.getLogger("opencode_sse")
Result = TypeVar("Result")

#: Under these the server may throw a log away; with a limit, that is.
_LOSSY_POLICIES: Final = ("allkeys-lru", "allkeys-lfu", "allkeys-random")
#: How long closing waits for what was queued: a bus that drains has given its publishers time already. Seconds.
_FINISH: Final = 0.5
_CANCEL_AGAIN: Final = 0.05


class RedisEventStore:
    """A log in Redis or Valkey, shared by all processes and machines that open it.

    :param url: as redis-py takes it. :param key: name of the log. :param where: what errors call it, by default the
        name. :param patience: how long to wait for the server, in seconds. :param now: seconds since 1970, by which
        events grow old; by default the server's clock.
    """

    kind = "redis"

    def __init__(
        self,
        url: str,
        retention: Retention = DURABLE_RETENTION,
        *,
        key: str = "opencode-sse",
        where: str = "",
        patience: float = 5.0,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.url = url
        self.key = key
        self.retention = retention
        self.where = where or key
        self._patience = patience
        self._now = now
        self._running: _Running | None = None
        self._looking: Link | None = None
        self._seen = Extent("", (), 1, 0, 0)

    async def open(self, listener: StoreListener) -> Bounds:
        if not on_asyncio():
            raise self._not_asyncio()
        link = Link(self.url, self.where, keys_of(self.key))
        history = History(link, listener)
        try:
            bounds = await self._patiently(history.open)
            await self._warn(link)
        except BaseException:
            await link.close()
            raise
        self._running = _Running(history, self.retention, self._patience, self._now)
        return bounds

    async def open_to_read(self) -> Bounds:
        """Make ``read`` and ``bounds`` work, in place of ``open``, on a log that is there; nothing is written.

        :raises StoreUnavailable: if there is no log.
        """
        if not on_asyncio():
            raise self._not_asyncio()
        self._looking = link = Link(self.url, self.where, keys_of(self.key))
        try:
            return await self.bounds()
        except BaseException:
            self._looking = None
            await link.close()
            raise

    async def close(self) -> None:
        looking, self._looking = self._looking, None
        if looking is not None:
            await looking.close()
        running, self._running = self._running, None
        if running is not None:
            await running.close()

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        writer = self._opened().writer
        if not events:
            return Appended([], 0)
        submission = Awaited(events)
        job = writer.submit(submission)
        try:
            return await submission.outcome()
        finally:
            job.over = True  # Cancelled, it is not sent any more unless it was already.

    def submit(self, submission: Submission) -> None:
        """As :meth:`append`; see :class:`.GroupingStore`."""
        self._opened().writer.submit(submission)

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        return page_of(await self._page(after, limit, max_bytes), after)

    async def bounds(self) -> Bounds:
        self._seen = extent_of(await self._page(0, 0, 0))
        return self._seen.bounds

    async def _page(self, *arguments: int) -> list[Any]:
        looking = self._looking
        link = self._opened().history.link if looking is None else looking

        async def ask() -> list[Any]:
            while True:
                answer = await link.call(PAGE, "", "", b"", *arguments)
                if answer[0] != b"NONE":
                    return answer
                if looking is not None:
                    raise StoreUnavailable(f"event store {self.where}: there is no log of this name")
                history = self._opened().history
                await history.begin_epoch(history.epoch)

        return await self._patiently(ask)

    async def begin_epoch(self, end: int | None = None) -> None:
        """Lose all history beyond ``end``, by default none, and go on under a new epoch."""
        history = self._opened().history
        await self._patiently(lambda: history.begin_epoch("", end, cut=True))

    async def prune(self) -> None:
        """Delete all that is beyond retention now, in small steps."""
        reader = self._opened().reader
        while await self._patiently(reader.prune_some):
            pass

    def statistics(self) -> dict[str, int]:
        """Bounds, events and bytes, as this process saw them last."""
        seen = self._seen if self._looking is not None else self._opened().history.seen
        return {"oldest": seen.oldest, "latest": seen.head, "events": seen.head - seen.oldest + 1, "bytes": seen.bytes}

    def _not_asyncio(self) -> StoreUnavailable:
        return StoreUnavailable(f"event store {self.where}: redis:// needs asyncio, and this event loop is another")

    def _opened(self) -> _Running:
        if self._running is None:
            raise StoreUnavailable(f"event store {self.where} is not open")
        return self._running

    async def _patiently(self, ask: Callable[[], Awaitable[Result]]) -> Result:
        """Ask until there is an answer. :raises StoreUnavailable: if there is none in time, or never will be."""
        backoff = Backoff()
        trouble: Exception = TimeoutError(f"no answer within {self._patience:g} s")
        deadline = asyncio.get_running_loop().time() + self._patience
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while asyncio.get_running_loop().time() < deadline:
                    try:
                        return await ask()
                    except (RedisError, OSError) as error:
                        if not passes(error):
                            raise unavailable(self.where, error) from error
                        trouble = error
                    await backoff.wait()
        raise unavailable(self.where, trouble) from trouble

    async def _warn(self, link: Link) -> None:
        with suppress(RedisError, OSError):
            policy = await link.memory_policy()
            if policy in _LOSSY_POLICIES:
                logger.warning(
                    "event store %s: with maxmemory-policy %s the server throws the log away when its memory is full; "
                    "noeviction keeps it",
                    self.where,
                    policy,
                )


class _Running:
    """What a store is while it is open."""

    def __init__(
        self, history: History, retention: Retention, patience: float, now: Callable[[], float] | None
    ) -> None:
        self.history = history
        self.writer = Writer(history, retention, patience, now)
        self.reader = Reader(history, self.writer, retention, now)
        self._tasks = [
            *(asyncio.create_task(way.run(), name="opencode-sse redis writer") for way in self.writer.ways),
            asyncio.create_task(self.reader.run(), name="opencode-sse redis reader"),
        ]

    async def close(self) -> None:
        """Finish what was queued, if it takes no time, and end."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FINISH):
                    await self.writer.finish()
        finally:
            pending = set(self._tasks)
            while pending:  # redis-py swallows a cancellation that comes while it connects.
                for task in pending:
                    task.cancel()
                _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN)
            await self.writer.give_up()
            await self.history.link.close()
