"""The one place that calls ASGI ``send`` for a stream: hands a subscription's chunks to the server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import anyio
from starlette.types import Receive, Scope, Send

from . import direct, hangup, http2, transport
from .bus import EventBus
from .frames import HEADERS
from .subscription import Subscription

_START: Final = {"type": "http.response.start", "status": 200, "headers": list(HEADERS)}

#: Seconds for a write to fail after its connection was ended.
_UNWINDS: Final = 0.5
#: Seconds between the last frame of a stream of HTTP/2 and its ``RST_STREAM``, which overtakes it: granian forgets what
#: it has not sent, and curl and browsers what their program has not taken.
_OVERTAKEN: Final = 0.05
#: Seconds for a reader to take its last frame, at a drain.
_DRAINED: Final = 0.5


class EventStreamResponse:
    """An ASGI response that is a stream.

    It ends cleanly only where the client is not meant to come back; else it returns without the final body message,
    which servers turn into an abort, since SDKs reconnect after nothing else. Whoever runs it closes it.

    Where it :meth:`can_be_stepped`, a caller keeps no frame but its own while the stream waits::

        while await response.give(scope, send):
            await response.subscription.news()
        response.finish(scope, send)
    """

    __slots__ = ("_begun", "_hangup", "bus", "subscription")

    def __init__(self, bus: EventBus, subscription: Subscription[bytes]) -> None:
        self.bus = bus
        self.subscription = subscription
        self._begun = False
        self._hangup: hangup.Hangup | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        servers_own = scope.get(transport.OWN_SEND, send)
        stopping = transport.stopping(servers_own)
        if stopping is not None:
            self.bus.drain_when(stopping)
        stream = http2.stream_of(scope, transport.unwrapped(servers_own))
        try:
            await self._pump(scope, receive, send if stream is None else stream.paced(send), servers_own)
        finally:
            if stream is not None and self.subscription.ending != "clean" and not await stream.reset():
                transport.end_connection(scope)
        self.finish(scope, send)

    async def _pump(self, scope: Scope, receive: Receive, send: Send, servers_own: Send) -> None:
        async with anyio.create_task_group() as tasks:

            def cut() -> None:
                # The end of the connection ends the write as well; cancelling it at the same time hung granian.
                patience = _UNWINDS if transport.abort(scope, servers_own) else 0
                tasks.cancel_scope.deadline = anyio.current_time() + patience

            tasks.start_soon(self._listen, receive)
            while await self.give(scope, send, cut):
                await self.subscription.news()
            if self.subscription.ending == "abort" and scope.get("http_version") == "2":
                await anyio.sleep(_OVERTAKEN)
            tasks.cancel_scope.cancel()

    def can_be_stepped(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether it notices without a task that its client leaves, and a write ends with the connection. From then on
        it does, until it is closed."""
        behind = transport.unwrapped(send)
        if direct.supports(scope, behind) and hangup.can_tell(receive, behind):
            self._hangup = hangup.Hangup(behind, self.subscription)
            self.subscription.wait_at(self._hangup)
        return self._hangup is not None

    async def give(self, scope: Scope, send: Send, cut: Callable[[], object] | None = None) -> bool:
        """Send what there is.

        :param cut: gets it out of a write; the end of the connection does, if not given.
        :return: whether more may come.
        """
        subscription = self.subscription
        servers_own = scope.get(transport.OWN_SEND, send)
        subscription.on_cut = cut or partial(transport.abort, scope, servers_own)
        if self._hangup is not None and transport.is_closed(servers_own):
            self._hangup.has_left()
        try:
            chunk = await subscription.look()
            if not self._begun:
                self._begun = True
                await send({**_START, "headers": list(HEADERS)})
                if chunk is not None:  # The first chunk goes the way of the headers.
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = await subscription.look()
                behind = transport.unwrapped(send)
                if direct.supports(scope, behind):
                    subscription.writer = direct.Writer(behind)
            writer = subscription.writer
            while chunk is not None:
                if writer is None or not writer.write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await subscription.look()
            if subscription.ending == "clean":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, RuntimeError) as error:
            # The client is gone; ASGI servers may say so here (spec 2.4) before `receive` does.
            if isinstance(error, RuntimeError) and not transport.is_closed(servers_own):
                raise
            subscription.end("client")
        finally:
            subscription.on_cut = None
        return subscription.ending is None

    def finish(self, scope: Scope, send: Send) -> None:
        """The stream has ended, and what is not in the client's hands by now is taken soon, or never: a server may wait
        for that for ever."""
        if self.subscription.ending == "abort":
            patience = _DRAINED if self.subscription.reason == "drain" else self.bus.settings.write_timeout
            transport.abort_after(patience, scope, scope.get(transport.OWN_SEND, send))

    def close(self) -> None:
        """Give everything back, however the stream ended."""
        self.bus.detach(self.subscription)
        if self._hangup is not None:
            self._hangup.stop()

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.subscription.end("client")
        if self.subscription.on_cut is not None and self.subscription.writing_since is not None:
            self.subscription.on_cut()
