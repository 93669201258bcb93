"""Giving waiting readers what has come straight from the wake-up, without a turn of the event loop for each.

A reader that waits costs a future, a handle and a task switch per wake-up, which is more than the write itself, and
its server frames the same bytes once for each reader. Here the frame of HTTP/1.1 is put around a chunk once for all,
and what is left per reader is one call of its transport's ``write``.

Only where the app holds a server's own ``send``, unwrapped or behind what is known to pass chunks on as they are, whose
code is known to do no more with a chunk than that, and only while the server says that it would not make ``send`` wait.
Everywhere else the plain path in ``response`` does the same.
"""

from __future__ import annotations

from typing import Any, Final

from starlette.types import Scope, Send

from .wakeup import on_asyncio

_KNOWN: Final = ("uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl")


def supports(scope: Scope, send: Send) -> bool:
    """Whether chunks may be written behind this ``send``."""
    cycle = getattr(send, "__self__", None)
    transport = getattr(cycle, "transport", None)
    return (
        type(cycle).__module__ in _KNOWN
        and getattr(send, "__name__", "") == "send"
        and scope.get("http_version") == "1.1"  # Before that there are no chunks.
        and hasattr(cycle, "disconnected")
        and hasattr(getattr(cycle, "flow", None), "write_paused")
        and callable(getattr(transport, "write", None))
        and callable(getattr(transport, "is_closing", None))
        and on_asyncio()
    )


class Writer:
    """Writes to one connection while its pump waits."""

    __slots__ = ("_cycle", "_flow", "_is_closing", "_write")

    #: The newest chunk and its frame: readers of one channel are woken one after the other.
    _framed: tuple[bytes, bytes] = (b"", b"")

    def __init__(self, send: Send) -> None:
        self._cycle: Any = send.__self__  # type: ignore[attr-defined]
        self._flow: Any = self._cycle.flow
        self._write = self._cycle.transport.write
        # In a pipeline of requests uvicorn tells only the newest that the client left; asyncio writes into the void.
        self._is_closing = self._cycle.transport.is_closing

    def __call__(self, chunk: bytes) -> bool:
        """Write a chunk.

        :return: ``False`` if it is the pump's business: the connection is closed, or its buffer is full.
        """
        if self._flow.write_paused or self._cycle.disconnected or self._is_closing():
            return False
        known, framed = Writer._framed
        if known is not chunk:
            framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
            Writer._framed = (chunk, framed)
        try:
            self._write(framed)
        except (OSError, RuntimeError):  # uvloop raises the latter; the pump finds out what it means
            return False
        return True
