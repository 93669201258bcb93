"""Clients that are slow, half there, too many, or leave in the middle, over real sockets."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import anyio
import httpx
import pytest

from opencode_sse_plugin import event_app

from .apps import new_bus
from .served import TIMEOUT, Served, Watcher
from .witness import END

Serve = Callable[..., Served]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENCODE_")}

HEAD = b"POST /event HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
GET = b"GET /event HTTP/1.1\r\nHost: localhost\r\n\r\n"
LINE = b'{"type":"bad","properties":{"text":"\xc3\xa4"}}\n'
#: Requests that stop in the middle.
HALVES = {
    "nothing": b"",
    "half a line": b"GET /eve",
    "half the headers": b"GET /event HTTP/1.1\r\nHost: loc",
    "no end of headers": b"GET /event HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: x:1\r\n",
    "no body": HEAD + b"Content-Length: 100\r\n\r\n",
    "half a line of body": HEAD + b"Content-Length: 100\r\n\r\n" + LINE[:20],
    "a line and a half": HEAD + b"Content-Length: 100\r\n\r\n" + LINE + LINE[:20],
    "within a letter": HEAD + b"Content-Length: 100\r\n\r\n" + LINE + LINE[:37],
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(LINE) + LINE[:20],
    "no last chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(LINE) + LINE + b"\r\n",
}


@contextmanager
def nothing_is_said(log: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nobody is to be woken at night by a client that leaves."""
    with log.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in log.records if record.levelno >= logging.WARNING] == []


@pytest.fixture(params=[("h11", False), ("httptools", True)], ids=["h11-asyncio", "httptools-uvloop"])
def host(serve: Serve, request: pytest.FixtureRequest) -> Served:
    bus = new_bus(max_subscribers=100, heartbeat=600)
    http, uvloop = request.param
    return serve(event_app(bus, authorize=None, publish=True), bus, http=http, uvloop=uvloop)


@contextmanager
def witnessed(host: Served) -> Iterator[None]:
    with closing(Watcher(host.url)) as watcher:
        first = host.bus.head + 1
        yield
        watcher.check(first, host.publish(END))


@contextmanager
def connected(port: int, count: int, *said: bytes) -> Iterator[list[socket.socket]]:
    """So many connections, each of which says this."""
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            sockets.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT)))
            for part in said:
                sockets[-1].sendall(part)
        yield sockets


def answer(sock: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and headers."""
    head = b""
    while b"\r\n\r\n" not in head:
        received = sock.recv(65536)
        assert received, f"no answer, but {head!r}"
        head += received
    first, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers


def reset(sock: socket.socket) -> None:
    """Leave with RST, as a dying machine does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def half_close(sock: socket.socket) -> None:
    """Say that nothing more will come, and read what does."""
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass


WAYS_TO_LEAVE = {"close": socket.socket.close, "reset": reset, "half-close": half_close}


def everyone_left(host: Served) -> None:
    """Only the witness is there."""
    host.until(lambda: len(host.bus.statistics()["subscribers"]) == 1, "the end of the subscribers")
    host.until(lambda: len(host.server.server_state.connections) == 1, "the end of the connections")


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE.values(), ids=WAYS_TO_LEAVE)
def test_requests_that_stop_in_the_middle(
    host: Served, leave: Callable[[socket.socket], None], caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_is_said(caplog), witnessed(host), ExitStack() as stack:
        sockets = [sock for half in HALVES.values() for sock in stack.enter_context(connected(host.port, 20, half))]
        for n in range(50):
            host.publish("good", {"n": n})
        for sock in sockets:
            leave(sock)
        everyone_left(host)
        assert host.bus.head == 50


def test_a_request_that_takes_its_time(host: Served, caplog: pytest.LogCaptureFixture) -> None:
    said = HEAD + b"Content-Length: %d\r\n\r\n" % len(LINE) + LINE
    with nothing_is_said(caplog), witnessed(host):
        with connected(host.port, 3) as sockets:
            for at in range(len(said)):
                for sock in sockets:
                    sock.sendall(said[at : at + 1])
                if at % 10 == 0:
                    host.publish("good")
            assert [answer(sock)[0] for sock in sockets] == [200, 200, 200]
        everyone_left(host)


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE.values(), ids=WAYS_TO_LEAVE)
def test_readers_that_leave(
    host: Served, leave: Callable[[socket.socket], None], caplog: pytest.LogCaptureFixture
) -> None:
    with nothing_is_said(caplog), witnessed(host), connected(host.port, 60, GET) as sockets:
        assert {answer(sock)[0] for sock in sockets} == {200}
        for index, sock in enumerate(sockets):
            host.publish("good", {"pad": "x" * 5000})
            if index % 2:
                leave(sock)
        for sock in sockets[::2]:
            leave(sock)
        everyone_left(host)


