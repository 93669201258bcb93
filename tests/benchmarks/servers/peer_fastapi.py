"""``fastapi.sse``: ServerSentEvent with ready-made JSON (``raw_data``), one object an event for all subscribers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.metadata import version

from common import serve
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent
from queues import LIMIT, encoded, join, put

app = FastAPI()


@app.get("/event", response_class=EventSourceResponse)
async def events(session: str | None = None) -> AsyncIterator[ServerSentEvent]:
    queue, group = join(session)
    try:
        while True:
            yield await queue.get()
    finally:
        group.discard(queue)


def publish(session: int | None) -> None:
    put(ServerSentEvent(raw_data=encoded(session).decode()), session)


serve(
    app,
    publish,
    f"fastapi {version('fastapi')}, asyncio.Queue({LIMIT}) a subscriber, raw_data encoded once, uvicorn "
    f"{version('uvicorn')} with uvloop and httptools",
)
