"""Clients without a cursor, cut off and back again."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import opencode_sse_sticky_resume
import pytest
import uvicorn

from opencode_sse_plugin import ConfigurationError, EventBus, Grant, Settings, StoreUnavailable, event_app, hookimpl
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import Frame, ManualClock, StreamResponse, request, settle, stream

pytestmark = pytest.mark.anyio


class Classes:
    """Some of opencode's types as they are delivered."""

    @hookimpl
    def sse_register_delivery_classes(self, register: Any) -> None:
        register("text.delta", "ephemeral", None)
        register("text.updated", "latest", lambda properties: properties.get("id", ""))


def sticky(clock: ManualClock | None = None, store: MemoryEventStore | None = None, **settings: Any) -> EventBus:
    plugins = Plugins(discover=False)
    plugins.register(opencode_sse_sticky_resume)
    plugins.register(Classes())
    return EventBus(Settings(**settings), plugins=plugins, clock=clock, store=store)


def authorize(request: Any) -> Grant:
    return Grant.everything(request.headers.get("x-caller", "ann"))


def connect(bus: EventBus, path: str = "/global/event", agent: str = "tui", **options: Any) -> Any:
    headers = {"user-agent": agent, **options.pop("headers", {})}
    return stream(event_app(bus, authorize=authorize), path, headers=headers, **options)


async def publish(bus: EventBus, *types: str) -> None:
    for type in types:
        await bus.publish(type, {"n": bus.head + 1})


async def came_back_to(response: StreamResponse, bus: EventBus) -> list[str]:
    """What a stream is given up to a mark that is published now; without what was reported as left out."""
    await publish(bus, "mark")
    frames: list[Frame] = await response.until("mark")
    return [frame.type for frame in frames[:-1] if frame.type != "server.stream.lagged"]


async def left_at_once(bus: EventBus, **options: Any) -> None:
    """A stream that ends right after its first frame."""
    async with connect(bus, **options) as response:
        await response.next()


# What comes back.


async def test_it_gets_what_it_missed_without_the_streamed_text_and_then_everything() -> None:
    async with sticky() as bus:
        async with connect(bus) as response:
            assert (await response.next()).type == "server.connected"
            await publish(bus, "seen")
            assert (await response.next()).type == "seen"
        await publish(bus, "text.delta", "text.delta", "question.asked", "text.delta", "text.updated")
        async with connect(bus) as response:
            frames = await response.take(6)
            assert [frame.type for frame in frames] == [
                "server.connected",
                "seen",  # a little before
                "server.stream.lagged",
                "question.asked",
                "server.stream.lagged",
                "text.updated",
            ]
            assert [frame.properties.get("dropped") for frame in frames[2::2]] == [2, 1]
            await publish(bus, "text.delta")
            assert (await response.next()).type == "text.delta"


@pytest.mark.parametrize("reason", ["client", "overflow", "write-timeout", "grant", "drain"])
async def test_however_it_was_cut_off(reason: str) -> None:
    clock = ManualClock()
    async with sticky(clock, MemoryEventStore(), queue_max=2) as bus:
        async with connect(bus, window=0) as response:
            await response.next()
            if reason == "grant":
                next(iter(bus._roster.subscriptions)).subscriber.grant = Grant(expires_at=clock.wall())
                await clock.advance(1.5)
                await response.rest()
            elif reason == "drain":
                await bus.drain()
            elif reason != "client":
                await publish(bus, "seen")
                await response.until_blocked()
                if reason == "overflow":
                    await publish(bus, *["seen"] * 5)
                    await response.rest()
                else:
                    await clock.advance(bus.settings.write_timeout + 5)
                    await response.until_returned()
        if reason == "drain":
            return
        await publish(bus, "question.asked")
        async with connect(bus) as response:
            got = await came_back_to(response, bus)
            assert (got[0], got[-1]) == ("server.connected", "question.asked")


async def test_it_is_cut_off_again_and_again() -> None:
    async with sticky() as bus:
        await left_at_once(bus)
        for n in range(5):
            await publish(bus, f"asked.{n}")
            await left_at_once(bus)
        async with connect(bus) as response:
            assert await came_back_to(response, bus) == ["server.connected", *(f"asked.{n}" for n in range(5))]


async def test_two_tabs_of_one_caller_do_not_share_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_STICKY_OVERLAP", "0")
    async with sticky() as bus:
        async with connect(bus, window=0, gone="raise") as slow, connect(bus) as fast:
            await slow.next()
            await publish(bus, "first")
            await settle()  # It is given this one, and is busy with it from now on.
            await publish(bus, "second", "third")
            await fast.until("third")
        await publish(bus, "fourth")
        # Whichever comes back first, both get what either may have missed; one more tab begins at the head.
        async with connect(bus) as one, connect(bus) as other, connect(bus) as new:
            await publish(bus, "fifth")
            for tab in (one, other):
                got = [frame.type for frame in await tab.until("fifth")]
                assert got == ["server.connected", "second", "third", "fourth", "fifth"]
            assert [frame.type for frame in await new.take(2)] == ["server.connected", "fifth"]


