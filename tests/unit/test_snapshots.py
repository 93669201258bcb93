"""Snapshots: whoever has no good cursor gets the state first, and then exactly what it does not include.

The clients here add up what they are told, so that anything lost or doubled shows in their sums.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from opencode_sse_plugin import Cursor, Event, EventBus, Limits, Settings, Snapshot, Subscriber, event_app, hookimpl
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Bounds
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import Frame, stream

pytestmark = pytest.mark.anyio

KEYS = ("a", "b", "c")


class Sums:
    """A host whose state is a sum for each key. Its snapshot is a reset and a total for each of them.

    While it gives one, it goes on publishing: before it takes the state, and behind it.
    """

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.at = 0
        self.asked = 0
        self.busy = 2

    async def add(self, number: int = 1) -> None:
        for turn in range(number):
            key = KEYS[turn % len(KEYS)]
            seq = await self.bus.publish("add", {"key": key, "n": 1})
            assert seq is not None
            self.totals[key] += 1
            self.at = seq

    @hookimpl
    async def sse_snapshot(self, subscriber: Subscriber, head: int) -> Snapshot:
        self.asked += 1
        await self.add(self.busy)
        events = [Event("reset"), *(Event("total", {"key": key, "n": self.totals[key]}) for key in KEYS)]
        # Numbers of a history that was lost mean nothing now, and the state has what they added.
        state = Snapshot(events, min(self.at, (await self.bus.store.bounds()).latest))
        await self.add(self.busy)
        return state


class Client:
    """Keeps the cursor of what it has whole, and a sum for each key."""

    def __init__(self, sums: Sums, path: str, cursor: str | None = None, totals: Counter[str] | None = None) -> None:
        self.sums = sums
        self.path = path
        self.cursor = cursor
        self.totals = totals if totals is not None else Counter()
        self.frames: list[Frame] = []
        self._coming: Counter[str] | None = None

    @asynccontextmanager
    async def connected(self, **options: Any) -> AsyncIterator[Any]:
        headers = {} if self.cursor is None else {"Last-Event-ID": self.cursor}
        self._coming = None
        app = event_app(self.sums.bus, authorize=None)
        async with stream(app, self.path, headers=headers, **options) as response:
            assert response.status == 200
            yield response

    async def read(self, response: Any) -> None:
        """Take one frame."""
        frame = await response.next()
        self.frames.append(frame)
        if frame.type == "reset":
            self._coming = Counter()
        elif frame.type == "total":
            assert self._coming is not None
            self._coming[frame.properties["key"]] = frame.properties["n"]
        elif frame.type == "add":
            self.totals[frame.properties["key"]] += frame.properties["n"]
        elif frame.type == "server.heartbeat" and self._coming is not None:
            self.totals, self._coming = self._coming, None
        if self._coming is not None:
            assert frame.id is None, "nothing of a snapshot is acknowledged before all of it is there"
        if frame.id is not None:
            self.cursor = frame.id

    async def read_all(self, response: Any) -> None:
        """Until it has what there is."""
        while self.cursor is None or Cursor.parse(self.cursor) != Cursor(self.sums.bus.epoch, self.sums.bus.head):
            await self.read(response)
        assert +self.totals == +self.sums.totals


@asynccontextmanager
async def sums_over(store: str, tmp_path: Path, **settings: Any) -> AsyncIterator[Sums]:
    """A host, whose log is empty."""
    sums, plugins = Sums(), Plugins(discover=False)
    plugins.register(sums)
    url = store if store == "memory://" else f"{store}{tmp_path / 'a.db'}"
    sums.bus = EventBus(Settings(store=url, **settings), plugins=plugins)  # type: ignore[attr-defined]
    async with sums.bus:  # type: ignore[attr-defined]
        yield sums


each_store = pytest.mark.parametrize("store", ["memory://", "sqlite:///"])
each_route = pytest.mark.parametrize("route", ["/event", "/global/event"])


@each_store
@each_route
@pytest.mark.parametrize("query", ["?snapshot=true", "?after_seq=9999&follow=true", "?last_event_id=other:1"])
async def test_cut_at_every_frame_nothing_is_lost_or_doubled(
    store: str, route: str, query: str, tmp_path: Path
) -> None:
    async with sums_over(store, tmp_path) as sums:
        await sums.add(4)
        before = 1 if "snapshot" in query else 2
        for cut in range(before + 8):
            client = Client(sums, route + query)
            async with client.connected() as response:
                for _ in range(cut):
                    await client.read(response)
            await sums.add(2)
            async with client.connected() as response:
                await client.read_all(response)
            if cut >= before + 5:  # The closing heartbeat had come: it resumes behind the state, and is given no other.
                assert [frame.type for frame in client.frames].count("reset") == 1


@each_store
@pytest.mark.parametrize("end", [0, 3, 5])
async def test_cut_at_every_frame_where_history_was_lost_in_mid_stream(store: str, end: int, tmp_path: Path) -> None:
    for cut in range(8):
        (tmp_path / str(cut)).mkdir()
        async with sums_over(store, tmp_path / str(cut)) as sums:
            await sums.add(6)
            client = Client(sums, "/event?after_seq=0&follow=true")
            async with client.connected() as response:
                await client.read_all(response)
                lose = sums.bus.store.begin_epoch(end)  # type: ignore[attr-defined]
                if lose is not None:
                    await lose
                for _ in range(cut):
                    await client.read(response)
                if cut:
                    expired = next(frame for frame in client.frames if frame.type == "server.stream.expired")
                    assert (expired.properties["reason"], expired.properties["next"]) == ("epoch", 6)
                    assert expired.id is None
            await sums.add(2)
            async with client.connected() as response:
                await client.read_all(response)
            if cut >= 6:
                assert sums.asked == 1


@each_route
async def test_retention_that_overtakes_a_replay_gives_the_state(route: str, tmp_path: Path) -> None:
    async with sums_over("memory://", tmp_path, retain_events=20) as sums:
        await sums.add(20)
        client = Client(sums, f"{route}?after_seq=0&follow=true")
        async with client.connected(window=0) as response:
            await client.read(response)
            await sums.add(700)
            await client.read_all(response)
        types = [frame.type for frame in client.frames]
        at = types.index("server.stream.expired")
        assert types[at : at + 6] == ["server.stream.expired", "reset", "total", "total", "total", "server.heartbeat"]
        assert client.frames[at].properties["reason"] == "evicted"


@each_route
async def test_places_and_scopes_of_a_snapshot_are_those_of_its_route(route: str) -> None:
    class Placed:
        @hookimpl
        def sse_snapshot(self) -> Snapshot:
            return Snapshot(
                [
                    Event("a", {"n": 1}, directory="/d", workspace="w", extra={"more": 1}),
                    Event("sync", None, scope="global"),
                    Event("b", {}, "evt_mine"),
                ]
            )

    plugins = Plugins(discover=False)
    plugins.register(Placed())
    async with EventBus(Settings(), plugins=plugins) as bus:
        app = event_app(bus, authorize=None)
        async with stream(app, f"{route}?snapshot=true&directory=/other") as response:
            frames = (await response.until("server.heartbeat"))[1:-1]
    assert [frame.type for frame in frames] == (["a", "b"] if route == "/event" else ["a", "sync", "b"])
    assert frames[0].payload == {"id": frames[0].payload["id"], "type": "a", "properties": {"n": 1}, "more": 1}
    assert frames[0].payload["id"].startswith("evt_")
    assert frames[-1].payload["id"] == "evt_mine"
    if route == "/global/event":
        assert {key: frames[0].data[key] for key in ("directory", "workspace")} == {"directory": "/d", "workspace": "w"}


def raising(bus: EventBus) -> Snapshot:
    raise RuntimeError("the state is gone")


NONSENSE: dict[str, Callable[[EventBus], Any]] = {
    "raises": raising,
    "no snapshot": lambda bus: [Event("a")],
    "no events": lambda bus: Snapshot(5),  # type: ignore[arg-type]
    "a reserved type": lambda bus: Snapshot([Event("server.connected")]),
    "a type with a line break": lambda bus: Snapshot([Event("a\n\ndata: b")]),
    "not JSON": lambda bus: Snapshot([Event("a", {"x": object()})]),
    "beyond the head": lambda bus: Snapshot([Event("a")], bus.head + 1),
    "before what is stored": lambda bus: Snapshot([Event("a")], 3),
    "no number": lambda bus: Snapshot([Event("a")], "5"),  # type: ignore[arg-type]
}


@each_route
@pytest.mark.parametrize("does", NONSENSE.values(), ids=NONSENSE)
async def test_a_snapshot_that_cannot_be_given_is_none(
    route: str, does: Callable[[EventBus], Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def sse_snapshot(self, subscriber: Subscriber, head: int) -> Any:
            return does(bus)

    plugins = Plugins(discover=False)
    plugins.register(Broken())
    async with EventBus(Settings(retain_events=5), plugins=plugins) as bus:
        await bus.publish_batch([Event("a") for _ in range(10)])
        for query, first in (
            ("snapshot=true", ["server.connected"]),
            ("after_seq=1&follow=true", ["server.connected", "server.stream.expired"]),
        ):
            async with stream(event_app(bus, authorize=None), f"{route}?{query}") as response:
                frames = await response.take(len(first))
                assert [frame.type for frame in frames] == first
                assert frames[-1].id == f"{bus.epoch}:{bus.head}", "nothing follows that could acknowledge it"
                await bus.publish("b")
                assert (await response.next()).type == "b"
    failures = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(failures) == 2
    assert all("sse_snapshot failed" in record.getMessage() for record in failures)


async def test_a_terminal_replay_asks_for_no_snapshot(tmp_path: Path) -> None:
    async with sums_over("memory://", tmp_path) as sums:
        await sums.add(2)
        for query in ("?after_seq=9", "?after_seq=0&snapshot=true"):
            async with Client(sums, f"/event{query}").connected() as response:
                await response.rest()
        async with stream(
            event_app(sums.bus, authorize=None),
            "/event?snapshot=true",
            headers={"Last-Event-ID": f"{sums.bus.epoch}:1"},
        ) as response:
            assert [frame.type for frame in await response.take(2)] == ["server.heartbeat", "add"]
        assert sums.asked == 0


# Epochs that change at the worst moment.


class Losing(MemoryEventStore):
    """Loses history, once, while somebody asks for its bounds."""

    lose_at: int | None = None

    async def bounds(self) -> Bounds:
        bounds = await super().bounds()
        if self.lose_at is not None:
            end, self.lose_at = self.lose_at, None
            await anyio.lowlevel.checkpoint()
            self.begin_epoch(end)
        return bounds


@pytest.mark.parametrize("query", ["", "&snapshot=true"])
async def test_a_cursor_is_not_taken_for_one_of_an_epoch_that_began_meanwhile(query: str) -> None:
    store = Losing()
    async with EventBus(Settings(), store=store, plugins=Plugins(discover=False)) as bus:
        await bus.publish_batch([Event("a") for _ in range(10)])
        old, store.lose_at = bus.epoch, 5
        async with stream(event_app(bus, authorize=None), f"/event?last_event_id={old}:8{query}") as response:
            connected, expired = await response.take(2)
            assert (connected.type, connected.id) == ("server.connected", None)
            assert (expired.properties["reason"], expired.properties["latest"]) == ("epoch", 5)
            assert expired.id == f"{bus.epoch}:5"
            assert bus.epoch != old
            await bus.publish_batch([Event("b") for _ in range(5)])
            assert [(await response.next()).id for _ in range(5)] == [f"{bus.epoch}:{seq}" for seq in range(6, 11)]


async def test_a_state_of_a_lost_history_is_asked_for_again() -> None:
    asked: list[int] = []

    class State:
        @hookimpl
        async def sse_snapshot(self, subscriber: Subscriber, head: int) -> Snapshot:
            asked.append(head)
            state = Snapshot([Event("state", {"head": head})], head)
            if len(asked) == 1:
                bus.store.begin_epoch(5)  # type: ignore[attr-defined]
                await bus.publish_batch([Event("b") for _ in range(7)])
            return state

    plugins = Plugins(discover=False)
    plugins.register(State())
    async with EventBus(Settings(), plugins=plugins) as bus:
        await bus.publish_batch([Event("a") for _ in range(10)])
        async with stream(event_app(bus, authorize=None), "/event?snapshot=true") as response:
            frames = await response.until("server.heartbeat")
        assert asked == [10, 12]
        assert [frame.type for frame in frames] == ["server.connected", "state", "server.heartbeat"]
        assert frames[-1].id == f"{bus.epoch}:12"


async def test_limits_leave_a_snapshot_alone() -> None:
    """However long it is, and however small the limits: it is no lag."""

    class Long:
        @hookimpl
        def sse_snapshot(self) -> Snapshot:
            return Snapshot([Event("state", {"n": n}) for n in range(50)])

        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            subscriber.limits = Limits(1, 10)

    plugins = Plugins(discover=False)
    plugins.register(Long())
    async with EventBus(Settings(), plugins=plugins) as bus:
        app = event_app(bus, authorize=None)
        async with stream(app, "/event?snapshot=true", window=0) as response:
            await response.next()
            await bus.publish_batch([Event("a") for _ in range(10)])
            frames = await response.take(61)
    assert [frame.type for frame in frames] == ["state"] * 50 + ["server.heartbeat"] + ["a"] * 10
