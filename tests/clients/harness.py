"""Client programs as processes, and the host seen from outside."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx
import pytest

from opencode_sse_plugin import Settings

from .host import ThreadedHost

HERE = Path(__file__).parent
TIMEOUT = 30.0


class Received(NamedTuple):
    """What a client program printed about one event."""

    id: str | None
    type: str
    properties: dict[str, Any]

    @property
    def control(self) -> bool:
        return self.type.startswith("server.")


class Client:
    """A client program in its own process group.

    :param command: the program and its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.received: list[Received] = []
        #: Whether it said that its stream is over for good.
        self.ended = False
        self._gone = False
        self._changed = threading.Condition()
        # For a browser's profile; a short path, since a socket lies in it.
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "TMPDIR": self._directory.name},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="client output")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            printed = json.loads(line)
            with self._changed:
                if "ended" in printed:
                    self.ended = True
                else:
                    self.received.append(Received(printed.get("id"), printed["type"], printed["properties"]))
                self._changed.notify_all()
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    @property
    def events(self) -> list[Received]:
        """Without control frames."""
        return [event for event in self.received if not event.control]

    @property
    def numbers(self) -> list[int]:
        """``n`` of each event that has one, as received."""
        return [event.properties["n"] for event in self.events if "n" in event.properties]

    def control(self, type: str) -> list[dict[str, Any]]:
        """Properties of the control frames of a type."""
        return [event.properties for event in self.received if event.type == type]

    def until(self, reached: Callable[[Client], object], what: str) -> None:
        """Wait for what it prints.

        :raises AssertionError: if that does not come, with what did.
        """
        with self._changed:
            self._changed.wait_for(lambda: reached(self) or self._gone, TIMEOUT)
            if not reached(self):
                numbers = self.numbers
                raise AssertionError(
                    f"{what} did not come: exit code {self._process.poll()}, ended {self.ended}, {len(numbers)} events "
                    f"{numbers[:3]}…{numbers[-3:]}, control {[e for e in self.received if e.control]}, "
                    f"errors {self.errors()}"
                )

    def until_connected(self) -> None:
        """Wait until its stream has begun."""
        self.until(lambda client: client.control("server.connected"), "server.connected")

    def until_number(self, number: int) -> None:
        """Wait until it got this event."""
        self.until(lambda client: number in client.numbers[-200:], f"event {number}")

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop its processes, so that nobody reads from its socket."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def errors(self) -> str:
        """The end of its standard error."""
        self._errors.seek(0)
        return self._errors.read()[-2000:].decode(errors="replace")

    def close(self) -> None:
        """End it with all its children."""
        if self._process.poll() is None or self._reader.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
        self._directory.cleanup()


class Host:
    """The host app, over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.published = 0
        limits = httpx.Limits(keepalive_expiry=2)  # Less than the server's 5 s, or it closes it under a request.
        self._http = httpx.Client(base_url=self.url, trust_env=False, timeout=TIMEOUT, limits=limits)

    def publish(self, count: int, size: int = 0, properties: dict[str, Any] | None = None, **extra: Any) -> int:
        """Publish numbered events in one request; the last number."""
        numbers = range(self.published + 1, self.published + count + 1)
        same = {"pad": "x" * size, **(properties or {})}
        return self.publish_these([{"type": "test.event", "properties": {"n": n, **same}, **extra} for n in numbers])

    def publish_these(self, events: list[dict[str, Any]], *, numbered: bool = True) -> int:
        """Publish events as they are in one request; the last number."""
        # In ASCII, since httpx's own encoding refuses lone surrogates.
        body, headers = json.dumps(events), {"content-type": "application/json"}
        answer = self._http.post("/event", content=body, headers=headers)
        assert answer.status_code == 200, answer.text
        self.published += len(events) if numbered else 0
        return self.published

    def status(self) -> dict[str, Any]:
        """``/event/status``."""
        status: dict[str, Any] = self._http.get("/event/status").json()
        return status

    def requests(self) -> list[dict[str, str | None]]:
        """The streams that were asked for, in order."""
        requests: list[dict[str, str | None]] = self._http.get("/requests").json()
        return requests

    def until(self, reached: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        """Ask for the status until it says something."""
        deadline = time.monotonic() + TIMEOUT
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, f"{what} did not come: {status}"
            time.sleep(0.01)
        return status

    def overrun(self, client: Client, **event: Any) -> int:
        """Publish while the client's processes are stopped, until its lag is over its limit; the last number."""
        deadline = time.monotonic() + TIMEOUT
        with client.stopped():
            for _ in range(6):
                self.publish(100, 4096, **event)
            # Now and then the kernel finds room for more of it, and the overflow is over by now.
            while not _over_the_limit(status := self.status()):
                assert time.monotonic() < deadline, f"no lag over the limit: {status}"
                self.publish(100, 4096, **event)
        return self.published

    def until_over_the_limit(self) -> dict[str, Any]:
        """Wait until the one subscriber is blocked with more behind it than it may have."""
        return self.until(_over_the_limit, "a lag over the limit")

    def until_full(self) -> dict[str, Any]:
        """Wait until the one subscriber is blocked with no room behind it for ten more."""
        return self.until(_full, "a lag without room")

    def close(self) -> None:
        self._http.close()


def _over_the_limit(status: dict[str, Any]) -> bool:
    if not status["subscribers"]:
        overflows: int = status["counters"]["overflows"]
        return overflows > 0
    (subscriber,) = status["subscribers"]
    events: int = subscriber["lag"]["events"]
    return events > subscriber["limits"]["events"] and subscriber["lag"]["blocked"] > 0


def _full(status: dict[str, Any]) -> bool:
    (subscriber,) = status["subscribers"]
    events: int = subscriber["lag"]["events"]
    return events > subscriber["limits"]["events"] - 10 and subscriber["lag"]["blocked"] > 0.2


class HostInThread(Host):
    """Most tests' host."""

    def __init__(self, **settings: Any) -> None:
        self._served = ThreadedHost(Settings(**settings))
        super().__init__(self._served.port)

    def close(self) -> None:
        super().close()
        self._served.close()


class HostProcess(Host):
    """A host in its own process, for signals."""

    def __init__(self, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "host.py"), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        super().__init__(self._next_generation())

    def _next_generation(self) -> int:
        assert self._process.stdout is not None
        port: int = json.loads(self._process.stdout.readline())["port"]
        return port

    def drain(self) -> None:
        """SIGTERM; returns when the next generation listens."""
        os.kill(self._process.pid, signal.SIGTERM)
        self._next_generation()

    def close(self) -> None:
        super().close()
        os.kill(self._process.pid, signal.SIGINT)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()


def command(program: str, base: str, path: str = "/event", query: dict[str, str] | None = None) -> list[str]:
    """The command line of a client program."""
    runner = "node" if program.endswith(".mjs") else sys.executable
    return [runner, str(HERE / "programs" / program), json.dumps({"base": base, "path": path, "query": query or {}})]


def install_node_packages() -> None:
    """Install what package-lock.json pins, once, whoever of the parallel test processes comes first."""
    installed = HERE / "node_modules" / ".package-lock.json"
    with (HERE / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed.exists() and installed.stat().st_mtime >= (HERE / "package-lock.json").stat().st_mtime:
            return
        if shutil.which("node") is None or shutil.which("npm") is None:
            pytest.fail("the clients need Node.js: apt-get install nodejs npm")
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["node", "unpack_chromium.mjs"], cwd=HERE, check=True)
