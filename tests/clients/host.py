"""The host app that the clients talk to: Starlette with the stream installed, on uvicorn, over real sockets.

In a thread of the tests, or as a program of its own that SIGTERM drains and SIGINT ends. After a drain the program
serves again, on the same port and over the same store, as a restarted host over a durable store does.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from opencode_sse_plugin import EventBus, EventStore, Settings, install
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore

#: Of each connection, so that a stalled reader is felt after some hundred kilobytes instead of some megabytes.
SEND_BUFFER = 16 * 1024


class Recorder:
    """Remembers what the clients asked for; outside of everything, and handing on the server's own ``send``."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str | None]] = []

    def around(self, app: ASGIApp) -> ASGIApp:
        async def recording(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] in ("/event", "/global/event") and scope["method"] == "GET":
                cursor = dict(scope["headers"]).get(b"last-event-id")
                self.requests.append(
                    {
                        "path": scope["path"],
                        "query": scope["query_string"].decode(),
                        "last_event_id": None if cursor is None else cursor.decode(),
                    }
                )
            await app(scope, receive, send)

        return recording


def make_app(settings: Settings, store: EventStore, recorder: Recorder) -> ASGIApp:
    """A host with the stream in it; ``/page`` is for browsers."""

    async def requests(request: Request) -> JSONResponse:
        return JSONResponse(recorder.requests)

    async def page(request: Request) -> HTMLResponse:
        return HTMLResponse("<!doctype html><title>host</title>")

    app = Starlette(routes=[Route("/requests", requests), Route("/page", page)])
    bus = EventBus(settings, store=store, plugins=Plugins(discover=False))
    install(app, bus, authorize=None, publish=True)
    return recorder.around(app)


def bound(port: int = 0) -> socket.socket:
    """A socket that has the port, and shares it with the next one."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.bind(("127.0.0.1", port))
    return sock


def make_server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, access_log=False))


class ThreadedHost:
    """A host in a thread; connections that come before it is ready wait in the backlog."""

    def __init__(self, settings: Settings) -> None:
        self._server = make_server(make_app(settings, MemoryEventStore(), Recorder()))
        sock = bound()
        sock.listen()
        self.port: int = sock.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [sock]}, name="host")
        self._thread.start()

    def close(self) -> None:
        """End it; open streams are drained."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the host did not end"


def main(arguments: dict[str, Any]) -> None:
    """Serve generation after generation until SIGINT, saying the port before each."""
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    # uvicorn raises a signal again after it has shut down; the next generation must survive that.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, end)
    store, recorder, holder = MemoryEventStore(), Recorder(), bound()
    port = holder.getsockname()[1]
    while not ended:
        listening = bound(port)
        listening.listen()
        print(json.dumps({"port": port}), flush=True)
        make_server(make_app(Settings(**arguments), store, recorder)).run(sockets=[listening])
    holder.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
