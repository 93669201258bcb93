"""A host on a real server, and a client that tells how a body ended: after a final chunk, or without one."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, Literal, TypeVar

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.types import ASGIApp

from opencode_sse_plugin import EventBus
from opencode_sse_plugin.testing import Frame, parse_frame

from . import witness
from .running import Uvicorn

TIMEOUT = 30.0
#: Of each connection, so that a stalled reader is felt after some hundred kilobytes instead of some megabytes.
BUFFER = 16 * 1024
Result = TypeVar("Result")


class Served:
    """An app on a server, in a thread, on a free port.

    :param bus: drained at the end, so that no open stream holds the server up.
    :param program: one of those in ``running``. :param uvloop: whether on uvloop. :param options: of the program.
    """

    def __init__(
        self,
        app: ASGIApp,
        bus: EventBus,
        *,
        program: Callable[..., Any] = Uvicorn,
        uvloop: bool = False,
        **options: Any,
    ) -> None:
        self.bus = bus
        self._stack = ExitStack()
        portal = start_blocking_portal("asyncio", {"use_uvloop": uvloop})
        self._portal: BlockingPortal = self._stack.enter_context(portal)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # For a program that opens one of its own.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        sock.bind(("127.0.0.1", 0))
        self.port: int = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = program(app, sock, **options)
        self._serving: Future[None] = self._portal.start_task_soon(self.server.work)
        self._stack.callback(sock.close)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._wait_for_its_own()

    def _wait_for_its_own(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not self._serving.done():
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port), TIMEOUT):
                return
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.01)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function, or await a coroutine function, on the server's event loop."""
        return self._portal.call(function, *args)

    def start(self, function: Callable[..., Awaitable[Result]], *args: Any) -> Future[Result]:
        """Begin a coroutine function there."""
        return self._portal.start_task_soon(function, *args)

    def until(self, condition: Callable[[], Result], what: str) -> Result:
        """Ask on the event loop until something is so."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := self.call(condition)):
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.01)
        result: Result = found
        return result

    def publish(self, type: str, properties: dict[str, Any] | None = None, **place: Any) -> int:
        """Publish one event; its number."""
        seq: int = self.call(lambda: self.bus.publish(type, properties, **place))
        return seq

    def overrun(self) -> int:
        """Publish until the one subscriber is over its limit and blocked in a write, or was dropped for it; the last
        number."""
        last = 0

        def over() -> bool:
            if last and not self.bus.statistics()["subscribers"]:
                return True
            (subscriber,) = self.bus.statistics()["subscribers"]
            lag, limits = subscriber["lag"], subscriber["limits"]
            return bool(lag["events"] > limits["events"] and lag["blocked"] > 0)

        deadline = time.monotonic() + TIMEOUT
        while not self.call(over):
            assert time.monotonic() < deadline, "the backlog did not go over the limit"
            last = self.publish("big", {"pad": "x" * 4096})
        return last

    def close(self) -> None:
        """End it, its streams first."""
        with self._stack:
            self.call(self.bus.drain)
            self.call(self.server.stop)
            self._serving.result(TIMEOUT)


class Reader:
    """One request over a real socket, read as it comes."""

    def __init__(self, url: str, *, timeout: float = TIMEOUT, buffer: int = BUFFER, **request: Any) -> None:
        transport = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)])
        self._client = httpx.Client(transport=transport, timeout=timeout, trust_env=False)
        self._response = self._client.send(self._client.build_request("GET", url, **request), stream=True)
        self._body: Iterator[bytes] = self._response.iter_raw()
        self._buffer = b""
        self.status = self._response.status_code
        self.headers = self._response.headers
        #: How the body ended, once it did: only after an abort do clients come back by themselves.
        self.ending: Literal["clean", "abort"] | None = None

    def next(self) -> Frame:
        """The next frame. :raises StopIteration: at the end of the body."""
        while b"\n\n" not in self._buffer:
            try:
                self._buffer += next(self._body)
            except StopIteration:
                self.ending = "clean"
                raise
            except (httpx.RemoteProtocolError, httpx.ReadError):
                self.ending = "abort"
                raise StopIteration from None
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        return parse_frame(block + b"\n\n")

    def until(self, type: str) -> list[Frame]:
        """Frames up to the first of a type."""
        frames = [self.next()]
        while frames[-1].type != type:
            frames.append(self.next())
        return frames

    def rest(self) -> list[Frame]:
        """All frames to the end."""
        return list(iter(self._next_or_none, None))

    def _next_or_none(self) -> Frame | None:
        try:
            return self.next()
        except StopIteration:
            return None

    def close(self) -> None:
        """Leave."""
        self._response.close()
        self._client.close()


class Watcher:
    """A witness (see ``witness.py``) over a real socket, read by a thread."""

    def __init__(self, url: str) -> None:
        self.frames: list[Frame] = []
        self._reader = Reader(f"{url}/global/event", timeout=120)
        self.frames.append(self._reader.next())
        self._thread = threading.Thread(target=self._read, name="witness")
        self._thread.start()

    def _read(self) -> None:
        while self.frames[-1].type != witness.END:
            try:
                self.frames.append(self._reader.next())
            except StopIteration:
                return

    def check(self, first: int, head: int, *, quiet: bool = False) -> None:
        """It got every event with these numbers, the last of type ``witness.END``, and no other frame.

        :param quiet: whether there may have been nothing for so long that heartbeats came.
        """
        self._thread.join(TIMEOUT)
        frames = [frame for frame in self.frames if not (quiet and frame.type == "server.heartbeat")]
        witness.check(frames, first, head)

    def close(self) -> None:
        """Leave; the server ends the stream of one that has not seen its end."""
        self._thread.join(TIMEOUT)
        self._reader.close()
