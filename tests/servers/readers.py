"""Readers over raw sockets: one that reads in a thread and tells how its body ended, and ones that do not read."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from opencode_sse_plugin.testing import Frame, parse_frame

TIMEOUT = 30.0
#: Of a connection that stalls, so that it does so after some megabytes of the server's own.
BUFFER = 4096
_WHOLE = re.compile(rb"data: [^\n]*\nid: [^:\n]+:(\d+)\n\n")


def ask(
    port: int, path: str = "/event", version: str = "1.1", *, buffer: int = 0, tls: bool = False, **headers: str
) -> socket.socket:
    """Send a request for a stream."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.settimeout(TIMEOUT)
    sock.connect(("127.0.0.1", port))
    if tls:
        sock = ssl._create_unverified_context().wrap_socket(sock)
    lines = [f"GET {path} HTTP/{version}", "Host: localhost", *(f"{k}: {v}" for k, v in headers.items())]
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    return sock


class Stalled:
    """Reads the beginning of its stream and then nothing more."""

    def __init__(self, port: int, path: str = "/event", *, tls: bool = False) -> None:
        self.sock = ask(port, path, buffer=BUFFER, tls=tls)
        self.port: int = self.sock.getsockname()[1]
        said = b""
        while b"server.connected" not in said:
            received = self.sock.recv(1024)
            assert received, said
            said += received

    def numbers(self) -> list[int]:
        """Read what has come after all; the numbers of the events that are whole."""
        said = b""
        with suppress(OSError):
            while received := self.sock.recv(65536):
                said += received
        return [int(number) for number in _WHOLE.findall(said)]

    def close(self) -> None:
        """Leave."""
        self.sock.close()


class Reader:
    """Reads all there is, chunked or not, in a thread of its own."""

    def __init__(
        self, port: int, path: str = "/event", version: str = "1.1", *, tls: bool = False, **headers: str
    ) -> None:
        self.sock = ask(port, path, version, buffer=64 * 1024, tls=tls, **headers)
        self.port: int = self.sock.getsockname()[1]
        self.frames: list[Frame] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        #: How the body ended, once it did.
        self.ending: Literal["clean", "abort"] | None = None
        self._changed = threading.Condition()
        self._may_read = threading.Event()
        self._may_read.set()
        self._file = self.sock.makefile("rb")
        self._thread = threading.Thread(target=self._run, name="reader")
        self._thread.start()

    def _run(self) -> None:
        ending: Literal["clean", "abort"] = "abort"
        with suppress(OSError):
            ending = "clean" if self._read() else "abort"
        with self._changed:
            self.ending = ending
            self._changed.notify_all()

    def _read(self) -> bool:
        """Read to the end; whether it was a clean one."""
        first = self._file.readline()
        if not first:
            return False
        self.status = int(first.split()[1])
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        if self.headers.get("transfer-encoding") != "chunked":
            rest = b""
            while data := self._file.read1(65536):
                rest = self._take(rest + data)
            return True
        rest = b""
        while size := self._file.readline():
            if int(size, 16) == 0:
                return True
            chunk = self._file.read(int(size, 16) + 2)
            rest = self._take(rest + chunk[:-2])
        return False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It takes what has come and then nothing more for the length of a block."""
        self._may_read.clear()
        try:
            yield
        finally:
            self._may_read.set()

    def _take(self, data: bytes) -> bytes:
        self._may_read.wait()
        *blocks, rest = data.split(b"\n\n")
        if blocks:
            with self._changed:
                self.frames += [parse_frame(block + b"\n\n") for block in blocks]
                self._changed.notify_all()
        return rest

    def until(self, type: str) -> Frame:
        """Wait for the first frame of a type."""

        def reached() -> Frame | None:
            return next((frame for frame in self.frames if frame.type == type), None)

        with self._changed:
            self._changed.wait_for(lambda: reached() or self.ending, TIMEOUT)
            found = reached()
            types = [frame.type for frame in self.frames[-10:]]
            assert found is not None, f"{type} did not come: {len(self.frames)} frames, {types}, end {self.ending}"
            return found

    def until_end(self) -> list[str]:
        """Wait for the end; the types of all frames."""
        self._thread.join(TIMEOUT)
        assert self.ending is not None, f"no end after {len(self.frames)} frames"
        return [frame.type for frame in self.frames]

    def close(self) -> None:
        """Leave."""
        self._may_read.set()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT)
        self._file.close()
        self.sock.close()
