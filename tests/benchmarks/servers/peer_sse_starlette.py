"""sse-starlette, no pings: frames as bytes, made once an event, which it passes on as they are; or, with the argument
``events``, its own ``ServerSentEvent``, as its documentation shows, which it encodes for each subscriber."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

from common import serve
from queues import LIMIT, encoded, join, put
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

AS_EVENTS = "events" in sys.argv


async def frames(session: str | None) -> AsyncIterator[bytes | ServerSentEvent]:
    queue, group = join(session)
    try:
        while True:
            yield await queue.get()
    finally:
        group.discard(queue)


async def events(request: Request) -> EventSourceResponse:
    return EventSourceResponse(frames(request.query_params.get("session")), ping=0)


def publish(session: int | None) -> None:
    data = encoded(session)
    put(ServerSentEvent(data=data.decode(), sep="\n") if AS_EVENTS else b"data: %b\n\n" % data, session)


serve(
    Starlette(routes=[Route("/event", events)]),
    publish,
    f"sse-starlette {version('sse-starlette')}, asyncio.Queue({LIMIT}) a subscriber, "
    f"{'ServerSentEvent, as documented' if AS_EVENTS else 'frames encoded once'}, no pings, "
    f"uvicorn {version('uvicorn')} with uvloop and httptools",
)
