"""sse-starlette: frames as bytes, made once an event, which it passes on as they are; no pings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.metadata import version

from common import serve
from queues import LIMIT, encoded, join, put
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route


async def frames(session: str | None) -> AsyncIterator[bytes]:
    queue, group = join(session)
    try:
        while True:
            yield await queue.get()
    finally:
        group.discard(queue)


async def events(request: Request) -> EventSourceResponse:
    return EventSourceResponse(frames(request.query_params.get("session")), ping=0)


def publish(session: int | None) -> None:
    put(b"data: %b\n\n" % encoded(session), session)


serve(
    Starlette(routes=[Route("/event", events)]),
    publish,
    f"sse-starlette {version('sse-starlette')}, asyncio.Queue({LIMIT}) a subscriber, frames encoded once, no pings, "
    f"uvicorn {version('uvicorn')} with uvloop and httptools",
)
