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
        try:
            async with anyio.create_task_group() as tasks:

                def cut() -> None:
                    transport.abort(servers_own)
                    tasks.cancel_scope.cancel()

                subscription.on_cut = cut
                if direct.supports(scope, send):
                    subscription.write = direct.Writer(send)
                tasks.start_soon(self._listen, receive)
                await self._pump(send, servers_own)
                tasks.cancel_scope.cancel()
        finally:
            self.bus.detach(subscription)

    async def _pump(self, send: Send, servers_own: Send) -> None:
        subscription = self.subscription
        chunk = await subscription.next()
        await send({**_START, "headers": list(HEADERS)})
        write = None  # The first chunk goes the way of the headers.
        try:
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
