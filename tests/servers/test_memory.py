"""What subscribers cost: little while they wait, nothing that grows with what is published if they never read."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from .programs import Server
from .readers import Stalled, ask

Opened = Callable[[Any], Any]

KIB, MIB = 1024, 1024 * 1024
STALLED = 100
#: Those who wait, and what each may cost: about 9.5 KB of which are the server's own; a task each would be 4 KB more.
WAITING, PER_WAITING = 400, 12 * KIB
RETAIN_EVENTS, RETAIN_BYTES = 10_000, 8 * MIB
#: Of one socket: what uvicorn lets wait before it says so, and the last batch on top.
PER_SOCKET = 64 * KIB + 64 * KIB
COUNT, BATCH = 200_000, 1000
#: 300 bytes with its id.
EVENT = b'{"type":"some.event","properties":{"pad":"' + b"x" * 217 + b'"}}\n'
_COMPLAINT = re.compile(rb'"type":"server\.stream[^}]*')
_NUMBER = re.compile(rb"\nid: [^:\n]+:(\d+)\n\n")


class Counting:
    """A healthy reader, which has to read as fast as is published; keeps the numbers of the events."""

    def __init__(self, port: int) -> None:
        self.numbers: list[int] = []
        #: Frames of ours that say that something is wrong.
        self.complaints: list[bytes] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request("GET", "/event")
        self._answer = self._connection.getresponse()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="reader")
        self._thread.start()

    def _run(self) -> None:
        rest = b""
        with suppress(OSError, http.client.HTTPException):
            while data := self._answer.read1(256 * KIB):
                whole, end, rest = (rest + data).rpartition(b"\n\n")
                with self._changed:
                    self.numbers += map(int, _NUMBER.findall(whole + end))
                    self.complaints += _COMPLAINT.findall(whole)
                    self._changed.notify_all()

    def until(self, number: int) -> None:
        """Wait for an event."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.numbers and self.numbers[-1] >= number, 60), self.numbers[-1:]

    def close(self) -> None:
        """Leave."""
        assert self._connection.sock is not None
        with suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._answer.close()
        self._connection.close()


def test_a_hundred_that_never_read_beside_one_that_does(opened: Opened) -> None:
    server = opened(
        Server(
            "opencode-sse-serve",
            heartbeat=600,
            write_timeout=600,  # they are to stay
            retain_events=RETAIN_EVENTS,
            retain_bytes=RETAIN_BYTES,
        )
    )
    client = opened(httpx.Client(base_url=server.url, trust_env=False, timeout=60))
    headers = {"content-type": "application/x-ndjson"}

    def publish(events: int) -> int:
        for _ in range(events // BATCH):
            answer = client.post("/event", content=EVENT * BATCH, headers=headers)
            assert answer.status_code == 200, answer.text
            last: int = answer.json()["last"]
            healthy.until(last - 3 * BATCH)  # a healthy one is not a day behind
        healthy.until(last)
        return last

    healthy = opened(Counting(server.port))
    publish(2 * RETAIN_EVENTS)  # the store is full from here on
    stalled = [opened(Stalled(server.port)) for _ in range(STALLED)]
    before = server.memory()
    head = publish(COUNT)
    grown = server.memory() - before

    assert healthy.numbers == list(range(head + 1))  # from that of server.connected on
    assert healthy.complaints == []
    # Each of them was really over its limit, and its socket full.
    waiting = [subscriber for subscriber in server.status()["subscribers"] if subscriber["lag"]["blocked"] > 0]
    assert len(waiting) == len(stalled)
    assert all(subscriber["lag"]["events"] > subscriber["limits"]["events"] for subscriber in waiting)
    assert min(server.sockets()[one.port] for one in stalled) > 0
    assert grown <= RETAIN_BYTES + STALLED * PER_SOCKET


@pytest.mark.parametrize("name", ["uvicorn-httptools-uvloop", "uvicorn-h11-asyncio", "opencode-sse-serve"])
def test_those_who_wait_cost_little(opened: Opened, name: str) -> None:
    server = opened(Server(name, heartbeat=600))

    def come(count: int) -> None:
        for _ in range(count):
            reader, said = opened(ask(server.port)), b""
            while b"server.connected" not in said:
                said += reader.recv(4096)

    come(20)  # What the first ones load is nobody's.
    before = server.memory()
    come(WAITING)
    assert (server.memory() - before) / WAITING <= PER_WAITING
