"""Writing straight from a wake-up, and the plain path: the same tests for both, on each server. Where only the plain
one exists it is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from opencode_sse_plugin import EventBus, Settings, direct, event_app

from .running import Granian, Hypercorn
from .served import Reader, Served

Serve = Callable[..., Served]
Read = Callable[..., Reader]


#: What each is served with, and whether chunks can be written behind its ``send``.
SERVERS: dict[str, tuple[dict[str, Any], bool]] = {
    "uvicorn-h11-asyncio": ({"http": "h11"}, True),
    "uvicorn-httptools-uvloop": ({"http": "httptools", "uvloop": True}, True),
    "hypercorn": ({"program": Hypercorn}, False),
    "granian": ({"program": Granian}, False),
}


@pytest.fixture(params=SERVERS)
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def server(name: str) -> dict[str, Any]:
    return SERVERS[name][0]


@pytest.fixture(params=["as-it-is", "plain"])
def is_direct(request: pytest.FixtureRequest, name: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Which path is to be taken: the server's best, or the plain one."""
    if request.param == "plain":
        monkeypatch.setattr(direct, "supports", lambda scope, send: False)
        return False
    return SERVERS[name][1]


def test_every_reader_gets_every_event_in_order(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, written: Counter[bool]
) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=None), bus, **server)
    readers = [read(f"{served.url}/{path}") for path in ("event", "global/event", "event?type=good")]
    for reader in readers:
        assert reader.next().type == "server.connected"
    for n in range(20):
        served.publish("good", {"n": n, "pad": "x" * (n * 20_000 if n % 7 == 0 else 1)})
    for reader in readers:
        frames = [reader.next() for _ in range(20)]
        assert [frame.cursor.seq for frame in frames if frame.cursor] == list(range(1, 21))
        assert [frame.properties["n"] for frame in frames] == list(range(20))
    assert (written[True] > 0) == is_direct


def test_a_reader_that_stops_for_a_while_gets_the_rest_or_is_told(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, written: Counter[bool]
) -> None:
    bus = EventBus(Settings(overflow="drop-oldest", queue_max=50))
    served = serve(event_app(bus, authorize=None), bus, **server)
    # Granian's own sockets keep some megabytes, which take half a minute to come through a small window.
    reader = read(f"{served.url}/event", buffer=1024 * 1024)
    assert reader.next().type == "server.connected"
    last = served.overrun()
    got = dropped = 0
    while got + dropped < last:
        frame = reader.next()
        if frame.type == "server.stream.lagged":
            dropped += frame.properties["dropped"]
        else:
            got += 1
    assert dropped > 0
    served.publish("after")
    assert reader.next().type == "after"
    assert bool(written) == is_direct


def test_a_publisher_that_waits_for_them_goes_on_when_they_were_written_to(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, written: Counter[bool]
) -> None:
    bus = EventBus(Settings(overflow="block?timeout=1m", queue_max=1))
    served = serve(event_app(bus, authorize=None), bus, **server)
    readers = [read(f"{served.url}/event") for _ in range(3)]
    for reader in readers:
        assert reader.next().type == "server.connected"

    served.call(
        lambda: [bus.publish_nowait("good", {"n": n}) for n in range(20)]
    )  # Each has to wait for the one before.
    served.until(lambda: bus.head == 20, "the last of them")
    for reader in readers:
        assert [reader.next().properties["n"] for _ in range(20)] == list(range(20))
    assert (written[True] > 0) == is_direct


def test_a_replay_ends_cleanly_behind_its_last_event(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, written: Counter[bool]
) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=None), bus, **server)
    assert read(f"{served.url}/event/status").status == 200  # By then the app has started.
    for n in range(500):
        served.publish("good", {"n": n})
    readers = [read(f"{served.url}/event?after_seq={after}") for after in (0, 0, 7)]
    for reader, after in zip(readers, (0, 0, 7), strict=True):
        connected, *frames = reader.rest()
        assert connected.type == "server.connected"
        assert [frame.cursor.seq for frame in frames if frame.cursor] == list(range(after + 1, 501))
        assert reader.ending == "clean"
    assert (written[True] > 0) == is_direct


def test_one_that_leaves_in_the_middle_disturbs_nobody(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool
) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=None), bus, **server)
    leaving, staying = read(f"{served.url}/event"), read(f"{served.url}/event")
    assert [reader.next().type for reader in (leaving, staying)] == ["server.connected"] * 2
    leaving.close()
    for n in range(50):
        served.publish("good", {"n": n})
    assert [staying.next().properties["n"] for _ in range(50)] == list(range(50))
    served.until(lambda: len(bus.statistics()["subscribers"]) == 1, "the end of the one that left")


def test_a_wrapped_send_is_never_written_behind(
    serve: Serve, read: Read, server: dict[str, Any], written: Counter[bool]
) -> None:
    bus = EventBus()
    inner = event_app(bus, authorize=None)
    chunks: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def watching(message: Any) -> None:
            chunks.append(message.get("body", b""))
            await send(message)

        await inner(scope, receive, watching if scope["type"] == "http" else send)

    wrapped: ASGIApp = app
    served = serve(wrapped, bus, **server)
    reader = read(f"{served.url}/event")
    assert reader.next().type == "server.connected"
    served.publish("good")
    assert reader.next().type == "good"
    assert not written
    assert any(b'"good"' in chunk for chunk in chunks)


@pytest.mark.anyio
async def test_it_asks_for_what_it_needs_of_a_server() -> None:
    class Cycle:
        async def send(self, message: Any) -> None: ...

    assert not direct.supports({"http_version": "1.1"}, Cycle().send)
    Cycle.__module__ = "uvicorn.protocols.http.httptools_impl"
    assert not direct.supports({"http_version": "1.1"}, Cycle().send), "it has no transport"
