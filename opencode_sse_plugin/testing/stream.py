"""An HTTP client for ASGI apps that really streams, without a socket.

Clients that come with web frameworks collect the whole body first, and so hang on a stream that never ends. Here the
body goes through a pipe of a fixed size: while it is full, the app's ``send`` waits, as it does on a server whose
reader is slow::

    async with stream(app, "/event", params={"session": "ses_1"}) as response:
        assert response.status == 200
        connected = await response.next()
        async for frame in response.frames():
            ...
        assert response.ending == "clean"

Only what the test asks for is taken out of the pipe, frame by frame: a test that does not read is a reader that
does not read. ``window=0`` lets the app go on only when everything was taken.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import anyio.lowlevel
from starlette.datastructures import Headers
from starlette.types import ASGIApp

from .connection import PATIENCE, Connection, within
from .pace import Pace
from .scope import Pairs, http_scope
from .wire import Frame, parse_frame

Ending = Literal["clean", "abort"]


class StreamResponse:
    """What the client sees of one response. One task reads at a time."""

    def __init__(self, connection: Connection, pace: Pace) -> None:
        self.pace = pace
        self._connection = connection
        self._block = bytearray()

    @property
    def status(self) -> int:
        """The HTTP status."""
        assert self._connection.status is not None
        return self._connection.status

    @property
    def headers(self) -> Headers:
        """The response headers; names in any case."""
        return Headers(raw=self._connection.headers)

    @property
    def ending(self) -> Ending | None:
        """How the response ended, once everything was read: ``clean`` after a final chunk, ``abort`` where the app
        returned without one; ``None`` before, and if the client left first."""
        connection = self._connection
        if connection.unread or connection.gone:
            return None
        return "clean" if connection.complete else "abort" if connection.returned.is_set() else None

    @property
    def unread(self) -> int:
        """Bytes the app has sent and the client has not taken."""
        return self._connection.unread

    @property
    def blocked(self) -> bool:
        """Whether the app waits in ``send``."""
        return self._connection.blocked

    async def next(self, timeout: float = PATIENCE) -> Frame:
        """Take one frame.

        :param timeout: in seconds of the machine, whatever clock the app uses.
        :raises anyio.EndOfStream: if the response has ended. :raises TimeoutError: if nothing comes.
        :raises AssertionError: if the frame breaks a rule of the wire, or the stream ends within one.
        :raises Exception: what the app raised, once everything it sent was read.
        """
        with within(timeout, "no frame came"):
            while not self._block.endswith(b"\n\n"):
                if not await self._take():
                    if self._block:
                        raise AssertionError(f"the stream ends within a block: {bytes(self._block)!r}")
                    raise anyio.EndOfStream
        block = bytes(self._block)
        self._block.clear()
        return parse_frame(block)

    async def frames(self, timeout: float = PATIENCE) -> AsyncIterator[Frame]:
        """Frames to the end of the stream; ``timeout`` for each, as in :meth:`next`."""
        while True:
            try:
                frame = await self.next(timeout)
            except anyio.EndOfStream:
                return
            yield frame

    async def take(self, count: int, timeout: float = PATIENCE) -> list[Frame]:
        """The next so many frames, as :meth:`next` gives them."""
        return [await self.next(timeout) for _ in range(count)]

    async def until(self, type: str, timeout: float = PATIENCE) -> list[Frame]:
        """Frames up to and including the first one of a type, as :meth:`next` gives them."""
        frames = [await self.next(timeout)]
        while frames[-1].type != type:
            frames.append(await self.next(timeout))
        return frames

    async def rest(self, timeout: float = PATIENCE) -> list[Frame]:
        """All frames to the end."""
        return [frame async for frame in self.frames(timeout)]

    async def read(self, timeout: float = PATIENCE) -> bytes:
        """The rest of the body as it is, for answers that are no streams.

        :raises TimeoutError: if it does not end in time.
        """
        with within(timeout, "the body did not end"):
            while await self._take(frames=False):
                pass
        body = bytes(self._block)
        self._block.clear()
        return body

    async def until_blocked(self, timeout: float = PATIENCE) -> None:
        """Wait until the app waits in ``send``. :raises TimeoutError: if it does not."""
        with within(timeout, "the app did not block in send"):
            await self._connection.wait_for(lambda: self._connection.blocked)

    async def cut(self) -> None:
        """Leave, as a client whose connection breaks: the app is told ``http.disconnect``, what is in the pipe is lost,
        and what the app sends from now on goes nowhere."""
        self._connection.leave()
        await anyio.lowlevel.checkpoint()

    async def until_returned(self, timeout: float = PATIENCE) -> None:
        """Wait until the app has returned. :raises TimeoutError: if it does not."""
        with within(timeout, "the app did not return"):
            await self._connection.returned.wait()

    async def _take(self, *, frames: bool = True) -> bool:
        """Move bytes from the pipe to the block, never beyond its end; False at the end of the body."""
        connection = self._connection
        await self.pace.ready()
        if not await connection.readable():
            return False
        wanted = self._rest_of_block() if frames else connection.unread
        taken = connection.take(self.pace.portion(wanted))
        self._block += taken
        self.pace.taken(len(taken), int(frames and self._block.endswith(b"\n\n")))
        return True

    def _rest_of_block(self) -> int:
        """Bytes in the pipe up to the end of this block, or all there are."""
        if self._block.endswith(b"\n") and self._connection.find(b"\n") == 0:
            return 1  # the block ends between what was taken and what was not
        end = self._connection.find(b"\n\n")
        return self._connection.unread if end < 0 else end + 2


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer."""

    status: int
    headers: Headers
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return jsonlib.loads(self.body)


