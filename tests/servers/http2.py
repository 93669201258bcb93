"""A client of HTTP/2 without TLS: several streams over one connection, each of which may be left unread."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset

from opencode_sse_plugin.testing import Frame, parse_frame

TIMEOUT: Final = 30.0


@dataclass
class Stream:
    """One request, and what came of it.

    :param reads: whether it lets the server send more.
    """

    number: int
    reads: bool = True
    status: int = 0
    frames: list[Frame] = field(default_factory=list)
    ending: Literal["clean", "abort"] | None = None
    rest: bytes = b""
    #: Bytes for which it did not let the server send more yet.
    kept_back: int = 0

    @property
    def types(self) -> list[str]:
        return [frame.type for frame in self.frames]

    @property
    def numbers(self) -> list[int]:
        """Those of its ``id:`` lines."""
        return [frame.cursor.seq for frame in self.frames if frame.cursor]


class Http2Client:
    """One connection, read whenever something is waited for."""

    def __init__(self, port: int) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._connection = H2Connection(config=H2Configuration(client_side=True))
        self._connection.initiate_connection()
        self._streams: dict[int, Stream] = {}
        #: Whether the server has closed it.
        self.closed = False
        self._flush()

    def get(self, path: str = "/event", *, reads: bool = True, **headers: str) -> Stream:
        """Ask for a stream."""
        stream = Stream(self._connection.get_next_available_stream_id(), reads)
        self._streams[stream.number] = stream
        lines = [(":method", "GET"), (":path", path), (":authority", "localhost"), (":scheme", "http")]
        named = [(name.lower().replace("_", "-"), value) for name, value in headers.items()]
        self._connection.send_headers(stream.number, [*lines, *named], end_stream=True)
        self._flush()
        return stream

    def leave(self, stream: Stream) -> None:
        """Reset it, as a browser does whose page closes its EventSource."""
        self._connection.reset_stream(stream.number)
        self._flush()

    def read_on(self, stream: Stream) -> None:
        """Let the server send what it did not let it send, and more."""
        stream.reads = True
        if stream.kept_back and stream.ending is None:
            self._connection.increment_flow_control_window(stream.kept_back, stream.number)
            stream.kept_back = 0
        self._flush()

    def until(self, reached: Callable[[], object], what: str) -> None:
        """Read until something is so."""
        deadline = time.monotonic() + TIMEOUT
        while not reached():
            left = deadline - time.monotonic()
            assert left > 0, f"{what} did not come: {self._streams}"
            assert not self.closed, f"{what} did not come before the end of the connection"
            self._sock.settimeout(left)
            self._take(self._sock.recv(65536))

    def _take(self, data: bytes) -> None:
        if not data:
            self.closed = True
            for stream in self._streams.values():
                stream.ending = stream.ending or "abort"
            return
        for event in self._connection.receive_data(data):
            stream = self._streams.get(getattr(event, "stream_id", None) or 0, Stream(0))
            if isinstance(event, ResponseReceived):
                stream.status = int(dict(event.headers)[b":status"])
            elif isinstance(event, DataReceived):
                *blocks, stream.rest = (stream.rest + event.data).split(b"\n\n")
                stream.frames += [parse_frame(block + b"\n\n") for block in blocks]
                size = event.flow_controlled_length
                if size:
                    self._connection.increment_flow_control_window(size)
                stream.kept_back += size
            elif isinstance(event, StreamEnded):
                stream.ending = "clean"
            elif isinstance(event, StreamReset):
                stream.ending = "abort"
        for stream in self._streams.values():
            if stream.reads:
                self.read_on(stream)
        self._flush()

    def _flush(self) -> None:
        self._sock.sendall(self._connection.data_to_send())

    def close(self) -> None:
        """Leave with all streams."""
        self._sock.close()
