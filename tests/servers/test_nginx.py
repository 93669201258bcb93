"""Behind nginx: with the documented settings everything is as without it; with its own, what HTTP/1.0 leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .nginx import DEFAULT, Nginx, documented
from .programs import Server
from .readers import Reader

Opened = Callable[[Any], Any]
BOTH = pytest.mark.parametrize("location", [documented(), DEFAULT], ids=["documented", "default"])
END = {"type": "the.end"}


@pytest.fixture
def behind(opened: Opened) -> Callable[..., tuple[Server, Nginx]]:
    """Start a server and an nginx in front of it; takes nginx's settings and the bus's.

    A server that keeps to HTTP/1.0 when asked by it: uvicorn with httptools sends chunks all the same.
    """

    def start(location: str, **settings: Any) -> tuple[Server, Nginx]:
        server = opened(Server("uvicorn-h11-asyncio", **{"heartbeat": 600, **settings}))
        return server, opened(Nginx(server.port, location))

    return start


def numbers(reader: Reader) -> list[int]:
    return [frame.properties["n"] for frame in reader.frames if frame.type == "numbered"]


def overrun(server: Server, limit: int) -> int:
    """Publish until the one subscriber is blocked with more behind it than its limit; how many that took."""
    for n in range(800):
        if n % 20 == 0:
            (subscriber,) = server.status()["subscribers"]
            lag = subscriber["lag"]
            if lag["events"] > limit and lag["blocked"] > 0:
                return n
        server.publish({"type": "numbered", "properties": {"n": n, "pad": "x" * 20_000}})
    raise AssertionError(f"no backlog over the limit: {subscriber}")


@BOTH
@pytest.mark.parametrize("path", ["/event", "/global/event"])
def test_every_frame_comes_at_once(behind: Any, opened: Opened, location: str, path: str) -> None:
    server, nginx = behind(location)
    reader = opened(Reader(nginx.port, path))
    reader.until("server.connected")
    for n in range(3):
        server.publish({"type": f"small.{n}"})  # nothing follows that could push it
        reader.until(f"small.{n}")
    assert reader.headers["content-type"] == "text/event-stream"
    assert reader.headers["cache-control"] == "no-cache, no-transform"


@BOTH
def test_a_client_that_leaves_is_noticed(behind: Any, opened: Opened, location: str) -> None:
    server, nginx = behind(location)
    for _ in range(10):
        opened(Reader(nginx.port)).until("server.connected")
    server.until(lambda status: len(status["subscribers"]) == 10, "the subscribers")
    leaver = opened(Reader(nginx.port))
    leaver.until("server.connected")
    leaver.close()
    server.until(lambda status: len(status["subscribers"]) == 10, "the end of one")


def test_an_overflow_is_an_abort_and_a_resume_through_the_proxy_is_exact(behind: Any, opened: Opened) -> None:
    server, nginx = behind(documented(), queue_max=40)
    reader = opened(Reader(nginx.port))
    reader.until("server.connected")
    with reader.paused():
        count = overrun(server, 40)
    lagged = reader.until("server.stream.lagged")
    assert (lagged.properties["action"], lagged.properties["policy"]) == ("reconnect", "disconnect")
    assert reader.until_end()[-1] == "server.stream.lagged"
    assert reader.ending == "abort"
    got = numbers(reader)
    assert got == list(range(len(got)))
    assert lagged.properties["dropped"] == count - len(got) > 0

    cursor = [frame.id for frame in reader.frames if frame.id][-1]
    again = opened(Reader(nginx.port, **{"Last-Event-ID": cursor}))
    again.until("server.heartbeat")
    server.publish(END)
    again.until(END["type"])
    assert got + numbers(again) == list(range(count))


def test_by_http_1_0_an_overflow_catches_up_since_nobody_would_see_the_abort(behind: Any, opened: Opened) -> None:
    server, nginx = behind(DEFAULT, queue_max=40)
    reader = opened(Reader(nginx.port))
    reader.until("server.connected")
    with reader.paused():
        count = overrun(server, 40)
    server.publish(END)
    reader.until(END["type"])
    assert numbers(reader) == list(range(count))
    assert server.status()["counters"]["overflows"] == 1
    assert [frame.type for frame in reader.frames if frame.type.startswith("server.")] == ["server.connected"]
    assert reader.ending is None


def test_by_http_1_0_what_retention_took_is_told_and_the_stream_goes_on(behind: Any, opened: Opened) -> None:
    server, nginx = behind(DEFAULT, queue_max=40, retain_events=50)
    reader = opened(Reader(nginx.port))
    reader.until("server.connected")
    with reader.paused():
        count = overrun(server, 45) + 100
        for n in range(count - 100, count):
            server.publish({"type": "numbered", "properties": {"n": n}})
    server.publish(END)
    reader.until(END["type"])
    losses = [frame.properties for frame in reader.frames if frame.type == "server.stream.lagged"]
    assert {(loss["action"], loss["exceeded"]) for loss in losses} == {("continue", "retention")}
    lost = [n - 1 for loss in losses for n in range(loss["first"], loss["last"] + 1)]
    assert sorted(numbers(reader) + lost) == list(range(count))


@BOTH
def test_a_reader_that_stalls_behind_it_is_dropped(behind: Any, opened: Opened, location: str) -> None:
    server, nginx = behind(location, write_timeout=1)
    reader = opened(Reader(nginx.port))
    reader.until("server.connected")
    with reader.paused():
        (before,) = server.status()["subscribers"]
        overrun(server, 20)
        server.until(lambda status: not status["subscribers"], "the end of the stalled one")
    reader.until_end()
    assert reader.ending == "abort"
    got = numbers(reader)
    assert got == list(range(len(got)))
    assert before["id"] not in [subscriber["id"] for subscriber in server.status()["subscribers"]]


@pytest.mark.parametrize(("location", "ending"), [(documented(), "abort"), (DEFAULT, "clean")])
def test_a_drain_is_told(behind: Any, opened: Opened, location: str, ending: str) -> None:
    """By HTTP/1.0 it looks like a clean end, after which an SDK does not come back."""
    server, nginx = behind(location)
    reader = opened(Reader(nginx.port))
    reader.until("server.connected")
    server.process.terminate()
    assert reader.until_end() == ["server.connected", "server.stream.draining"]
    assert reader.ending == ending
