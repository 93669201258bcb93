"""Servers on the event loop they are given, so that a test sees what happens inside: on a socket that is bound, until
they are stopped."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from granian.constants import Interfaces
from granian.server.embed import Server as Embedded
from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.types import ASGIApp


class Uvicorn(uvicorn.Server):
    """:param options: of ``uvicorn.Config``."""

    def __init__(self, app: ASGIApp, sock: socket.socket, **options: Any) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5, **options))
        sock.listen()
        self._sock = sock

    async def work(self) -> None:
        await self.serve([self._sock])

    def stop(self) -> None:
        self.should_exit = True


class Hypercorn:
    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        self._app = app
        self._config = Config()
        self._config.errorlog = None
        self._config.bind = [f"fd://{sock.dup().detach()}"]
        sock.listen()
        self._stopped = asyncio.Event()

    async def work(self) -> None:
        await serve(self._app, self._config, shutdown_trigger=self._stopped.wait, mode="asgi")

    def stop(self) -> None:
        self._stopped.set()


class Granian(Embedded):
    """It opens the port of the socket once more."""

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        super().__init__(app, port=sock.getsockname()[1], interface=Interfaces.ASGI, log_enabled=False)

    async def work(self) -> None:
        await self.serve()