async def test_a_tab_that_stays_keeps_nobodys_place() -> None:
    async with sticky() as bus, connect(bus) as stays:
        await stays.next()
        await left_at_once(bus)
        await publish(bus, "asked")
        async with connect(bus) as back:
            assert await came_back_to(back, bus) == ["server.connected", "asked"]
        assert [(await stays.next()).type for _ in range(2)] == ["asked", "mark"]


# Who is who.


@pytest.mark.parametrize(
    "other",
    [
        {"headers": {"x-caller": "bob"}},
        {"client": "10.0.0.2"},
        {"agent": "another"},
        {"path": "/global/event?client=two"},
        {"path": "/event"},
        {"path": "/global/event?type=*"},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_another_client_begins_at_the_head(other: dict[str, Any]) -> None:
    async with sticky() as bus:
        await left_at_once(bus)
        await publish(bus, "asked")
        async with connect(bus, **other) as response:
            assert await came_back_to(response, bus) == ["server.connected"]
        async with connect(bus) as response:
            assert (await came_back_to(response, bus))[:2] == ["server.connected", "asked"]


async def test_what_it_may_see_comes_from_its_grant() -> None:
    async with sticky() as bus:
        await left_at_once(bus, path="/event?session=a")
        await bus.publish("asked", {"sessionID": "b"})
        await bus.publish("asked", {"sessionID": "a"})
        async with connect(bus, "/event?session=a") as response:
            assert [frame.properties.get("sessionID") for frame in await response.take(2)] == [None, "a"]
            await bus.publish("end", {"sessionID": "a"})
            assert (await response.next()).type == "end"


@pytest.mark.parametrize("who", ["browser", "snapshot", "terminal", "in-process", "cursor"])
async def test_others_are_left_alone(who: str) -> None:
    async with sticky() as bus:
        await left_at_once(bus)
        await publish(bus, "asked", "asked")
        cursor = {"last-event-id": f"{bus.epoch}:1"}
        path, headers, first = {
            "browser": ("/global/event", {"sec-fetch-mode": "cors"}, ["server.connected"]),
            "snapshot": ("/global/event?snapshot=true", {}, ["server.connected"]),
            "terminal": ("/global/event?after_seq=1", {}, ["server.connected", "asked"]),
            "in-process": ("", {}, ["server.connected"]),
            "cursor": ("/global/event", cursor, ["server.heartbeat", "asked"]),
        }[who]
        if who == "in-process":
            async with bus.subscribe(caller="ann") as events:
                assert (await anext(events)).event.type == "server.connected"
                await publish(bus, "mark")
                assert (await anext(events)).event.type == "mark"
        elif who == "terminal":
            async with connect(bus, path, headers=headers) as response:
                assert [frame.type for frame in await response.rest()] == first
        else:
            async with connect(bus, path, headers=headers) as response:
                assert await came_back_to(response, bus) == first
        # The place is still there, but for the one who came back to it by itself.
        async with connect(bus) as response:
            got = await came_back_to(response, bus)
            assert ("asked" in got) == (who != "cursor")


async def test_a_stream_that_ended_cleanly_is_not_remembered() -> None:
    async with sticky() as bus:
        async with connect(bus, "/event?directory=/d") as response:
            await response.next()
            await bus.publish("server.instance.disposed", {"directory": "/d"}, directory="/d")
            await response.rest()
            assert response.ending == "clean"
        await publish(bus, "asked")
        async with connect(bus, "/event?directory=/d") as response:
            assert await came_back_to(response, bus) == ["server.connected"]


# How long, how much, how far back.


async def test_places_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_STICKY_TTL", "60")
    clock = ManualClock()
    async with sticky(clock) as bus:
        for seconds, remembered in ((59, True), (62, False)):
            await left_at_once(bus)
            await publish(bus, "asked")
            await clock.advance(seconds)
            async with connect(bus) as response:
                assert ("asked" in await came_back_to(response, bus)) is remembered
            await clock.advance(100)


async def test_the_number_of_clients_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_STICKY_CLIENTS", "3")
    async with sticky() as bus:
        for n in range(5):
            await left_at_once(bus, agent=f"tui-{n}")
        await publish(bus, "asked")
        for n, remembered in ((2, True), (4, True), (3, True), (1, False), (0, False)):
            async with connect(bus, agent=f"tui-{n}") as response:
                assert ("asked" in await came_back_to(response, bus)) is remembered


@pytest.mark.parametrize(("overlap", "before"), [(0, 0), (1000, 4), (100_000, 150)])
async def test_it_goes_back_so_many_bytes_of_what_it_could_see(
    monkeypatch: pytest.MonkeyPatch, overlap: int, before: int
) -> None:
    monkeypatch.setenv("OPENCODE_SSE_STICKY_OVERLAP", str(overlap))
    async with sticky() as bus:
        await publish(bus, "earlier")
        async with connect(bus, "/event?session=a") as response:
            await response.next()
            for _ in range(150):
                await bus.publish("seen", {"sessionID": "a", "pad": "x" * 150})  # 240 bytes each
                await bus.publish("other", {"sessionID": "b", "pad": "x" * 500})
                assert (await response.next()).type == "seen"
        async with connect(bus, "/event?session=a") as response:
            await bus.publish("end", {"sessionID": "a"})
            got = [frame.type for frame in await response.until("end")]
            assert got == ["server.connected", *["seen"] * before, "end"]


async def test_what_is_gone_is_not_waited_for() -> None:
    store = MemoryEventStore()
    async with sticky(store=store) as bus:
        await left_at_once(bus)
        await publish(bus, *["asked"] * 5)
        store._evict = lambda: None  # type: ignore[method-assign]
        for _ in range(3):
            store._forget_oldest()
        async with connect(bus) as response:
            assert await came_back_to(response, bus) == ["server.connected", "asked", "asked"]


async def test_lost_history_is_left_out() -> None:
    store = MemoryEventStore()
    async with sticky(store=store) as bus:
        async with connect(bus) as response:
            await publish(bus, "one", "two", "three")
            await response.until("three")
        store.begin_epoch(1)
        await publish(bus, "new")
        async with connect(bus) as response:
            assert await came_back_to(response, bus) == ["server.connected", "one", "new"]


async def test_a_place_survives_a_store_that_does_not_answer() -> None:
    class Down(MemoryEventStore):
        down = False

        async def bounds(self) -> Any:
            if self.down:
                raise StoreUnavailable("down")
            return await super().bounds()

    store = Down()
    async with sticky(store=store) as bus:
        await left_at_once(bus)
        await publish(bus, "asked")
        store.down = True
        app = event_app(bus, authorize=authorize)
        assert (await request(app, "GET", "/global/event", headers={"user-agent": "tui"})).status == 500
        store.down = False
        async with connect(bus) as response:
            assert await came_back_to(response, bus) == ["server.connected", "asked"]


@pytest.mark.parametrize("value", ["soon", "-1", "1.5"])
async def test_a_bad_value_stops_the_start(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPENCODE_SSE_STICKY_TTL", value)
    with pytest.raises(ConfigurationError, match=f"OPENCODE_SSE_STICKY_TTL='{value}'"):
        async with sticky():
            pytest.fail("it started")


# Over a real socket.


@asynccontextmanager
async def served(bus: EventBus) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(event_app(bus, authorize=None), log_config=None, access_log=False))
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve([listening]))
    await until(lambda: server.started)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        listening.close()


async def until(condition: Callable[[], bool]) -> None:
    """Look again and again: nobody tells when a connection was noticed to be gone."""
    for _ in range(1000):
        if condition():
            return
        await anyio.sleep(0.01)
    raise TimeoutError


def opened(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(b"GET /global/event HTTP/1.1\r\nHost: localhost\r\nUser-Agent: tui\r\n\r\n")
    client.setblocking(False)
    return client


async def read_until(client: socket.socket, mark: bytes) -> set[int]:
    """The numbers of the events received, up to a mark."""
    body = b""
    loop = asyncio.get_running_loop()
    with anyio.fail_after(10):
        while mark not in body:
            body += await loop.sock_recv(client, 1 << 20)
    blocks = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ") and line.endswith(b"}}}")]
    events = [json.loads(block)["payload"]["properties"] for block in blocks]
    return {properties["n"] for properties in events if "n" in properties}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("overlap", [0, None])
async def test_what_was_on_its_way_when_the_connection_died_is_given_again(
    monkeypatch: pytest.MonkeyPatch, overlap: int | None
) -> None:
    """The client reads a little and dies; a megabyte that it never saw has been handed to the network by then."""
    if overlap is not None:
        monkeypatch.setenv("OPENCODE_SSE_STICKY_OVERLAP", str(overlap))
    bus = sticky()
    async with served(bus) as port:
        with opened(port) as client:
            await until(lambda: bus.running and len(bus._roster.subscriptions) == 1)
            await read_until(client, b"server.connected")
            for n in range(1, 1001):
                await bus.publish("asked", {"n": n, "pad": "x" * 1000})
            await until(lambda: bus.statistics()["subscribers"][0]["position"] == 1000)
            seen = await read_until(client, b'"n":10,')
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: not bus._roster.subscriptions)
        assert 10 <= len(seen) < 1000
        with opened(port) as client:
            await until(lambda: len(bus._roster.subscriptions) == 1)
            await bus.publish("asked", {"n": 1001})
            seen |= await read_until(client, b'"n":1001}')
        assert (seen == set(range(1, 1002))) is (overlap is None)
