"""The same stream on every server: what ASGI promises, and what it does not."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from .programs import ON_A_SOCKET, TIMEOUT, Server

Start = Callable[..., Server]
Opened = Callable[[Any], Any]

END = {"type": "the.end"}


def big(count: int) -> list[dict[str, Any]]:
    return [{"type": "big", "properties": {"pad": "x" * 8000}} for _ in range(count)]


def alone(count: int) -> Callable[[dict[str, Any]], bool]:
    return lambda status: len(status["subscribers"]) == count


def blocked(count: int, limit: int) -> Callable[[dict[str, Any]], bool]:
    """So many are in a write that does not end, with more than this many events behind it."""

    def reached(status: dict[str, Any]) -> bool:
        lags = [subscriber["lag"] for subscriber in status["subscribers"]]
        return sum(lag["blocked"] > 0.1 and lag["events"] > limit for lag in lags) == count

    return reached


def test_the_first_frame_comes_at_once_and_every_other_one_as_well(start: Start, opened: Opened) -> None:
    server = start()
    for path in ("/event", "/global/event"):
        reader = opened(server.reader(path))
        assert reader.until("server.connected").id is not None
        server.publish({"type": f"one{path}"})  # nothing follows that could push it
        reader.until(f"one{path}")
        assert (reader.status, reader.headers["content-type"]) == (200, "text/event-stream")


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
def test_a_client_that_leaves_is_noticed_while_nothing_is_published(
    start: Start, opened: Opened, leave: Callable[[socket.socket], None]
) -> None:
    server = start()
    stays = opened(server.reader())
    leavers = [opened(server.stalled()) for _ in range(20)]
    server.until(alone(21), "the subscribers")
    for leaver in leavers:
        leave(leaver.sock)
    server.until(alone(1), "the end of the subscribers")
    server.publish(END)
    stays.until(END["type"])


def test_a_reader_that_stalls_is_dropped_with_its_socket_and_the_others_get_everything(
    start: Start, opened: Opened
) -> None:
    server = start(write_timeout=3)
    assert server.status()["server"] == {"aborts_stalled": True, "advice": None}
    reader = opened(server.reader())
    reader.until("server.connected")
    files = server.files()
    stalled = [opened(server.stalled()) for _ in range(10)]
    server.publish(*[{"type": "small"}] * 10)  # so that they have received something
    for _ in range(8):
        head = server.publish(*big(100))
    server.until(alone(1), "the end of the stalled ones")
    deadline = time.monotonic() + TIMEOUT
    while {one.port for one in stalled} & server.sockets().keys() or server.files() > files:
        assert time.monotonic() < deadline, (server.sockets(), server.files(), files)
        time.sleep(0.02)
    server.publish(END)
    reader.until(END["type"])
    numbers = [frame.cursor.seq for frame in reader.frames if frame.cursor]
    assert numbers == list(range(head + 2))
    # A resume from what it received is exact.
    for one in stalled:
        got = one.numbers()
        assert got == list(range(1, len(got) + 1))
        assert 0 < len(got) < head
    again = opened(server.reader(**{"Last-Event-ID": f"{server.status()['store']['epoch']}:{got[-1]}"}))
    again.until(END["type"])
    assert [frame.cursor.seq for frame in again.frames if frame.cursor] == list(range(got[-1], head + 2))


@pytest.mark.parametrize("name", ON_A_SOCKET)
def test_where_the_connection_cannot_be_reached_the_status_says_so_and_the_kernel_drops_it(
    name: str, opened: Opened
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1500)
        server = opened(Server(name, listener, heartbeat=600, write_timeout=600))
    said = server.status()["server"]
    assert said["aborts_stalled"] is False
    assert "TCP_USER_TIMEOUT" in said["advice"]
    reader = opened(server.reader())
    stalled = [opened(server.stalled()) for _ in range(3)]
    for _ in range(8):
        server.publish(*big(100))
    server.until(blocked(3, 100), "three blocked ones")
    server.until(alone(1), "the end of the stalled ones")
    assert server.sockets().keys().isdisjoint(one.port for one in stalled)
    server.publish(END)
    reader.until(END["type"])


@pytest.mark.parametrize("seconds", [TIMEOUT, pytest.param(2.0, marks=pytest.mark.chaos)], ids=["soon", "in-2-s"])
def test_sigterm_ends_it_with_everyone_told_and_the_stalled_ones_cut(
    start: Start, opened: Opened, seconds: float, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(queue_max=2000)
    stalled = [opened(server.stalled()) for _ in range(10)]
    # Who reads gets little, or this process would be busy with that alone.
    readers = [opened(server.reader("/event?type=small")) for _ in range(90)]
    for reader in readers:
        reader.until("server.connected")
    for _ in range(8):
        server.publish(*big(100), {"type": "small"})
    server.until(blocked(10, 100), "ten blocked ones")
    before = time.monotonic()
    server.process.terminate()
    try:
        server.process.wait(seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{server.name} did not end in {seconds} s: {server.said()}")
    with capsys.disabled():
        if seconds < TIMEOUT:
            print(f"\n{server.name}: {time.monotonic() - before:.2f} s from SIGTERM to the end")
    for reader in readers:
        assert reader.until_end() == ["server.connected", *["small"] * 8, "server.stream.draining"]
        assert reader.ending == "abort"
    assert server.sockets().keys().isdisjoint(one.port for one in stalled)
    if server.name == "opencode-sse-serve":
        assert server.process.returncode == 0
        assert [line for line in server.said() if line.startswith(("WARNING", "ERROR", "INFO", "Traceback"))] == []
    assert not any("Traceback" in line for line in server.said()), "\n".join(server.said())
