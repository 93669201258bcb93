"""Giving waiting readers what has come straight from the wake-up, without a turn of the event loop for each.

A reader that waits costs a future, a handle and a task switch per wake-up, which is more than the write itself, and
its server frames the same bytes once for each reader. Here the frame of HTTP/1.1 is put around a chunk once for all,
and what is left per reader is one call of its transport's ``write``.

Only where the app holds a server's own ``send``, unwrapped or behind what is known to pass chunks on as they are, whose
code is known to do no more with a chunk than that, and only while its transport buffers little enough for a ``send``
not to wait.
Everywhere else the plain path in ``response`` does the same.
"""

from __future__ import annotations

from typing import Any, Final

from starlette.types import Scope, Send

from .wakeup import on_asyncio

_KNOWN: Final = ("uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl")
#: Bytes that wait for the socket, beyond which the pump waits in ``send`` instead: where uvicorn's does.
_FULL: Final = 64 * 1024


def supports(scope: Scope, send: Send) -> bool:
    """Whether chunks may be written behind this ``send``."""
    cycle = getattr(send, "__self__", None)
    transport = getattr(cycle, "transport", None)
    return (
        type(cycle).__module__ in _KNOWN
        and getattr(send, "__name__", "") == "send"
        and scope.get("http_version") == "1.1"  # Before that there are no chunks.
        and all(callable(getattr(transport, name, None)) for name in ("write", "is_closing", "get_write_buffer_size"))
        and on_asyncio()
    )


class Writer:
    """Writes to one connection while its pump waits."""

    __slots__ = ("_transport",)

    #: The newest chunk and its frame: readers of one channel are woken one after the other.
    _framed: tuple[bytes, bytes] = (b"", b"")

    def __init__(self, send: Send) -> None:
        self._transport: Any = send.__self__.transport  # type: ignore[attr-defined]

    def write(self, chunk: bytes) -> bool:
        """Write a chunk.

        :return: ``False`` if it is the pump's business: the connection is closed, or its buffer is full.
        """
        # The transport is asked, not the server: asyncio writes into the void once it is closed, and in a pipeline of
        # requests uvicorn tells only the newest that the client left.
        transport = self._transport
        try:
            if transport.get_write_buffer_size() > _FULL or transport.is_closing():
                return False
            known, framed = Writer._framed
            if known is not chunk:
                framed = b"%x\r\n%b\r\n" % (len(chunk), chunk)
                Writer._framed = (chunk, framed)
            transport.write(framed)
        except Exception:  # Closed ones raise various things; the pump finds out, and nobody else's wake-up ends here.
            return False
        return True
