"""Where a host can stand: under a prefix, inside another app, without a lifespan, beside others in one process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from opencode_sse_plugin import event_app, install
from opencode_sse_plugin.testing import lifespan, request, stream

from .apps import HELLO, KINDS, Watching, make_host, new_bus
from .served import Reader, Served

Serve = Callable[..., Served]
Read = Callable[..., Reader]

# root_path.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("path", ["", "/sse"])
def test_a_server_with_a_root_path(serve: Serve, read: Read, kind: str, placement: Any, path: str) -> None:
    app = make_host(kind)
    bus = install(app, new_bus(), authorize=None, placement=placement, path=path)
    host = serve(app, bus, root_path="/api")
    reader = read(f"{host.url}{path}/event")
    reader.next()
    host.publish("a")
    assert reader.next().type == "a"
    assert read(f"{host.url}/hello").status == 200
    assert read(f"{host.url}{path}/event/other").status == 404


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
@pytest.mark.parametrize("prefix", ["/api", ""])
async def test_a_proxy_that_leaves_the_prefix_or_takes_it_away(kind: str, placement: Any, prefix: str) -> None:
    app = make_host(kind)
    install(app, new_bus(), authorize=None, placement=placement)
    async with lifespan(app):
        for path in ("/event", "/global/event"):
            async with stream(app, prefix + path, root_path="/api") as response:
                assert (await response.next()).type == "server.connected"
        assert (await request(app, "GET", f"{prefix}/hello", root_path="/api")).body == HELLO.encode()


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
@pytest.mark.parametrize("path", ["/event", "/api/event"])
async def test_fastapis_own_root_path(path: str) -> None:
    app = FastAPI(root_path="/api")
    install(app, new_bus(), authorize=None)
    async with lifespan(app), stream(app, path) as response:
        assert (await response.next()).type == "server.connected"


# A sub-application in a sub-application.


def nested(kind: str, inner: ASGIApp) -> Starlette:
    """``inner`` at ``/a/b``."""
    middle, outer = make_host(kind), make_host(kind)
    middle.mount("/b", inner)
    outer.mount("/a", middle)
    return outer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["outermost", "route"])
def test_installed_into_a_sub_application_of_a_sub_application(
    serve: Serve, read: Read, kind: str, placement: Any
) -> None:
    """Its lifespan never runs: the bus starts at first use."""
    inner = make_host(kind)
    bus = install(inner, new_bus(), authorize=None, placement=placement)
    host = serve(nested(kind, inner), bus)
    assert bus.state == "new"
    assert read(f"{host.url}/a/b/hello").status == 200
    assert read(f"{host.url}/event").status == read(f"{host.url}/a/event").status == 404
    reader = read(f"{host.url}/a/b/event")
    reader.next()
    host.publish("a")
    assert reader.next().type == "a"
    host.call(bus.drain)
    assert [frame.type for frame in reader.rest()] == ["server.stream.draining"]
    assert reader.ending == "abort"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_app_mounted_in_a_sub_application(serve: Serve, read: Read, kind: str) -> None:
    bus = new_bus()
    host = serve(nested(kind, event_app(bus, authorize=None)), bus)
    reader = read(f"{host.url}/a/b/global/event")
    reader.next()
    host.publish("a")
    assert reader.next().type == "a"
    host.call(bus.drain)
    reader.rest()
    assert reader.ending == "abort"


@pytest.mark.parametrize("kind", KINDS)
def test_the_outermost_app_serves_paths_of_its_sub_applications(serve: Serve, read: Read, kind: str) -> None:
    """Where an app around the sub-application has a ``BaseHTTPMiddleware``, this keeps an abort an abort."""
    outer = nested(kind, make_host(kind))
    outer.add_middleware(Watching)
    bus = install(outer, new_bus(), authorize=None, path="/a/b")
    host = serve(outer, bus)
    assert read(f"{host.url}/a/b/hello").headers["x-watched"] == "yes"
    reader = read(f"{host.url}/a/b/event")
    reader.next()
    host.call(bus.drain)
    reader.rest()
    assert reader.ending == "abort"


# No lifespan.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["/event", "/event?after_seq=0", "/event/status"])
def test_without_a_lifespan_the_first_use_starts_the_bus(serve: Serve, read: Read, kind: str, first: str) -> None:
    app = make_host(kind)
    bus = install(app, new_bus(), authorize=None)
    host = serve(app, bus, lifespan="off")
    assert read(f"{host.url}/hello").status == 200
    assert bus.state == "new"
    assert read(host.url + first).status == 200
    assert bus.state == "running"
    reader = read(f"{host.url}/event")
    reader.next()
    host.publish("a")
    assert reader.next().type == "a"


def test_an_app_that_swallows_its_lifespan(serve: Serve, read: Read) -> None:
    inner = make_host("starlette")
    bus = install(inner, new_bus(), authorize=None)

    async def http_only(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served here")
        await inner(scope, receive, send)

    host = serve(http_only, bus)
    assert read(f"{host.url}/event").next().type == "server.connected"


def test_many_first_uses_at_once_start_it_once(serve: Serve) -> None:
    bus = new_bus()
    host = serve(event_app(bus, authorize=None), bus, lifespan="off")

    async def all_at_once() -> list[int]:
        app = event_app(bus, authorize=None)
        answers = await asyncio.gather(*(request(app, "GET", "/event/status") for _ in range(20)))
        return [answer.status for answer in answers]

    assert host.call(all_at_once) == [200] * 20
    assert host.call(lambda: len(asyncio.all_tasks())) < 20


# Two of a kind.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placements", [("outermost", "outermost"), ("route", "route"), ("outermost", "route")])
@pytest.mark.parametrize("paths", [("", "/two"), ("/one", "/two"), ("/one", "/one/two")])
def test_two_buses_in_one_app(
    serve: Serve, read: Read, kind: str, placements: tuple[Any, Any], paths: tuple[str, str]
) -> None:
    app = make_host(kind)
    buses = [
        install(app, new_bus(), authorize=None, placement=placement, path=path)
        for placement, path in zip(placements, paths, strict=True)
    ]
    host = serve(app, buses[0])
    readers = [read(f"{host.url}{path}/event") for path in paths]
    for name, bus, reader in zip("ab", buses, readers, strict=True):
        assert reader.next().id == f"{bus.epoch}:0"
        host.call(bus.publish, name)
        assert reader.next().type == name
    assert read(f"{host.url}/hello").status == 200
    host.call(buses[0].drain)
    assert [frame.type for frame in readers[0].rest()] == ["server.stream.draining"]
    host.call(buses[1].publish, "still here")
    assert readers[1].next().type == "still here"
    host.call(buses[1].drain)
    readers[1].rest()
    assert [reader.ending for reader in readers] == ["abort", "abort"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_apps_in_one_process_know_nothing_of_each_other(serve: Serve, read: Read, kind: str) -> None:
    apps = [make_host(kind), make_host(kind)]
    hosts = [serve(app, install(app, new_bus(), authorize=None)) for app in apps]
    readers = [read(f"{host.url}/event") for host in hosts]
    for name, host, reader in zip("ab", hosts, readers, strict=True):
        reader.next()
        host.publish(name)
    assert [reader.next().type for reader in readers] == ["a", "b"]
    hosts[0].call(hosts[0].bus.drain)
    assert [frame.type for frame in readers[0].rest()] == ["server.stream.draining"]
    hosts[1].publish("still here")
    assert readers[1].next().type == "still here"


# Signals, which only a process of its own can take.


@pytest.fixture
def program() -> Iterator[Callable[..., tuple[subprocess.Popen[str], list[str]]]]:
    """Start ``programs.py``; gives the URLs that it says it serves."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "programs.py"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("what", ["no-lifespan", "two-apps", "two-buses", "sub-app"])
def test_a_signal_drains_them_all(program: Any, read: Read, what: str) -> None:
    process, urls = program(what)
    readers = [read(url) for url in urls]
    for reader in readers:
        reader.next()
    process.send_signal(signal.SIGTERM)
    for reader in readers:
        assert [frame.type for frame in reader.rest()] == ["server.stream.draining"]
        assert reader.ending == "abort"
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, errors
    assert "Traceback" not in errors
