"""The one reader of a process: tells what anybody stored, in sequence order, and notices when history was lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from ..errors import StoreUnavailable
from . import Evicted, Page, Retention
from .redis_history import History
from .redis_link import Backoff, unavailable
from .redis_log import extent_of, name_of, unpacked
from .redis_scripts import PAGE, PRUNE, PRUNE_EVENTS
from .redis_writer import Writer, retention_arguments

logger = logging.getLogger("opencode_sse")

#: A page of others' appends is told at once.
_PAGE_EVENTS: Final = 500
_PAGE_BYTES: Final = 1024 * 1024
#: Seconds between two looks at whether the listener has taken what it was told, and whether our own append is answered.
_SOON: Final = 0.005
_OWN: Final = 0.001
#: For how long what our own appends say is enough, in seconds.
_REST: Final = 0.02
#: Seconds between two looks at age.
_LOOK_AT_AGE: Final = 1.0


class Reader:
    """Waits for news and tells them, until cancelled; a server that is away is waited for."""

    def __init__(self, history: History, writer: Writer, retention: Retention, now: Callable[[], float] | None) -> None:
        self._history = history
        self._link = history.link
        self._writer = writer
        self._retention = retention
        self._now = now
        self._look_at_age = 0.0

    async def run(self) -> None:
        """Tell what is stored, until cancelled."""
        failing = False
        backoff = Backoff()
        while True:
            try:
                await self._look()
                if failing:
                    logger.warning("event store %s is back", self._link.where)
                failing = False
                backoff.reset()
                await self._wait_for_news()
            except Exception as error:  # Whatever it is: one who stops reading shows nothing any more.
                if not failing:
                    failing = True
                    logger.error("%s; trying again until it goes", unavailable(self._link.where, error))
                await self._link.forget_connections()
                await backoff.wait()

    async def _wait_for_news(self) -> None:
        history = self._history
        while True:
            after = history.told
            stored = await self._link.news(after)
            if self._writer.busy:
                await asyncio.sleep(_OWN)  # Most likely our own, whose answer tells it.
            if not stored or history.told == after or history.behind.is_set():
                return
            # While we append, the answers say whether others do too.
            with suppress(TimeoutError):
                async with asyncio.timeout(_REST):
                    await history.behind.wait()
                    await asyncio.sleep(_OWN)  # What is missing may be our own, answered just now.
            if history.behind.is_set():
                return

    async def _look(self) -> None:
        """Tell all that was not told yet, a page at a time."""
        history = self._history
        while True:
            # The next page when the last one has been shown, or a fast process would fill a slow one's memory.
            while history.listener.waiting:  # noqa: ASYNC110 - nothing tells when it has
                await asyncio.sleep(_SOON)
            history.behind.clear()
            asked, after = history.epoch, history.told
            answer = await self._link.call(PAGE, *history.evidence, after, _PAGE_EVENTS, _PAGE_BYTES)
            if answer[0] == b"NONE":
                await history.begin_epoch(asked)
                continue
            if not history.learn(answer, asked):
                continue
            if not answer[5]:
                await history.history_was_lost(asked)
                continue
            if history.epoch == asked:
                self._tell(page_of(answer, after))
            if history.told >= history.seen.head:
                break
        if self._retention.age is not None and time.monotonic() >= self._look_at_age:
            self._look_at_age = time.monotonic() + _LOOK_AT_AGE
            await self.prune_some()

    def _tell(self, page: Page | Evicted) -> None:
        history = self._history
        if isinstance(page, Evicted):
            if page.oldest > history.told + 1:
                history.tell_missed(page.oldest)
            return
        # Some of it may have been told by the answer to an append meanwhile.
        events = [event for event in page.events if event.seq > history.told] if page.events else ()
        if events:
            history.tell(events, [name_of(event) for event in events])
            history.forget_early()

    async def prune_some(self) -> bool:
        """Delete a little of what is beyond retention; whether there may be more."""
        now = "" if self._now is None else int(self._now() * 1000)
        answer = await self._link.call(PRUNE, now, *retention_arguments(self._retention), PRUNE_EVENTS)
        if answer[0] == b"NONE":
            return False
        self._history.seen = extent_of(answer)
        return bool(answer[5])


def page_of(answer: list[Any], after: int) -> Page | Evicted:
    """What an answer says of the events after a position."""
    _, _, _, head, _, _, first, flat = answer
    if first > after + 1:
        return Evicted(first)
    if not flat:
        # Nothing there, where something should be: it is gone.
        return Evicted(head + 1) if after < head else Page([], after)
    try:
        events = [unpacked(after + 1 + i // 2, flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    except ValueError as error:
        raise StoreUnavailable(f"event {after + 1} or one behind it was written by someone else ({error})") from error
    return Page(events, events[-1].seq)
