"""What ``uvicorn --workers 4`` runs: a stream over the store that the environment names. Answers say whose they are."""

from __future__ import annotations

import os

from starlette.types import Message, Receive, Scope, Send

from opencode_sse_plugin import EventBus, Settings, event_app
from opencode_sse_plugin.plugins import Plugins

events = event_app(
    EventBus(Settings(store=os.environ["STORE"]), plugins=Plugins(discover=False)), authorize=None, publish=True
)
PID = str(os.getpid()).encode()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-pid", PID)]
        await send(message)

    await events(scope, receive, named if scope["type"] == "http" else send)
