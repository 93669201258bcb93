"""HTTP/2 on hypercorn, which neither holds back who writes to a stream nor breaks one off.

Its buffer of a stream lets a writer go on although nothing fits the client's window, so that one who stalls is kept
everything for; and an app that returns without its last message leaves the client waiting for ever (measured: 0.18).
Here each write lasts until the server has handed it on, and a stream is ended by ``RST_STREAM``. granian does both by
itself, uvicorn does not speak HTTP/2.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

import anyio
from starlette.types import Send

#: RFC 9113, 7: what granian says of an app that returned early.
_INTERNAL_ERROR: Final = 2
#: Seconds for a reset to be written; a connection that takes longer takes nothing.
_PATIENCE: Final = 0.5


class Http2Stream:
    """One stream of a connection.

    :param send: hypercorn's own, of the stream.
    """

    def __init__(self, send: Send) -> None:
        stream: Any = send.__self__  # type: ignore[attr-defined]
        self._id: int = stream.stream_id
        self._protocol: Any = stream.send.__self__

    def paced(self, send: Send) -> Send:
        """A ``send`` that lasts until the server has handed on what it was given."""

        async def paced_send(message: MutableMapping[str, Any]) -> None:
            await send(message)
            buffer = self._protocol.stream_buffers.get(self._id)
            if buffer is not None and buffer.buffer:
                await buffer.drain()

        return paced_send

    async def reset(self) -> bool:
        """Break it off, with what is left of it.

        :return: whether the connection took so much.
        """
        from h2.exceptions import H2Error  # hypercorn's own; nobody else needs it.

        protocol = self._protocol
        try:
            protocol.connection.reset_stream(self._id, _INTERNAL_ERROR)
        except H2Error:
            return True  # It has ended.
        with anyio.move_on_after(_PATIENCE, shield=True) as scope:
            await protocol._window_updated(self._id)  # As after a client's reset: what is left of it is forgotten.
            await protocol._flush()
        return not scope.cancelled_caught


def stream_of(scope: Mapping[str, Any], send: Send) -> Http2Stream | None:
    """The stream behind a server's own ``send``, if it is one of those."""
    if scope.get("http_version") != "2":
        return None
    stream = getattr(send, "__self__", None)
    protocol = getattr(getattr(stream, "send", None), "__self__", None)
    known = (
        type(protocol).__module__ == "hypercorn.protocol.h2"
        and isinstance(getattr(protocol, "stream_buffers", None), dict)
        and isinstance(getattr(stream, "stream_id", None), int)
        and callable(getattr(getattr(protocol, "connection", None), "reset_stream", None))
        and all(callable(getattr(protocol, name, None)) for name in ("_window_updated", "_flush"))
    )
    return Http2Stream(send) if known else None
