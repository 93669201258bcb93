"""Into a host's app: what stays the host's, and what is refused. Real hosts and servers have folders of their own."""

from __future__ import annotations

from typing import Any

import pluggy
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from opencode_sse_plugin import ConfigurationError, EventBus, Settings, event_app, hookimpl, install
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import lifespan, request, stream

pytestmark = pytest.mark.anyio


def bus_alone() -> EventBus:
    return EventBus(Settings(), plugins=Plugins(discover=False))


def hello(_: object) -> PlainTextResponse:
    return PlainTextResponse("hello")


def make(kind: str, **options: Any) -> Starlette:
    if kind == "fastapi":
        app = FastAPI(**options)
        app.get("/hello")(lambda: "hello")
        return app
    return Starlette(routes=[Route("/hello", hello)], **options)


@pytest.mark.parametrize("kind", ["starlette", "fastapi"])
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("path", ["", "/sse"])
async def test_our_paths_are_served_and_all_others_stay_the_hosts(kind: str, placement: Any, path: str) -> None:
    app = make(kind)
    bus = install(app, bus_alone(), path=path, authorize=None, placement=placement)
    async with lifespan(app):
        assert (await request(app, "GET", "/hello")).status == 200
        for other in ("/event/other", "/events", "/global", "/eventx"):
            assert (await request(app, "GET", path + other)).status == 404
        for route in ("/event", "/global/event"):
            async with stream(app, path + route) as response:
                assert (await response.next()).type == "server.connected"
                await bus.publish("a")
                assert (await response.next()).type == "a"
        assert (await request(app, "GET", path + "/event/status")).json()["state"] == "running"
    assert bus.state == "closed"


async def test_the_hosts_own_lifespan_runs_inside() -> None:
    from contextlib import asynccontextmanager

    states: list[str] = []

    @asynccontextmanager
    async def own(app: Starlette) -> Any:
        states.append(bus.state)
        yield {"mine": 1}
        states.append(bus.state)

    app = make("starlette", lifespan=own)
    bus = install(app, bus_alone(), authorize=None)
    async with lifespan(app) as state:
        assert state["mine"] == 1
    assert states == ["running", "running"]


async def test_a_host_without_lifespan_starts_it_at_first_use(anyio_backend: str) -> None:
    if anyio_backend == "trio":
        return  # no scope to run in: a trio host gives a lifespan
    app = make("starlette")
    bus = install(app, bus_alone(), authorize=None)
    async with stream(app, "/event") as response:
        assert (await response.next()).type == "server.connected"
    await bus.drain()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_middleware_stays_inside(when: str) -> None:
    """One ``BaseHTTPMiddleware`` around a stream turns its abort into a clean end."""
    seen: list[str] = []

    class Watching(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            seen.append(request.url.path)
            return await call_next(request)

    app = make("starlette")
    if when == "before":
        app.add_middleware(Watching)
    bus = install(app, bus_alone(), authorize=None)
    if when == "after":
        app.add_middleware(Watching)
    async with lifespan(app):
        await request(app, "GET", "/hello")
        async with stream(app, "/event") as response:
            await response.next()
            await bus.drain()
            assert [frame.type for frame in await response.rest()] == ["server.stream.draining"]
            assert response.ending == "abort"
    assert seen == ["/hello"]


async def test_placement_route_warns_of_what_would_break_the_abort() -> None:
    class Later(BaseHTTPMiddleware):
        pass

    app = make("starlette")
    app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    with pytest.warns(RuntimeWarning, match="BaseHTTPMiddleware is .*placement='outermost'") as now:
        install(app, bus_alone(), authorize=None, placement="route")
    app.add_middleware(Later, dispatch=lambda request, call_next: call_next(request))
    with pytest.warns(RuntimeWarning, match="Later is a BaseHTTPMiddleware") as then:
        app.build_middleware_stack()
    assert (len(now), len(then), now[0].filename) == (1, 1, __file__)


async def test_a_taken_path_is_refused() -> None:
    app = Starlette(routes=[Route("/event", hello)])
    with pytest.raises(ConfigurationError, match="route /event already"):
        install(app, bus_alone(), authorize=None)
    install(app, bus_alone(), authorize=None, path="/sse")
    with pytest.raises(ConfigurationError, match="another path"):
        install(app, bus_alone(), authorize=None, path="/sse")
    with pytest.raises(ConfigurationError, match="placement"):
        install(app, bus_alone(), authorize=None, path="/other", placement="inside")  # type: ignore[arg-type]


async def test_two_buses_in_one_app() -> None:
    app = make("starlette")
    one = install(app, bus_alone(), authorize=None)
    two = install(app, bus_alone(), authorize=None, path="/two")
    async with lifespan(app):
        await one.publish("one")
        await two.publish("two")
        for path, type in (("/event", "one"), ("/two/event", "two")):
            async with stream(app, f"{path}?after_seq=0") as response:
                assert [frame.type for frame in await response.rest()][1:] == [type]


async def test_the_sub_app_runs_the_bus_by_itself() -> None:
    bus = bus_alone()
    app: ASGIApp = event_app(bus, authorize=None, path="/x")
    async with lifespan(app):
        assert bus.running
        async with stream(app, "/x/event") as response:
            assert (await response.next()).type == "server.connected"
    assert bus.state == "closed"


async def test_a_sub_app_that_cannot_start_says_why() -> None:
    class Broken:
        @hookimpl
        def sse_startup(self, bus: EventBus) -> None:
            raise LookupError("no database")

    plugins = Plugins(discover=False)
    plugins.register(Broken())
    with pytest.raises(LookupError, match="no database"):
        async with lifespan(event_app(EventBus(Settings(), plugins=plugins), authorize=None)):
            pytest.fail("it started")


async def test_routes_of_plugins_are_served() -> None:
    class More:
        @hookimpl
        def sse_routes(self, bus: EventBus) -> list[Route]:
            return [Route("/event/more", hello)]

    plugins = Plugins(discover=False)
    plugins.register(More())
    app = make("starlette")
    install(app, EventBus(Settings(), plugins=plugins), authorize=None, path="/x")
    async with lifespan(app):
        assert (await request(app, "GET", "/x/event/more")).body == b"hello"


async def test_a_hosts_own_plugin_manager() -> None:
    manager = pluggy.PluginManager("myhost")
    mine = pluggy.HookimplMarker("myhost")
    attached: list[str] = []

    class HostPlugin:
        @mine
        def sse_subscriber_attach(self, subscriber: Any) -> None:
            attached.append(subscriber.route)

    app = make("starlette")
    install(app, bus_alone(), authorize=None, plugin_manager=manager)
    manager.register(HostPlugin())
    manager.check_pending()
    async with lifespan(app), stream(app, "/event"):
        assert attached == ["/event"]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_405(sse_bus: EventBus, method: str) -> None:
    answer = await request(event_app(sse_bus, authorize=None), method, "/event")
    assert answer.status == 405
    assert "GET" in answer.headers["allow"]
