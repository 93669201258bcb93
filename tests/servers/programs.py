"""The servers people run, as programs of their own on free ports, serving ``app.py`` or ``opencode-sse serve``."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, Final

import httpx
import trustme

from .readers import Reader, Stalled

HERE: Final = Path(__file__).parent
TIMEOUT: Final = 20.0
CLEAN: Final = {name: value for name, value in os.environ.items() if not name.startswith("OPENCODE_")}


def _python(module: str, *arguments: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-m", module, *(word.format(port=port) for word in arguments)]


def _uvicorn(http: str, loop: str, *more: str) -> Callable[[int], list[str]]:
    return _python("uvicorn", "--port", "{port}", "--http", http, "--loop", loop, "--no-access-log", *more, "app:app")


@cache
def certificate() -> str:
    """The path of one with its key, of an authority that nobody knows."""
    folder = tempfile.mkdtemp(prefix="certificate-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "with-key.pem")
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return str(path)


def _tls(command: Callable[[int], list[str]], certificate_option: str, key_option: str) -> Callable[[int], list[str]]:
    return lambda port: [*command(port), certificate_option, certificate(), key_option, certificate()]


#: How each is started, with its own defaults wherever it has any.
SERVERS: Final = {
    "uvicorn-h11-asyncio": _uvicorn("h11", "asyncio"),
    "uvicorn-httptools-uvloop": _uvicorn("httptools", "uvloop"),
    "hypercorn-asyncio": _python("hypercorn", "--bind", "127.0.0.1:{port}", "app:app"),
    "hypercorn-asyncio-one-process": _python("hypercorn", "--workers", "0", "--bind", "127.0.0.1:{port}", "app:app"),
    "hypercorn-trio": _python("hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:{port}", "app:app"),
    "hypercorn-trio-one-process": _python(
        "hypercorn", "--workers", "0", "--worker-class", "trio", "--bind", "127.0.0.1:{port}", "app:app"
    ),
    "granian": _python("granian", "--interface", "asgi", "--port", "{port}", "app:app"),
    "uvicorn-h11-asyncio-tls": _tls(_uvicorn("h11", "asyncio"), "--ssl-certfile", "--ssl-keyfile"),
    "uvicorn-httptools-uvloop-tls": _tls(_uvicorn("httptools", "uvloop"), "--ssl-certfile", "--ssl-keyfile"),
    "hypercorn-asyncio-tls": _tls(
        _python("hypercorn", "--bind", "127.0.0.1:{port}", "app:app"), "--certfile", "--keyfile"
    ),
    "granian-tls": _tls(
        _python("granian", "--interface", "asgi", "--port", "{port}", "app:app"), "--ssl-certificate", "--ssl-keyfile"
    ),
    "opencode-sse-serve": _python("opencode_sse_plugin.cli", "serve", "--store", "memory://", "--port", "{port}"),
}
#: Those by which the short run would take longer than what they are likely to find.
ONLY_IN_CHAOS: Final = {"hypercorn-asyncio-tls", "granian-tls"}
#: On a listening socket of ours, and with a scope that does not lead to the connection.
ON_A_SOCKET: Final = {
    "hypercorn-asyncio": _python("hypercorn", "--bind", "fd://{port}", "app:hidden"),
    "hypercorn-trio": _python("hypercorn", "--worker-class", "trio", "--bind", "fd://{port}", "app:hidden"),
}


class Server:
    """One of them, in its own process group.

    :param listener: what it listens on, for those of ``ON_A_SOCKET``. :param settings: of the bus, by environment.
    """

    def __init__(self, name: str, listener: socket.socket | None = None, **settings: Any) -> None:
        self.name = name
        self.tls = name.endswith("-tls")
        environment = {f"OPENCODE_SSE_{key.upper()}": str(value) for key, value in settings.items()}
        # A file, not a pipe: one that nobody reads from would hold the server up.
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        deadline = time.monotonic() + TIMEOUT
        while True:
            self.port = free_port() if listener is None else listener.getsockname()[1]
            self.process = subprocess.Popen(
                SERVERS[name](self.port) if listener is None else ON_A_SOCKET[name](listener.fileno()),
                pass_fds=() if listener is None else [listener.fileno()],
                cwd=HERE,
                stdout=self._said,
                stderr=self._said,
                env={**CLEAN, **environment},
                start_new_session=True,
            )
            self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
            # Over TLS nothing is kept open: Python waits 30 s for a client that does not say goodbye.
            # Else for less than the 5 s of servers, or they close it while the next request is on its way.
            limits = httpx.Limits(max_keepalive_connections=0 if self.tls else None, keepalive_expiry=2)
            self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=TIMEOUT, verify=False, limits=limits)
            if self._answers():
                return
            said = self.said()
            self._end()  # Somebody else took the port meanwhile.
            assert time.monotonic() < deadline, f"{name} did not start: {said}"

    def _answers(self) -> bool:
        while self.process.poll() is None:
            try:
                if os.getpgid(self.status()["pid"]) == self.process.pid:
                    return True
            except (httpx.TransportError, ProcessLookupError):
                pass
            time.sleep(0.02)
        return False

    def reader(self, path: str = "/event", **headers: str) -> Reader:
        """Open a stream."""
        return Reader(self.port, path, tls=self.tls, **headers)

    def stalled(self) -> Stalled:
        """Open a stream that is not read."""
        return Stalled(self.port, tls=self.tls)

    def status(self) -> dict[str, Any]:
        """``/event/status``."""
        status: dict[str, Any] = self._http.get("/event/status").json()
        return status

    def publish(self, *events: dict[str, Any]) -> int:
        """Publish in one request; the last number."""
        answer = self._http.post("/event", json=list(events))
        assert answer.status_code == 200, answer.text
        last: int = answer.json()["last"]
        return last

    def until(self, reached: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Ask for the status until it says something."""
        deadline = time.monotonic() + TIMEOUT
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, f"{what} did not come: {status}"
            time.sleep(0.02)
        return status

    def sockets(self) -> dict[int, int]:
        """The machine's view: by the other side's port, what lies unsent in each connection, closed ones included."""
        found = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, own, peer, _, queues, *_ = line.split()
            if int(own.partition(":")[2], 16) == self.port and peer.partition(":")[2] != "0000":
                found[int(peer.partition(":")[2], 16)] = int(queues.partition(":")[0], 16)
        return found

    def files(self) -> int:
        """How many files the process that serves has open."""
        return len(os.listdir(f"/proc/{self.status()['pid']}/fd"))

    def memory(self) -> int:
        """Resident bytes of the process that serves."""
        pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @cached_property
    def _pid(self) -> int:
        # Asked for once: a status of thousands of subscribers takes memory itself.
        pid: int = self.status()["pid"]
        return pid

    def said(self) -> list[str]:
        """What it logged."""
        self._said.seek(0)
        return self._said.read().splitlines()

    def close(self) -> None:
        """End it with all its children."""
        self._end()
        self._said.close()

    def _end(self) -> None:
        self._http.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)


def free_port() -> int:
    """One that nobody listens on now, nor is given to another of the tests' processes."""
    mine = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port: int = sock.getsockname()[1]
            if port // 2 % 16 == mine:  # Linux gives odd ones first
                return port
