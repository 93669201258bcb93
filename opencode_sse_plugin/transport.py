"""Getting rid of a connection that does not read.

Cancelling an ASGI app leaves the server with whatever it buffered for the socket, and a peer that never reads keeps it
there for ever (measured: uvicorn, hypercorn and granian). So the connection itself is ended: by the server's transport
where its own ``send`` leads there, else by its socket, found by the addresses in the scope. Either way with RST: after
an orderly close the kernel would go on keeping what the peer does not take.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import Send

from . import http2
from .peers import Peers
from .wakeup import call_later

#: Where a scope holds the server's own ``send``, if somebody kept it before middleware wrapped it.
OWN_SEND: Final = "opencode_sse.send"
#: A closed socket forgets what was not taken.
_RESET: Final = struct.pack("ii", 1, 0)
_ADVICE: Final = (
    "a reader that stalls keeps its connection here: serve HTTP/1.1 over TCP, with the caller's own address in the "
    "scope, or set TCP_USER_TIMEOUT on the listening socket and limit how long the server waits when it stops; "
    "docs/servers.md says how"
)

_peers: Final = Peers()


def unwrapped(send: Send) -> Send:
    """The ``send`` behind Starlette's CORS middleware, which changes nothing but the start of a response."""
    while isinstance(send, partial) and getattr(send.func, "__func__", None) is CORSMiddleware.send:
        behind: Send | None = send.keywords.get("send")
        if behind is None:
            break
        send = behind
    return send


def abort(scope: Mapping[str, Any], send: Send) -> bool:
    """End the connection of a request; whether it could be reached.

    :param send: the server's own.
    """
    transport = _transport(send)
    if transport is not None:
        # Not of one that is closed: uvloop would set it for whoever has that number now.
        if not transport.is_closing() or _unsent(transport):
            _reset_when_closed(transport.get_extra_info("socket"))
        transport.abort()
        return True
    return _has_its_own(scope) and end_connection(scope)


def end_connection(scope: Mapping[str, Any]) -> bool:
    """End the connection of a request with all that goes over it; whether it could be reached."""
    connection = _peers.find(scope)
    if connection is None:
        return False
    with connection, suppress(OSError):  # It may be closed already.
        _reset_when_closed(connection)
        # The server finds out by itself: whatever it does next with the socket fails, and then it closes it.
        connection.shutdown(socket.SHUT_RDWR)
    return True


def abort_after(seconds: float, scope: Mapping[str, Any], send: Send) -> None:
    """End the connection of a stream that was not ended cleanly, if the server has not got rid of the rest by then, or
    over TLS if the other side has not said goodbye, for which Python waits 30 s."""
    transport, later = _transport(send), call_later()
    if later is not None and (transport is None or _unsent(transport) or scope.get("scheme") == "https"):
        later(seconds, partial(abort, scope, send))


def server_status(scope: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """What ``/event/status`` says of the server: whether connections like that of a request can be ended."""
    aborts = _transport(send) is not None or http2.stream_of(scope, unwrapped(send)) is not None
    if not aborts and _has_its_own(scope):
        connection = _peers.find(scope, newest=True)
        if connection is not None:
            connection.close()
            aborts = True
    return {"aborts_stalled": aborts, "advice": None if aborts else _ADVICE}


def is_closed(send: Send) -> bool:
    """Whether the connection behind a server's own ``send`` is known to be closed. The server may not have said so yet;
    uvloop raises ``RuntimeError`` at a write from then on."""
    transport = _transport(send)
    return transport is not None and transport.is_closing()


def stopping(send: Send) -> Callable[[], Awaitable[object]] | None:
    """What waits for a server to begin to stop, where no signal tells: a worker process of hypercorn gets none."""
    stream = getattr(send, "__self__", None)
    if not type(stream).__module__.startswith("hypercorn."):
        return None
    wait = getattr(getattr(getattr(stream, "context", None), "terminated", None), "wait", None)
    return wait if callable(wait) else None


def _has_its_own(scope: Mapping[str, Any]) -> bool:
    """Whether a request has its connection for itself: one of HTTP/2 carries others."""
    return str(scope.get("http_version", "")).startswith("1.")


def _unsent(transport: asyncio.WriteTransport) -> int:
    try:
        return transport.get_write_buffer_size()
    except AttributeError:  # asyncio's of TLS raises it once it is closed for good.
        return 0


def _reset_when_closed(connection: Any) -> None:
    with suppress(AttributeError, OSError):  # There may be none, or it is closed already.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _transport(send: Send) -> asyncio.WriteTransport | None:
    transport = getattr(getattr(unwrapped(send), "__self__", None), "transport", None)
    # By what it can do: uvloop's transports are not instances of asyncio's.
    able = callable(getattr(transport, "abort", None)) and callable(getattr(transport, "is_closing", None))
    return transport if able else None
