"""Streams that wait: on each of uvicorn's parsers one whose client leaves is noticed at once, without a task that waits
for it and with one, and behind CORS as well."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from opencode_sse_plugin import EventBus, Settings, direct, event_app, hangup

from .served import Reader, Served

Serve = Callable[..., Served]
Read = Callable[..., Reader]


@pytest.fixture(params=[("h11", False), ("httptools", True)], ids=["h11-asyncio", "httptools-uvloop"])
def server(request: pytest.FixtureRequest) -> dict[str, Any]:
    http, uvloop = request.param
    return {"http": http, "uvloop": uvloop}


@pytest.fixture(params=[True, False], ids=["alone", "by-a-task"])
def is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the server is known, so that it is written to directly and no task is needed."""
    if not request.param:
        monkeypatch.setattr(direct, "supports", lambda scope, send: False)
    return bool(request.param)


def nobody(bus: EventBus) -> Callable[[], bool]:
    return lambda: not bus.statistics()["subscribers"]


def test_one_that_leaves_while_nothing_comes_is_noticed_at_once(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    served = serve(event_app(bus, authorize=None), bus, **server)
    reader = read(f"{served.url}/event")
    assert reader.next().type == "server.connected"
    reader.close()
    served.until(nobody(bus), "the end of the one that left")


def test_one_that_leaves_while_the_store_is_asked_is_noticed(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    served = serve(event_app(bus, authorize=None), bus, **server)
    looking, found = served.call(asyncio.Event), served.call(asyncio.Event)

    async def bounds() -> Any:
        looking.set()
        await found.wait()
        return await type(bus.store).bounds(bus.store)  # type: ignore[attr-defined]

    bus.store.bounds = bounds  # type: ignore[method-assign]
    with closing(http.client.HTTPConnection("127.0.0.1", served.port)) as client:
        client.request("GET", "/event?after_seq=0&follow=true")
        served.until(looking.is_set, "the reader")
    served.call(found.set)
    served.until(nobody(bus), "the end of the one that left")


def test_a_connection_serves_one_stream_after_another(serve: Serve, server: dict[str, Any], is_direct: bool) -> None:
    bus = EventBus(Settings(heartbeat=600))
    served = serve(event_app(bus, authorize=None), bus, **server)
    served.publish("good")
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)) as client:
        for _ in range(3):
            client.request("GET", "/event?after_seq=0")
            assert client.getresponse().read().count(b"data: ") == 2
        client.request("GET", "/event")
        answer = client.getresponse()
        assert b"server.connected" in answer.readline() + answer.readline()
        own = client.sock
        served.until(lambda: bus.statistics()["subscribers"], "the reader")
        assert client.sock is own
        client.sock.shutdown(socket.SHUT_RDWR)
        answer.close()
    served.until(nobody(bus), "the end of the one that left")


