"""A small HTTP client for event streams, over bare sockets: what ``opencode-sse bench`` opens by the thousand."""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

import anyio
from anyio.abc import ByteStream

from ..errors import ConfigurationError, SSEPluginError

_READ: Final = 256 * 1024
_LONGEST_HEAD: Final = 64 * 1024
_LONGEST_BLOCK: Final = 64 * 1024 * 1024
_BLOCK_END: Final = re.compile(rb"\r?\n\r?\n|\r\r")


class CannotRead(SSEPluginError):
    """A server that gives no event stream; the message says what it gives."""


@dataclass(frozen=True)
class Endpoint:
    """Where to connect, and what to say there."""

    host: str
    port: int
    tls: bool
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str, headers: Mapping[str, str], user: str, password: str) -> Endpoint:
        """Of a URL; a user in it goes before ``user``.

        :raises ConfigurationError: if it is not an absolute http URL.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"{url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"{url} is not a URL of an event stream, such as http://127.0.0.1:4096/event")
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
        if password and not any(name.lower() == "authorization" for name in headers):
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            headers = {**headers, "Authorization": f"Basic {token}"}
        path = parts.path if parts.path not in ("", "/") else "/event"
        tls = parts.scheme == "https"
        target = path + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, port or (443 if tls else 80), tls, target, headers)

    def request(self, method: str, extra: Mapping[str, str], body: bytes = b"") -> bytes:
        """A whole request."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.target} HTTP/1.1", f"Host: {host}:{self.port}", "User-Agent: opencode-sse-bench"]
        lines += [f"{name}: {value}" for name, value in {**self.headers, **extra}.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def connect(self) -> ByteStream:
        """:raises CannotRead: if nobody answers there."""
        try:
            if self.tls:
                # An endless stream that is cut without a farewell is what we are here to see.
                return await anyio.connect_tcp(self.host, self.port, tls=True, tls_standard_compatible=False)
            return await anyio.connect_tcp(self.host, self.port)
        except (OSError, ssl.SSLError) as error:
            raise CannotRead(f"cannot connect to {self.host}:{self.port}: {_why(error)}") from error


def _why(error: BaseException) -> str:
    cause = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return str(cause)


@dataclass
class Answer:
    """Status and headers, and the bytes of the body that came with them."""

    status: int
    reason: str
    headers: dict[str, str]
    rest: bytes


async def read_head(stream: ByteStream) -> Answer:
    """:raises CannotRead: if it is not HTTP."""
    head = b""
    while b"\r\n\r\n" not in head:
        if len(head) > _LONGEST_HEAD:
            raise CannotRead("the server's answer has no end of its headers")
        try:
            head += await stream.receive(_READ)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise CannotRead("the server closed the connection before it answered") from None
    head, _, rest = head.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, status = first.partition(" ")
    code, _, reason = status.partition(" ")
    if not version.startswith("HTTP/1.") or not code.isdigit():
        raise CannotRead(f"the server does not speak HTTP/1.1: {first[:80]!r}")
    pairs = (line.partition(":") for line in lines)
    return Answer(int(code), reason, {name.strip().lower(): value.strip() for name, _, value in pairs}, rest)


class Body:
    """The body of an answer, its chunks taken apart."""

    def __init__(self, stream: ByteStream, answer: Answer) -> None:
        self._stream = stream
        self._buffer = answer.rest
        self._chunked = "chunked" in answer.headers.get("transfer-encoding", "").lower()
        #: Bytes left of the chunk; -2 while the end of one is still to come.
        self._left = 0
        #: Whether it ended as its server meant it to.
        self.complete = False

    async def next(self) -> bytes:
        """What has come; empty at the end."""
        while True:
            if data := self._decoded():
                return data
            if self.complete:
                return b""
            try:
                self._buffer += await self._stream.receive(_READ)
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                self.complete = not self._chunked
                return b""

    def _decoded(self) -> bytes:
        if not self._chunked:
            data, self._buffer = self._buffer, b""
            return data
        pieces = []
        buffer, at = self._buffer, 0
        while at < len(buffer) and not self.complete:
            if self._left > 0:
                piece = buffer[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._left = -2
                continue
            if self._left == -2:
                if len(buffer) - at < 2:
                    break
                at += 2
                self._left = 0
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            try:
                self._left = int(buffer[at:end].partition(b";")[0], 16)
            except ValueError:
                raise CannotRead(f"not a chunk of HTTP/1.1: {buffer[at : at + 40]!r}") from None
            at = end + 2
            self.complete = self._left == 0
        self._buffer = buffer[at:]
        return b"".join(pieces)


@asynccontextmanager
async def open_stream(endpoint: Endpoint, last_event_id: str = "") -> AsyncIterator[Body | None]:
    """Ask for the stream; ``None`` where the server says that there is nothing more (204).

    :raises CannotRead: if it is not there, saying what is.
    """
    async with await endpoint.connect() as stream:
        extra = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_event_id:
            extra["Last-Event-ID"] = last_event_id
        await stream.send(endpoint.request("GET", extra))
        answer = await read_head(stream)
        if answer.status == 204:
            yield None
            return
        if answer.status != 200:
            raise CannotRead(_refusal(endpoint, answer))
        kind = answer.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise CannotRead(f"{endpoint.target} is not an event stream: its Content-Type is {kind or 'missing'}")
        yield Body(stream, answer)


def _refusal(endpoint: Endpoint, answer: Answer) -> str:
    said = f"{endpoint.target} answers {answer.status} {answer.reason}".rstrip()
    if answer.status == 401:
        return f"{said}: give user and password in the URL or by OPENCODE_SERVER_PASSWORD, or a --header"
    detail = answer.rest.decode(errors="replace").strip()[:200]
    return f"{said}: {detail}" if detail and detail[0] != "<" and "chunked" not in str(answer.headers) else said


class Blocks:
    """Blocks of an event stream, however its bytes are cut, with LF, CRLF or CR."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The blocks that are complete now, without the empty line."""
        self._rest += data
        if len(self._rest) > _LONGEST_BLOCK:
            raise CannotRead(f"a block of more than {_LONGEST_BLOCK} bytes")
        if b"\r" in self._rest:
            *blocks, self._rest = _BLOCK_END.split(self._rest)
        else:
            *blocks, self._rest = self._rest.split(b"\n\n")
        return blocks
