"""HTTP/2, on the servers that speak it: a connection carries several streams, and none of them holds up the others."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from .http2 import Http2Client, Stream
from .programs import Server

Start = Callable[..., Server]
Opened = Callable[[Any], Any]


@pytest.fixture(params=["hypercorn-asyncio", "hypercorn-trio", "granian"])
def name(request: pytest.FixtureRequest) -> str:
    """Those that speak it."""
    name: str = request.param
    return name


def connected(client: Http2Client, **request: Any) -> Stream:
    stream = client.get(**request)
    client.until(lambda: stream.frames, "the first frame")
    assert stream.status == 200
    return stream


def big(count: int) -> list[dict[str, Any]]:
    return [{"type": "big", "properties": {"pad": "x" * 8000}} for _ in range(count)]


def blocked(status: dict[str, Any]) -> bool:
    """Whether somebody is in a write that does not end, with much behind it."""
    lags = [subscriber["lag"] for subscriber in status["subscribers"]]
    return any(lag["blocked"] > 0.1 and lag["events"] > 100 for lag in lags)


def test_every_frame_comes_at_once_and_one_that_leaves_is_noticed(start: Start, opened: Opened) -> None:
    server = start()
    client = opened(Http2Client(server.port))
    one, other = connected(client), connected(client, path="/global/event")
    for count in range(1, 4):
        server.publish({"type": "a"})  # nothing follows that could push it
        client.until(lambda: len(one.frames) == len(other.frames) == 1 + count, "the event")  # noqa: B023
    client.leave(one)
    server.until(lambda status: len(status["subscribers"]) == 1, "the end of the one that left")
    server.publish({"type": "last"})
    client.until(lambda: "last" in other.types, "the last event")


def test_a_stream_that_stalls_is_dropped_and_the_other_one_gets_everything(start: Start, opened: Opened) -> None:
    server = start(write_timeout=3, queue_max=10_000)
    client = opened(Http2Client(server.port))
    reads, stalls = connected(client), connected(client, reads=False)
    for _ in range(5):
        last = server.publish(*big(100))
    client.until(lambda: reads.numbers[-1] == last, "the last event")
    server.until(lambda status: len(status["subscribers"]) == 1, "the end of the one that stalls")
    last = server.publish({"type": "last"})
    client.until(lambda: "last" in reads.types, "the last event")
    assert reads.numbers == list(range(last + 1))
    assert stalls.numbers == list(range(len(stalls.numbers)))
    assert len(stalls.numbers) < 20

    client.read_on(stalls)  # What lay on the way may come now, and then it breaks off.
    client.until(lambda: stalls.ending, "the end of the one that stalls")
    assert stalls.ending == "abort"
    again = connected(client, last_event_id=f"{server.status()['store']['epoch']}:{stalls.numbers[-1]}")
    client.until(lambda: "last" in again.types, "the last event")
    assert again.numbers == list(range(stalls.numbers[-1], last + 1))


def test_an_overflow_is_told_and_breaks_the_stream_off(start: Start, opened: Opened) -> None:
    server = start(queue_max=50)
    client = opened(Http2Client(server.port))
    stream = connected(client, reads=False)
    for _ in range(3):
        last = server.publish(*big(100))
    server.until(blocked, "a backlog")
    client.read_on(stream)
    client.until(lambda: stream.ending, "the end of the stream")
    assert stream.ending == "abort"
    got = stream.numbers[-1]
    lagged = stream.frames[-1]
    if server.name != "granian" or lagged.type != "big":  # It forgets what it has not sent by then.
        assert (lagged.type, lagged.properties["action"]) == ("server.stream.lagged", "reconnect")
        assert lagged.properties["dropped"] == last - got
    again = connected(client, last_event_id=f"{server.status()['store']['epoch']}:{got}")
    client.until(lambda: again.numbers[-1] == last, "the rest")
    assert again.numbers == list(range(got, last + 1))


def test_a_replay_ends_cleanly(start: Start, opened: Opened) -> None:
    server = start()
    for _ in range(3):
        last = server.publish(*big(100))
    client = opened(Http2Client(server.port))
    stream = client.get("/event?after_seq=0")
    client.until(lambda: stream.ending, "the end of the replay")
    assert stream.ending == "clean"
    assert stream.numbers == list(range(last + 1))


def test_sigterm_ends_it_with_everyone_told(start: Start, opened: Opened) -> None:
    server = start()
    # What comes after the server's GOAWAY, h2 does not read.
    command = ["curl", "--silent", "--no-buffer", "--http2-prior-knowledge", f"{server.url}/event"]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    server.until(lambda status: len(status["subscribers"]) == len(clients), "the subscribers")
    server.process.terminate()
    for client in clients:
        said, _ = client.communicate(timeout=20)
        assert client.returncode != 0, "a clean end, after which no SDK comes back"
        assert b"server.stream.draining" in said
    server.process.wait(20)