@pytest.mark.parametrize("early", [True, False], ids=["before", "meanwhile"])
def test_middleware_that_waits_for_the_client_to_leave_is_told_as_well(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, early: bool
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    inner = event_app(bus, authorize=None)
    heard: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            await begin.wait()
            while "http.disconnect" not in heard:
                heard.append((await receive())["type"])

        if scope["type"] == "http":
            tasks.append(asyncio.create_task(listen()))
            for _ in range(3):  # Until it has had the request and waits.
                await asyncio.sleep(0)
        await inner(scope, receive, send)

    served = serve(app, bus, **server)
    begin = served.call(asyncio.Event)
    if early:
        served.call(begin.set)
    reader = read(f"{served.url}/event")
    assert reader.next().type == "server.connected"
    served.call(begin.set)
    reader.close()
    served.until(nobody(bus), "the end of the one that left")
    served.until(lambda: all(task.done() for task in tasks), "the end of the middleware")
    assert heard[-1] == "http.disconnect"


def test_middleware_may_say_that_the_client_left(serve: Serve, read: Read, server: dict[str, Any]) -> None:
    """One that wraps ``receive`` alone, as to bound the age of a stream."""
    bus = EventBus(Settings(heartbeat=600))
    inner = event_app(bus, authorize=None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given = False

        async def asked() -> Any:
            nonlocal given
            if not given:
                given = True
                return await receive()
            await told.wait()
            return {"type": "http.disconnect"}

        await inner(scope, asked if scope["type"] == "http" else receive, send)

    served = serve(app, bus, **server)
    told = served.call(asyncio.Event)
    reader = read(f"{served.url}/event")
    assert reader.next().type == "server.connected"
    served.call(told.set)
    served.until(nobody(bus), "the end that the middleware wants")


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_one_that_leaves_with_another_request_in_the_pipeline(serve: Serve, uvloop: bool, busy: bool) -> None:
    """uvicorn tells the other one only, and asyncio's transport takes what is written after the end."""
    bus = EventBus(Settings(heartbeat=600 if busy else 0.2))
    served = serve(event_app(bus, authorize=None), bus, http="httptools", uvloop=uvloop)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(b"GET /event HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        said = b""
        while b"server.connected" not in said:
            said += client.recv(4096)

    def left() -> bool:
        if busy:
            bus.publish_nowait("good")
        return nobody(bus)()

    served.until(left, "the end of the one that left")


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Transfer-Encoding: chunked", [b"4000\r\n" + b"x" * 0x4000 + b"\r\n"] * 20),
        ("Content-Length: 70000", [b"x" * 70_000]),
    ],
    ids=["unfinished", "complete"],
)
def test_a_request_with_more_of_a_body_than_uvicorn_takes(
    serve: Serve, server: dict[str, Any], is_direct: bool, header: str, body: list[bytes]
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    served = serve(event_app(bus, authorize=None), bus, **server)
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(f"GET /event HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode() + body[0])
        said = b""
        while b"server.connected" not in said:
            said += client.recv(4096)
        client.sendall(b"".join(body[1:]))
    served.until(nobody(bus), "the end of the one that left")


def test_a_stream_that_waits_keeps_no_task_but_the_servers(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    served = serve(event_app(bus, authorize=None), bus, **server)

    def tasks() -> int:
        return len(asyncio.all_tasks())

    before = served.call(tasks)
    with ExitStack() as left:
        for _ in range(5):
            reader = read(f"{served.url}/event")
            left.callback(reader.close)
            assert reader.next().type == "server.connected"
        assert served.call(tasks) - before == (5 if is_direct else 10)
    served.until(lambda: tasks() == before, "the end of all")
    ended = read(f"{served.url}/event")
    assert ended.next().type == "server.connected"
    served.call(bus.drain)
    assert [frame.type for frame in ended.rest()] == ["server.stream.draining"]
    served.until(lambda: not served.server.server_state.connections, "the end of the connection")
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_behind_cors_is_as_good_as_unwrapped(
    serve: Serve, read: Read, server: dict[str, Any], is_direct: bool, written: Counter[bool]
) -> None:
    bus = EventBus(Settings(heartbeat=600))
    app = CORSMiddleware(event_app(bus, authorize=None), allow_origins=["https://app.example"])
    served = serve(app, bus, **server)
    for _ in range(2):
        reader = read(f"{served.url}/event", headers={"origin": "https://app.example"})
        assert reader.headers["access-control-allow-origin"] == "https://app.example"
        assert reader.next().type == "server.connected"
        served.publish("good")
        assert reader.next().type == "good"
        served.until(lambda: (written[True] > 0) == is_direct, "a count of what was written")
        reader.close()
        served.until(nobody(bus), "the end of the one that left")


def test_behind_other_middleware_it_is_not(
    serve: Serve, read: Read, server: dict[str, Any], written: Counter[bool]
) -> None:
    class Other(CORSMiddleware):
        async def send(self, *args: Any, **kwargs: Any) -> None:
            await super().send(*args, **kwargs)

    bus = EventBus()
    served = serve(Other(event_app(bus, authorize=None), allow_origins=["*"]), bus, **server)
    reader = read(f"{served.url}/event")
    assert reader.next().type == "server.connected"
    served.publish("good")
    assert reader.next().type == "good"
    assert not written, "what it does with chunks is not known"


@pytest.mark.anyio
async def test_it_asks_for_what_it_needs_of_a_server() -> None:
    class Flow:
        def resume_reading(self) -> None: ...

    class Cycle:
        more_body = False
        message_event: Any = None
        flow: Any = Flow()
        disconnected: bool

        async def receive(self) -> Any: ...
        async def send(self, message: Any) -> None: ...

    cycle, other = Cycle(), Cycle()
    assert not hangup.can_tell(cycle.receive, cycle.send), "it has no event"
    cycle.message_event = asyncio.Event()
    assert not hangup.can_tell(cycle.receive, cycle.send), "it does not say whether its client left"
    cycle.disconnected = False
    assert hangup.can_tell(cycle.receive, cycle.send)
    assert not hangup.can_tell(other.receive, cycle.send), "its receive is somebody else's"
    cycle.flow = object()
    assert not hangup.can_tell(cycle.receive, cycle.send), "it cannot be read from again"
    cycle.flow, cycle.more_body = Flow(), True
    assert not hangup.can_tell(cycle.receive, cycle.send), "there is more to be received"
