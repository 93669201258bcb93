"""The server's side of the in-memory client: ``receive``, ``send`` and the pipe between app and reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import anyio
from starlette.types import ASGIApp, Message, Scope

from ..wakeup import new_bell

#: Seconds to wait for what is to come, unless a test says otherwise: machines that run tests stand still now and then.
PATIENCE: Final = 15.0


class ClientGone(OSError):
    """What ``send`` raises after the client left, where asked to."""


@contextmanager
def within(timeout: float, complaint: str) -> Iterator[None]:
    """Give up after so many seconds. :raises TimeoutError: saying what did not happen."""
    with anyio.move_on_after(timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"{complaint} within {timeout} s")


class Connection:
    """One request and its response.

    :param window: unread bytes beyond which ``send`` waits.
    :param raise_when_gone: whether ``send`` raises once the client left.
    """

    def __init__(self, scope: Scope, content: Sequence[bytes], window: int, *, raise_when_gone: bool) -> None:
        self.status: int | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        #: The final chunk was sent. The client left before the end. The app waits in ``send``.
        self.complete = self.gone = self.blocked = False
        self.returned = anyio.Event()
        self.error: Exception | None = None
        self._scope = scope
        self._content = deque(content)
        self._window = window
        self._raise_when_gone = raise_when_gone
        self._pipe = bytearray()
        self._changed = anyio.Event()
        # Not an anyio event: a server's send may be stepped outside of any task, and then waits on a bare future.
        self._room = new_bell()
        self._error_raised = False

    # What the app is given.

    async def run(self, app: ASGIApp) -> None:
        """Run the app; what it raises is kept for the reader."""
        try:
            await app(self._scope, self.receive, self.send)
        except ClientGone:
            pass  # an app may let it pass
        except Exception as error:
            self.error = error
        finally:
            self.returned.set()
            self._change()

    async def receive(self) -> Message:
        """The request's body, then the client leaving or the end of the response."""
        if self._content and not self.gone:
            body = self._content.popleft()
            return {"type": "http.request", "body": body, "more_body": bool(self._content)}
        await self.wait_for(lambda: self.gone or self.complete)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message of the response; wait while the pipe holds more than the window. Nothing is awaited
        otherwise, as on a server."""
        if not self.gone:
            self._accept(message)
            self._change()
            try:
                while len(self._pipe) > self._window and not self.gone:
                    self.blocked = True
                    self._change()
                    await self._room.woken()
            finally:
                self.blocked = False
        if self.gone and self._raise_when_gone:
            raise ClientGone("the client has left")

    def _accept(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self.status is not None:
                raise RuntimeError("the response was started twice")
            self.status = message["status"]
            self.headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
        elif kind == "http.response.body":
            if self.status is None:
                raise RuntimeError("a body was sent before the response was started")
            if self.complete:
                raise RuntimeError("a body was sent after the final one")
            if self._scope["method"] != "HEAD":
                self._pipe += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        else:
            raise RuntimeError(f"this server knows no message {kind!r}")

    # What the reader does.

    @property
    def unread(self) -> int:
        """Bytes in the pipe."""
        return len(self._pipe)

    @property
    def ended(self) -> bool:
        """Whether everything was read and nothing can follow."""
        return not self._pipe and (self.complete or self.returned.is_set())

    async def started(self) -> None:
        """Wait for status and headers.

        :raises AssertionError: if the app returns without them. :raises Exception: what the app raised.
        """
        await self.wait_for(lambda: self.status is not None or self.returned.is_set())
        if self.status is None:
            self.raise_error()
            raise AssertionError("the app returned without a response")

    async def readable(self) -> bool:
        """Wait for something to read.

        :return: whether there is; ``False`` at the end.
        :raises anyio.ClosedResourceError: if the client left. :raises Exception: what the app raised.
        """
        await self.wait_for(lambda: bool(self._pipe) or self.ended or self.gone)
        if self.gone:
            raise anyio.ClosedResourceError
        if not self._pipe:
            self.raise_error()
        return bool(self._pipe)

    def find(self, what: bytes) -> int:
        """Where these bytes first stand in the pipe; -1 if nowhere."""
        return self._pipe.find(what)

    def take(self, size: int) -> bytes:
        """Take bytes out of the pipe."""
        taken = bytes(self._pipe[:size])
        del self._pipe[:size]
        self._room.wake()
        return taken

    def leave(self) -> None:
        """The client goes; nothing changes where the response has ended already."""
        if not self.ended and not self.gone:
            self.gone = True
            self._pipe.clear()
            self._room.wake()
            self._change()

    def raise_error(self) -> None:
        """:raises Exception: what the app raised, once."""
        if self.error is not None and not self._error_raised:
            self._error_raised = True
            raise self.error

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of this connection holds."""
        while not condition():
            await self._changed.wait()

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