def test_readers_that_talk_nonsense_behind_their_request(host: Served, caplog: pytest.LogCaptureFixture) -> None:
    """httptools closes on them, and for a moment nobody but its transport knows; h11 looks no further while a stream
    runs, so that they have to leave by themselves."""

    async def publish_all_the_time() -> None:
        while len(host.bus.statistics()["subscribers"]) > 1:
            assert await host.bus.publish("good")
            await anyio.sleep(0.001)

    with witnessed(host), connected(host.port, 60, GET) as sockets:
        assert {answer(sock)[0] for sock in sockets} == {200}
        publishing = host.start(publish_all_the_time)
        for sock in sockets:
            sock.sendall(b"\0nonsense\r\n\r\n")
        first = host.bus.head
        host.until(lambda: host.bus.head > first + 20 or publishing.done(), "events after the nonsense")
        for sock in sockets:
            sock.close()
        publishing.result(TIMEOUT)
        everyone_left(host)
    said = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert said <= {"Invalid HTTP request received."}


def test_fifty_megabytes_over_a_socket(host: Served, caplog: pytest.LogCaptureFixture) -> None:
    def body() -> Iterator[bytes]:
        yield b'{"type":"bad","properties":{"pad":"'
        for _ in range(50):
            yield b"x" * 1_000_000
        yield b'"}}'

    with nothing_is_said(caplog), witnessed(host):
        for headers in ({}, {"content-length": str(50_000_000 + 38)}):
            try:
                refused = httpx.post(
                    f"{host.url}/event",
                    content=body(),
                    headers={"content-type": "application/json", **headers},
                    trust_env=False,
                )
                assert refused.status_code == 413
            except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                pass  # The server has answered and closed while we were still sending.
            host.publish("good")
        assert host.bus.head == 2


# Too many.


def test_more_than_the_limit(host: Served, caplog: pytest.LogCaptureFixture) -> None:
    with nothing_is_said(caplog), witnessed(host), connected(host.port, 300, GET) as sockets:
        answers = [answer(sock) for sock in sockets]
        let_in = [sock for sock, (status, _) in zip(sockets, answers, strict=True) if status == 200]
        refused = [headers for status, headers in answers if status == 503]
        assert (len(let_in), len(refused)) == (99, 201)  # and the witness
        assert {headers["retry-after"] for headers in refused} == {"5"}
        host.publish("good")
        # Whoever writes, replays, or looks, is served; whoever leaves makes room.
        assert httpx.get(f"{host.url}/event/status", trust_env=False).status_code == 200
        assert httpx.post(f"{host.url}/event", json={"type": "good"}, trust_env=False).status_code == 200
        for sock in let_in[:40]:
            sock.close()
        host.until(lambda: len(host.bus.statistics()["subscribers"]) == 60, "room")
        with connected(host.port, 50, GET) as more:
            assert sorted(answer(sock)[0] for sock in more) == [200] * 40 + [503] * 10


@pytest.mark.chaos
def test_ten_thousand_connections_against_the_limit() -> None:
    """Against the command itself, each side in a process of its own."""
    limit, count = 9000, 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > count + 500, f"{count} connections need more open files than {hard}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    command = [sys.executable, "-m", "opencode_sse_plugin.cli", "serve", "--port", "0"]
    environment = {"OPENCODE_SSE_MAX_SUBSCRIBERS": str(limit), "OPENCODE_SSE_HEARTBEAT": "600"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**CLEAN, **environment}
    )
    try:
        assert process.stdout is not None
        url, port = re.findall(r"(http://127.0.0.1:(\d+))", process.stdout.readline())[0]
        with ExitStack() as stack, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            watcher = stack.enter_context(closing(Watcher(url)))
            sockets = stack.enter_context(connected(int(port), count, GET))
            answers = [answer(sock) for sock in sockets]
            statuses = [status for status, _ in answers]
            assert (statuses.count(200), statuses.count(503)) == (limit - 1, count - limit + 1)
            assert all("retry-after" in headers for status, headers in answers if status == 503)
            for n in range(20):
                assert client.post("/event", json={"type": "good", "properties": {"n": n}}).status_code == 200
            for sock, status in zip(sockets, statuses, strict=True):
                if status == 200:
                    read = b""
                    while b'"n":19}' not in read:
                        read += sock.recv(65536)
            status = client.get("/event/status").json()
            assert len(status["subscribers"]) == limit
            head = client.post("/event", json={"type": END}).json()["last"]
            watcher.check(1, head)
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
