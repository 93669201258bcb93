"""Hosts as programs of their own, that a signal ends; the first line of output names the URLs of their streams."""

from __future__ import annotations

import asyncio
import json
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from opencode_sse_plugin import EventBus, Settings, install
from opencode_sse_plugin.plugins import Plugins


def host(*paths: str) -> Starlette:
    app = Starlette()
    for path in paths:
        install(app, EventBus(Settings(), plugins=Plugins(discover=False)), path=path, authorize=None)
    return app


async def serve(apps: list[ASGIApp], paths: list[str], **options: str) -> None:
    """Each app on a socket of its own."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in apps]
    print(json.dumps([f"http://127.0.0.1:{s.getsockname()[1]}{path}" for s in sockets for path in paths]), flush=True)
    servers = [uvicorn.Server(uvicorn.Config(app, log_level="error", **options)) for app in apps]
    await asyncio.gather(*(server.serve([s]) for server, s in zip(servers, sockets, strict=True)))


def main(what: str) -> None:
    if what == "no-lifespan":
        asyncio.run(serve([host("")], ["/event"], lifespan="off"))
    elif what == "two-apps":
        asyncio.run(serve([host(""), host("")], ["/event"]))
    elif what == "two-buses":
        asyncio.run(serve([host("", "/two")], ["/event", "/two/event"]))
    elif what == "sub-app":
        outer = Starlette()
        outer.mount("/a", host(""))
        asyncio.run(serve([outer], ["/a/event"]))


if __name__ == "__main__":
    main(sys.argv[1])
