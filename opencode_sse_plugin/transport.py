"""Getting rid of a connection that does not read.

Cancelling an ASGI app leaves the server with whatever it buffered for the socket, and a peer that never reads keeps it
there for ever (measured: uvicorn, hypercorn and granian). Where the server's transport can be reached through its own
``send``, it is aborted; elsewhere ``TCP_USER_TIMEOUT`` on the listening socket does it.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.types import Send

#: Where a scope holds the server's own ``send``, if somebody kept it before middleware wrapped it.
OWN_SEND: Final = "opencode_sse.send"


def abort(send: Send) -> bool:
    """Abort the connection behind a server's own ``send``; whether its transport could be reached."""
    transport = _transport(send)
    if transport is None:
        return False
    transport.abort()
    return True


def is_closed(send: Send) -> bool:
    """Whether the connection behind a server's own ``send`` is known to be closed. The server may not have said so yet;
    uvloop raises ``RuntimeError`` at a write from then on."""
    transport = _transport(send)
    return transport is not None and transport.is_closing()


def _transport(send: Send) -> asyncio.WriteTransport | None:
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    # By what it can do: uvloop's transports are not instances of asyncio's.
    able = callable(getattr(transport, "abort", None)) and callable(getattr(transport, "is_closing", None))
    return transport if able else None
