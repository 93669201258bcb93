"""One measurement: one server, one number of subscribers, one rate."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from machine import BUILD, HERE, CannotRun, cpu_seconds, resident_bytes, two_cores

SERVERS: Final = {
    "ours": [sys.executable, str(HERE / "servers/ours.py")],
    "ours*": [sys.executable, str(HERE / "servers/ours.py"), "loop_share=1"],
    "sse-starlette": [sys.executable, str(HERE / "servers/peer_sse_starlette.py")],
    "sse-starlette*": [sys.executable, str(HERE / "servers/peer_sse_starlette.py"), "events"],
    "fastapi.sse": [sys.executable, str(HERE / "servers/peer_fastapi.py")],
    "nginx+nchan": [sys.executable, str(HERE / "servers/peer_nchan.py")],
    "bare uvloop": [sys.executable, str(HERE / "servers/peer_uvloop.py")],
    "write() loop": [str(BUILD / "loop")],
    "opencode": [sys.executable, str(HERE / "servers/peer_opencode.py")],
}
#: The client parses about so many events a second and counts the others.
_PARSED: Final = 200_000
_WARM_UP: Final = 20
#: What arrives so long after the last publish still counts; a server that cannot keep up is not given time to.
_GRACE: Final = 0.5


class Unavailable(CannotRun):
    """A server that does not start; the message is its own."""


@dataclass(frozen=True)
class Shape:
    """
    :param sessions: every subscriber is filtered to its own session, and events go to them in turn.
    :param kind: how it is measured, see ``scenarios``. :param policy: of those who stall; without one, nobody does.
    :param settings: ours, where the default does not fit. :param turns: whether ours times its turns of the event
        loop meanwhile, which costs it two system calls and a turn more for every wake-up.
    """

    subscribers: int
    rate: float
    sessions: bool = False
    kind: str = "fan-out"
    policy: str = ""
    settings: str = ""
    turns: bool = False


@dataclass(frozen=True)
class Measurement:
    """
    :param busy: share of a core. :param delivered: share of what should have arrived.
    :param together: events a read: a server that is behind joins them, and so does Nagle's algorithm.
    :param missing: gaps by cursor, where there are cursors. :param p99_times: p99 over that without replays.
    :param turn_ms: thread time of a turn of the event loop with a wake-up of ours in it, p99.9.
    """

    events: int
    per_cpu_second: float
    cpu_us_per_event: float
    busy: float
    delivered: float
    together: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    idle_kb: float
    missing: int
    lagged: int
    about: str
    mb_per_cpu_second: float = 0.0
    p99_times: float = 0.0
    turn_ms: float = 0.0


class Child:
    """A process that is told lines and answers with lines of JSON."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Its children end with it, whatever they are in the middle of.
        )
        self._buffer = b""

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        try:
            process.communicate(timeout=60)  # The end of stdin is the sign to leave.
        except (subprocess.TimeoutExpired, BrokenPipeError):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line.

        :raises Unavailable: if the process ends or says nothing for so long.
        """
        assert self._process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not readable:
                raise Unavailable(f"{self.name} says nothing for {seconds:.0f} s")
            got = os.read(self._process.stdout.fileno(), 65536)
            if not got:
                raise self._gone()
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str, seconds: float = 10) -> dict[str, Any]:
        self.tell(line)
        return self.hear(seconds)

    def _gone(self) -> Unavailable:
        _, errors = self._process.communicate()
        # The frames of a traceback and the drawings of an exception group are not the message.
        said = [line for line in errors.decode(errors="replace").splitlines() if line.strip(" |+-") and line[0] != " "]
        return Unavailable(said[-1] if said else f"{self.name} ended with {self._process.returncode}")


@contextmanager
def start_server(server: str, settings: str = "") -> Iterator[tuple[Child, dict[str, Any]]]:
    """A server on its core, and what it says once it is ready.

    :param settings: ours, as ``NAME=VALUE`` by spaces.
    """
    server_cpu, load_cpu = two_cores()
    command = list(SERVERS[server])
    environment = {"BENCH_SETTINGS": settings}
    if server_cpu is not None:
        environment |= {"BENCH_SERVER_CPU": str(server_cpu), "BENCH_LOAD_CPU": str(load_cpu)}
        if server == "write() loop":
            command += ["--cpu", str(server_cpu)]
    with Child(server, command, environment) as child:
        yield child, child.hear(70)


def measure_fan_out(server: str, shape: Shape, seconds: float) -> Measurement:
    """Start a server and the load client, publish for so long, wait until nothing more arrives.

    :raises Unavailable: if one of them cannot run.
    """
    with start_server(server, shape.settings) as (child, ready):
        warm_up(ready["port"])
        empty = resident_bytes(ready["pids"])
        with load_client(server, shape, ready["port"]) as load:
            connected = load.hear(120)
            if connected["failed"]:
                raise Unavailable(f"{server} refused {connected['failed']} of {shape.subscribers} connections")
            time.sleep(0.3)
            idle = (resident_bytes(ready["pids"]) - empty) / shape.subscribers / 1024
            load.ask("mark")
            if ready.get("settles"):
                # Python goes through all objects once a quarter of them is new: a tenth of a second that came from
                # connecting, and fell into the measurement or not.
                child.ask("settle")
            timed = shape.turns and server == "ours"
            if timed:
                child.ask("turns")
            due = round(shape.rate * seconds)
            expected = due * (1 if shape.sessions else shape.subscribers)
            before = cpu_seconds(ready["pids"])
            child.tell(f"publish {shape.rate} {seconds} {shape.subscribers if shape.sessions else 0}")
            begun = time.monotonic()
            time.sleep(seconds)
            while load.ask("count")["events"] < expected and time.monotonic() < begun + seconds + _GRACE:
                time.sleep(0.01)
            took = time.monotonic() - begun
            used = cpu_seconds(ready["pids"]) - before
            result = load.ask("stop")
            turn_ms = 0.0
            if timed:
                child.hear(seconds + 10)
                turn_ms = child.ask("turns")["turn_ms"]
    return Measurement(
        events=result["events"],
        per_cpu_second=result["events"] / max(used, 0.01),
        cpu_us_per_event=used / max(due, 1) * 1e6,
        busy=used / took,
        delivered=result["events"] / expected,
        together=result["parsed"] / max(result["reads"], 1),
        p50_ms=result["p50_ms"],
        p99_ms=result["p99_ms"],
        max_ms=result["max_ms"],
        idle_kb=idle,
        missing=result["missing"] + result["repeated"],
        lagged=result["lagged"],
        about=ready["about"],
        mb_per_cpu_second=result["bytes"] / max(used, 0.01) / 1e6,
        turn_ms=turn_ms,
    )


def load_client(
    server: str, shape: Shape, port: int, *, path: str = "", sample: int = 0, stall: bool = False, yields: bool = False
) -> Child:
    """The load client, on its core.

    :param path: instead of that of the shape. :param sample: instead of as many as it can parse.
    :param stall: connects and reads no event. :param yields: lets another, whose latency counts, have the core first.
    """
    _, cpu = two_cores()
    default = "/event?session=ses_%d" if shape.sessions else "/event"
    expected = shape.rate if shape.sessions else shape.rate * shape.subscribers
    sample = sample or max(1, round(expected / _PARSED))
    command = [str(BUILD / "load"), "--port", str(port), "--connections", str(shape.subscribers)]
    command += ["--path", path or default, "--sample", str(sample)]
    if server.startswith("ours"):
        command += ["--ids", "ordered" if shape.sessions else "contiguous"]
    if stall:
        command += ["--stall", "1"]
    if cpu is not None:
        command += ["--cpu", str(cpu)]
    return Child("the load client", ["nice", "-n", "19", *command] if yields else command)


def warm_up(port: int) -> None:
    """A few connections that come and go, so that what a first one loads is not counted as a subscriber's memory."""
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(_WARM_UP)]
    for connection in connections:
        connection.sendall(b"GET /event HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n")
    for connection in connections:
        connection.settimeout(10)
        connection.recv(65536)
        connection.close()
    time.sleep(0.2)
