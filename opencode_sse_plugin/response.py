"""The one place that calls ASGI ``send`` for a stream: pumps a subscription's chunks to the server."""

from __future__ import annotations

from typing import Final

import anyio
from starlette.types import Receive, Scope, Send

from . import direct, transport
from .bus import EventBus
from .frames import HEADERS
from .subscription import Subscription

_START: Final = {"type": "http.response.start", "status": 200, "headers": list(HEADERS)}

#: Seconds for a write to fail after its connection was ended.
_UNWINDS: Final = 0.5
#: Seconds for a reader to take its last frame, at a drain.
_DRAINED: Final = 0.5


class EventStreamResponse:
    """An ASGI response that is a stream.

    It ends cleanly only where the client is not meant to come back; else it returns without the final body message,
    which servers turn into an abort, since SDKs reconnect after nothing else.
    """

    def __init__(self, bus: EventBus, subscription: Subscription[bytes]) -> None:
        self.bus = bus
        self.subscription = subscription

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        subscription = self.subscription
        servers_own = scope.get(transport.OWN_SEND, send)
        stopping = transport.stopping(servers_own)
        if stopping is not None:
            self.bus.drain_when(stopping)
        try:
            async with anyio.create_task_group() as tasks:

                def cut() -> None:
                    # The end of the connection ends the write as well; cancelling it at the same time hung granian.
                    patience = _UNWINDS if transport.abort(scope, servers_own) else 0
                    tasks.cancel_scope.deadline = anyio.current_time() + patience

                subscription.on_cut = cut
                if direct.supports(scope, send):
                    subscription.write = direct.Writer(send)
                tasks.start_soon(self._listen, receive)
                await self._pump(send, servers_own)
                tasks.cancel_scope.cancel()
            if subscription.ending == "abort":
                # What is in the server's hands by now is taken soon, or never: a server may wait for that for ever.
                patience = _DRAINED if subscription.reason == "drain" else self.bus.settings.write_timeout
                transport.abort_after(patience, scope, servers_own)
        finally:
            self.bus.detach(subscription)

    async def _pump(self, send: Send, servers_own: Send) -> None:
        subscription = self.subscription
        chunk = await subscription.next()
        write = None  # The first chunk goes the way of the headers.
        try:
            await send({**_START, "headers": list(HEADERS)})
            while chunk is not None:
                if write is None or not write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk, write = await subscription.next(), subscription.write
            if subscription.ending == "clean":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, RuntimeError) as error:
            # The client is gone; ASGI servers may say so here (spec 2.4) before `receive` does.
            if isinstance(error, RuntimeError) and not transport.is_closed(servers_own):
                raise
            subscription.end("client")

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.subscription.end("client")
        if self.subscription.on_cut is not None and self.subscription.writing_since is not None:
            self.subscription.on_cut()
