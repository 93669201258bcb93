"""Noticing that a client has left without a task that waits for it.

``receive`` is a coroutine: to wait in it beside a stream takes a task, its scope, and what these keep, some 5 KB a
stream. The server whose ``send`` is known (:mod:`.direct`) tells its ``receive`` by setting an event; here something
stands in for that event, which tells the stream at once and is where its pump waits. It is an event to the server all
the same, but one without a list of those who wait, of 600 bytes, as long as nobody does.

Everywhere else a task of ``response`` does the same.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, Protocol

from starlette.types import Receive, Send

from .wakeup import AsyncioBell


class Leaver(Protocol):
    """A subscription whose client may leave."""

    def end(self, reason: str) -> None: ...


def can_tell(receive: Receive, send: Send) -> bool:
    """Whether the cycle behind a server's own ``send`` tells when its client leaves: it has the event, and the request
    is complete, so that nothing is left to be received but that.

    Not where ``receive`` is not its own: whoever wrapped it may say that the client left, and has to be asked.
    """
    cycle: Any = getattr(send, "__self__", None)
    event = getattr(cycle, "message_event", None)
    return (
        getattr(receive, "__self__", None) is cycle
        and isinstance(event, asyncio.Event)
        and getattr(cycle, "more_body", None) is False
        and hasattr(cycle, "disconnected")
        and callable(getattr(getattr(cycle, "flow", None), "resume_reading", None))
    )


class Hangup(AsyncioBell):
    """Where the pump of one connection waits, woken by news and by its client's leaving."""

    __slots__ = ("_cycle", "_event", "_is_set", "_leaver")

    def __init__(self, send: Send, leaver: Leaver) -> None:
        super().__init__(asyncio.get_running_loop())
        cycle: Any = send.__self__  # type: ignore[attr-defined]
        before: asyncio.Event = cycle.message_event
        self._cycle = cycle
        self._leaver = leaver
        self._event: asyncio.Event | None = None
        self._is_set = before.is_set()
        cycle.message_event = self
        before.set()  # Whoever waits there looks again, and then waits here.
        cycle.flow.resume_reading()  # As ``receive`` does: unread, the end of a connection stays unseen.
        if cycle.disconnected:
            leaver.end("client")

    def has_left(self) -> None:
        """The connection is closing, of which the server is told later: when what is buffered is gone, or never, since
        of requests in a pipeline only the newest is. It complains of a stream that ends before."""
        self._cycle.disconnected = True
        self._leaver.end("client")

    def stop(self) -> None:
        """Give the server an event of its own back."""
        del self._leaver  # Which has this.
        self._cycle.message_event = event = self._event or asyncio.Event()
        if self._is_set:
            event.set()

    # The server's: see ``asyncio.Event``.

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()
        if self._cycle.disconnected:
            self._leaver.end("client")

    def clear(self) -> None:
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> Literal[True]:
        if not self._is_set:
            if self._event is None:
                self._event = asyncio.Event()
            await self._event.wait()
        return True