@asynccontextmanager
async def stream(
    app: ASGIApp,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | Pairs = (),
    params: Mapping[str, str] | Pairs = (),
    content: bytes | Sequence[bytes] = b"",
    http_version: str = "1.1",
    root_path: str = "",
    client: str = "127.0.0.1",
    state: Mapping[str, Any] | None = None,
    window: int = 64 * 1024,
    pace: Pace | None = None,
    gone: Literal["silent", "raise"] = "silent",
    timeout: float = PATIENCE,
) -> AsyncIterator[StreamResponse]:
    """Send a request and stream the response; on leaving the block, the client leaves too.

    :param path: may carry a query; ``params`` are added to it. Pairs say a name several times.
    :param content: the request body; a sequence is sent in chunks, without ``Content-Length``.
    :param state: what the app's lifespan put into its state (see ``lifespan``).
    :param window: how many unread bytes the pipe holds before ``send`` waits.
    :param pace: how fast the client takes; by default as fast as the test asks.
    :param gone: what a ``send`` to a client that has left does: nothing, as uvicorn's and hypercorn's, or raise
        ``OSError``, as later versions of the ASGI specification have it.
    :param timeout: seconds for the response to start, and for the app to return after the client left.
    :raises AssertionError: if the app returns without a response, or does not return after the client left.
    :raises Exception: what the app raised, unless ``next`` has raised it before.
    """
    chunks = [content] if isinstance(content, bytes) else list(content)
    length = len(content) if isinstance(content, bytes) else None
    scope = http_scope(
        path,
        method=method,
        headers=headers,
        params=params,
        length=length,
        http_version=http_version,
        root_path=root_path,
        client=client,
        state=state,
        spec_version="2.4" if gone == "raise" else "2.3",
    )
    connection = Connection(scope, chunks, window, raise_when_gone=gone == "raise")
    failure: BaseException | None = None
    # Errors are carried past the task group by hand: it would wrap each into an ExceptionGroup.
    async with anyio.create_task_group() as group:
        group.start_soon(connection.run, app)
        try:
            with within(timeout, "the response did not start"):
                await connection.started()
            yield StreamResponse(connection, pace or Pace())
        except (GeneratorExit, anyio.get_cancelled_exc_class()):
            raise
        except BaseException as error:
            failure = error
        connection.leave()
        with anyio.move_on_after(timeout) as patience:
            await connection.returned.wait()
        group.cancel_scope.cancel()
    if failure is not None:
        if connection.error is not None and connection.error is not failure:
            failure.add_note(f"The app had failed with {connection.error!r}")
        raise failure
    connection.raise_error()
    if patience.cancelled_caught:
        raise AssertionError(f"the app did not return within {timeout} s after the client left")


async def request(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    json: Any = None,
    headers: Mapping[str, str] | Pairs = (),
    timeout: float = PATIENCE,
    **options: Any,
) -> Response:
    """Send a request and read the whole answer.

    :param json: sent as ``application/json``. :param options: as for :func:`stream`.
    :raises TimeoutError: if the answer does not end in time.
    """
    if json is not None:
        options["content"] = jsonlib.dumps(json).encode()
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        headers = [("content-type", "application/json"), *pairs]
    async with stream(app, path, method=method, headers=headers, timeout=timeout, **options) as response:
        return Response(response.status, response.headers, await response.read(timeout))
