"""The host's middleware around the stream: what it may do, and what must not reach the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from opencode_sse_plugin import EventBus, install
from opencode_sse_plugin.testing import Response, StreamResponse, lifespan, request, stream

from .apps import HELLO, KINDS, Watching, make_host, new_bus
from .served import Reader, Served

Serve = Callable[..., Served]
Read = Callable[..., Reader]

# BaseHTTPMiddleware.


def watched(kind: str, when: str, **settings: Any) -> tuple[Starlette, EventBus]:
    app = make_host(kind)
    if when == "before":
        app.add_middleware(Watching)
    bus = install(app, new_bus(**settings), authorize=None)
    if when == "after":
        app.add_middleware(Watching)
    return app, bus


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_overflow_stays_an_abort_beside_base_http_middleware(serve: Serve, read: Read, kind: str, when: str) -> None:
    app, bus = watched(kind, when, queue_max=20)
    host = serve(app, bus)
    assert read(f"{host.url}/hello").headers["x-watched"] == "yes"
    reader = read(f"{host.url}/event")
    reader.next()
    last = host.overrun()
    *events, lagged = reader.rest()
    assert "x-watched" not in reader.headers
    assert (lagged.type, lagged.properties["action"]) == ("server.stream.lagged", "reconnect")
    assert reader.ending == "abort"
    resumed = read(f"{host.url}/event", headers={"last-event-id": lagged.properties["lastCursor"]})
    resumed.next()
    numbers = [frame.cursor.seq for frame in events if frame.cursor]
    numbers += [seq for seq in iter(lambda: resumed.next().cursor.seq, last)] + [last]
    assert numbers == list(range(1, last + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["/event", "/global/event"])
def test_a_drain_stays_an_abort_beside_base_http_middleware(
    serve: Serve, read: Read, kind: str, when: str, path: str
) -> None:
    app, bus = watched(kind, when)
    host = serve(app, bus)
    reader = read(f"{host.url}{path}")
    reader.next()
    host.call(bus.drain)
    assert [frame.type for frame in reader.rest()] == ["server.stream.draining"]
    assert reader.ending == "abort"


def test_what_base_http_middleware_does_to_an_abort(serve: Serve, read: Read) -> None:
    """The reason for the default placement, and for the warning of the other one."""
    app = make_host("starlette")
    app.add_middleware(Watching)
    with pytest.warns(RuntimeWarning, match="Watching is a BaseHTTPMiddleware"):
        bus = install(app, new_bus(), authorize=None, placement="route")
    host = serve(app, bus)
    reader = read(f"{host.url}/event")
    reader.next()
    host.call(bus.drain)
    reader.rest()
    assert (reader.ending, reader.headers["x-watched"]) == ("clean", "yes")


# GZip.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
def test_a_stream_is_never_compressed_and_begins_at_once(serve: Serve, read: Read, kind: str, placement: Any) -> None:
    app = make_host(kind)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    bus = install(app, new_bus(), authorize=None, placement=placement)
    host = serve(app, bus)
    headers = {"accept-encoding": "gzip"}
    hello = httpx.get(f"{host.url}/hello", headers=headers, trust_env=False)
    assert (hello.headers["content-encoding"], hello.text) == ("gzip", HELLO)
    reader = read(f"{host.url}/event", headers=headers)
    assert "content-encoding" not in reader.headers
    assert reader.next().type == "server.connected"  # Nothing was published, so nothing pushed it out.
    host.publish("a", {"pad": "x" * 100})
    assert reader.next().type == "a"
    host.call(bus.drain)
    reader.rest()
    assert reader.ending == "abort"


# CORS.

ALLOWED, FOREIGN = "https://app.example", "https://evil.example"


def cors_host(kind: str, when: str, authorize: Any = None, **options: Any) -> Starlette:
    app = make_host(kind)
    configured = {
        "allow_origins": [ALLOWED],
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["last-event-id", "x-mine"],
        "allow_credentials": True,
        "expose_headers": ["x-exposed"],
        "max_age": 77,
    }
    if when == "before":
        app.add_middleware(CORSMiddleware, **configured)
    install(app, new_bus(), authorize=authorize, publish=True, **options)
    if when == "after":
        app.add_middleware(CORSMiddleware, **configured)
    return app


def cors_headers(response: Response | StreamResponse) -> dict[str, str]:
    return {
        name: value for name, value in response.headers.items() if name.startswith("access-control") or name == "vary"
    }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("origin", [ALLOWED, FOREIGN, "null"])
async def test_a_preflight_is_answered_as_for_the_hosts_own_paths(
    kind: str, placement: Any, when: str, origin: str
) -> None:
    app = cors_host(kind, when, authorize=lambda request: None, placement=placement)
    async with lifespan(app):
        for method, header in (("GET", "last-event-id"), ("POST", "x-mine"), ("PUT", "x-mine"), ("GET", "x-other")):
            asked = {
                "origin": origin,
                "access-control-request-method": method,
                "access-control-request-headers": header,
            }
            own = await request(app, "OPTIONS", "/hello", headers=asked)
            for path in ("/event", "/global/event", "/event/status"):
                ours = await request(app, "OPTIONS", path, headers=asked)
                assert (ours.status, ours.body, cors_headers(ours)) == (own.status, own.body, cors_headers(own))
            allowed = origin == ALLOWED and method != "PUT" and header != "x-other"
            assert own.status == (200 if allowed else 400)
            assert own.headers.get("access-control-allow-origin") == (origin if origin == ALLOWED else None)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("origin", [ALLOWED, FOREIGN, None])
async def test_answers_carry_the_hosts_cors_headers(kind: str, placement: Any, when: str, origin: str | None) -> None:
    headers = {} if origin is None else {"origin": origin}
    app = cors_host(kind, when, placement=placement)
    async with lifespan(app):
        expected = cors_headers(await request(app, "GET", "/hello", headers=headers))
        assert expected.get("access-control-allow-origin") == (ALLOWED if origin == ALLOWED else None)
        async with stream(app, "/event", headers=headers) as response:
            assert cors_headers(response) == expected
            assert (await response.next()).type == "server.connected"
        assert cors_headers(await request(app, "GET", "/event?type=%00", headers=headers)) == expected
        assert cors_headers(await request(app, "GET", "/event/status", headers=headers)) == expected
    refusing = cors_host(kind, when, authorize=lambda request: None, placement=placement)
    async with lifespan(refusing):
        refused = await request(refusing, "GET", "/event", headers=headers)
        assert (refused.status, cors_headers(refused)) == (401, expected)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_without_cors_middleware_no_page_elsewhere_may_read(kind: str) -> None:
    app = make_host(kind)
    install(app, new_bus(), authorize=None)
    async with lifespan(app), stream(app, "/event", headers={"origin": FOREIGN}) as response:
        assert cors_headers(response) == {}


# A catch-all.


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["", "/sse"])
async def test_a_catch_all_gets_all_but_our_paths(kind: str, placement: Any, when: str, path: str) -> None:
    async def everything(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse(f"caught {scope['path']}")(scope, receive, send)

    app = make_host(kind)
    catch_all = Mount("/", app=everything)
    if when == "before":
        app.router.routes.append(catch_all)
    bus = install(app, new_bus(), authorize=None, placement=placement, path=path)
    if when == "after":
        app.router.routes.append(catch_all)
    async with lifespan(app):
        for other in ("/", "/index.html", "/events", f"{path}/event/other", f"{path}/", f"{path}/global"):
            assert (await request(app, "GET", other)).body == f"caught {other}".encode()
        assert (await request(app, "GET", "/hello")).body == HELLO.encode()
        for name in ("/event", "/global/event"):
            async with stream(app, path + name) as response:
                assert (await response.next()).type == "server.connected"
                await bus.publish("a")
                assert (await response.next()).type == "a"
        assert (await request(app, "GET", f"{path}/event/status")).json()["state"] == "running"


# What wraps the server's ``send``.


@pytest.mark.filterwarnings("ignore:Watching is a BaseHTTPMiddleware")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uvloop", [False, True])
@pytest.mark.parametrize(
    ("placement", "middleware", "options"),
    [
        ("outermost", CORSMiddleware, {"allow_origins": [ALLOWED]}),
        ("outermost", Watching, {}),
        ("route", GZipMiddleware, {}),
        ("route", Watching, {}),
    ],
)
def test_a_stalled_reader_is_dropped_with_its_connection(
    serve: Serve, read: Read, kind: str, uvloop: bool, placement: Any, middleware: Any, options: Any
) -> None:
    """Whatever stands between: what the server has buffered for such a socket would stay for ever."""
    app = make_host(kind)
    bus = install(app, new_bus(write_timeout=0.3, queue_max=20), authorize=None, placement=placement)
    app.add_middleware(middleware, **options)
    host = serve(app, bus, uvloop=uvloop)
    read(f"{host.url}/event", headers={"origin": ALLOWED}).next()
    host.overrun()
    host.until(lambda: not bus.statistics()["subscribers"], "the end of the subscriber")
    host.until(lambda: not host.server.server_state.connections, "the end of its connection")
