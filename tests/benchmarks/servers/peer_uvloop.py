"""The barest program on uvloop: each event is encoded, framed and written to whoever asked for its session, or to all.

It knows of HTTP only how a stream begins, keeps nothing and notices nobody: what Python itself takes for that.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from importlib.metadata import version
from typing import Any, Final

from common import run
from queues import encoded

_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
_readers: defaultdict[int | None, list[Any]] = defaultdict(list)


class Connection(asyncio.Protocol):
    """One reader; its request comes in one piece."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's are not instances of WriteTransport.

    def data_received(self, data: bytes) -> None:
        session = data.split(b" ", 2)[1].partition(b"session=ses_")[2]
        _readers[int(session) if session else None].append(self._transport)
        self._transport.write(_HEAD)


def publish(session: int | None) -> None:
    frame = b"data: %b\n\n" % encoded(session)
    for transport in _readers[session]:
        transport.write(frame)


run(
    lambda listener: asyncio.get_running_loop().create_server(Connection, sock=listener),
    publish,
    f"uvloop {version('uvloop')}, one write() per connection and event, frames encoded once",
)
