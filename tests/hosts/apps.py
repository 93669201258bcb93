"""Hosts as people write them, of either framework."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from opencode_sse_plugin import EventBus, Settings
from opencode_sse_plugin.plugins import Plugins

KINDS = ["starlette", "fastapi"]
#: What ``/hello`` answers; long enough for GZip.
HELLO = "hello " * 200


def new_bus(**settings: Any) -> EventBus:
    """A bus with nothing installed, whatever the environment says."""
    return EventBus(Settings(**settings), plugins=Plugins(discover=False))


def hello(request: Request) -> PlainTextResponse:
    """The host's own business."""
    return PlainTextResponse(HELLO)


def make_host(kind: str, **options: Any) -> Starlette:
    """A host with ``GET /hello``."""
    if kind == "fastapi":
        app = FastAPI(**options)
        app.get("/hello", response_class=PlainTextResponse)(lambda: HELLO)
        return app
    return Starlette(routes=[Route("/hello", hello)], **options)


class Watching(BaseHTTPMiddleware):
    """The kind of middleware that turns an abort into a clean end. Marks what went through it."""

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["x-watched"] = "yes"
        return response
