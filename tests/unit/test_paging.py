"""Replay from a durable log: a page at a time, nothing held while a client does not read, and fair to the others."""

from __future__ import annotations

import gc
import sqlite3
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from opencode_sse_plugin import Event, EventBus, Filter, Limits, Settings, StoredEvent, event_app
from opencode_sse_plugin import log as log_module
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.position import PAGE_EVENTS
from opencode_sse_plugin.stores import sqlite_log
from opencode_sse_plugin.testing import stream

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def bus_over(path: Path, **settings: Any) -> AsyncIterator[EventBus]:
    async with EventBus(Settings(store=f"sqlite:///{path}", **settings), plugins=Plugins(discover=False)) as bus:
        yield bus


async def publish(bus: EventBus, number: int, pad: int = 100) -> None:
    for start in range(0, number, 1000):
        await bus.publish_batch([Event("a", {"pad": "x" * pad}) for _ in range(min(1000, number - start))])


async def test_a_replay_that_stands_holds_no_transaction(tmp_path: Path) -> None:
    """A checkpoint can go through all of the WAL, which a transaction would keep it from."""
    async with bus_over(tmp_path / "a.db") as bus:
        await publish(bus, 3000)
        app = event_app(bus, authorize=None)
        async with stream(app, "/event?after_seq=0", window=1024) as replay:
            await replay.take(5)
            await replay.until_blocked()
            await publish(bus, 1000)
            wal = tmp_path / "a.db-wal"
            assert wal.stat().st_size > 0
            with closing(sqlite3.connect(tmp_path / "a.db")) as other:
                busy, frames, done = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert (busy, frames, done) == (0, 0, 0), "not all of it could be written back"
            assert wal.stat().st_size == 0
            rest = await replay.rest()
            assert [frame.cursor.seq for frame in rest if frame.cursor] == list(range(5, 3001)), "its head was fixed"


def alive() -> int:
    gc.collect()
    return sum(isinstance(thing, StoredEvent) for thing in gc.get_objects())


async def test_a_replay_that_stands_has_a_page_in_memory_at_most(tmp_path: Path) -> None:
    async with bus_over(tmp_path / "a.db") as bus:
        await publish(bus, 5000, pad=10)
    async with bus_over(tmp_path / "a.db") as bus:  # With an empty window.
        app = event_app(bus, authorize=None)
        before = alive()  # A test that ran here before may have left one behind.
        async with stream(app, "/event?after_seq=0", window=1024) as replay:
            seen = 0
            while seen < 5000:
                await replay.until_blocked()
                assert alive() - before <= PAGE_EVENTS
                seen += len(await replay.take(min(999, 5001 - seen)))
                if seen > 4000:
                    break
            await replay.rest()


async def test_a_position_is_found_by_index(tmp_path: Path) -> None:
    async with bus_over(tmp_path / "a.db") as bus:
        await publish(bus, 10)
    with closing(sqlite3.connect(tmp_path / "a.db")) as log:
        ids = sqlite_log.KNOWN_MAX, None
        for statement, values in (
            (sqlite_log._PAGE, (5, 10)),
            ("SELECT min(seq) FROM events", ()),
            ("SELECT id, type, seq FROM events WHERE id IN (?) AND seq > ?", ids),
        ):
            plan = [step[3] for step in log.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert plan
            assert all(step.startswith("SEARCH events") for step in plan), plan


async def test_replays_hold_up_neither_live_readers_nor_each_other(tmp_path: Path) -> None:
    async with bus_over(tmp_path / "a.db") as bus:
        await publish(bus, 20_000)
    async with bus_over(tmp_path / "a.db") as bus:
        begun: set[int] = set()
        over = anyio.Event()

        async def replay(number: int) -> None:
            while not over.is_set():  # However fast they are, and the disk slow.
                async with bus.subscribe(Filter(), after=0) as events:
                    count = 0
                    async for delivery in events:
                        count += delivery.seq is not None
                        if count:
                            begun.add(number)
                        if count == 20_000:
                            break

        async with bus.subscribe(Filter()) as live, anyio.create_task_group() as group:
            await anext(live)
            for number in range(5):
                group.start_soon(replay, number)
            while len(begun) < 5:
                await anyio.lowlevel.checkpoint()
            with anyio.fail_after(120):  # Replays do not end before.
                for number in range(10):
                    seq = await bus.publish("b", {"n": number})
                    assert (await anext(live)).seq == seq
            over.set()


@pytest.mark.parametrize(
    ("near", "far", "window"),
    [
        (1500, 10_000, 1000),
        pytest.param(10_000, 100_000, None, marks=[pytest.mark.chaos, pytest.mark.timeout(900)]),
    ],
)
async def test_catching_up_costs_no_memory_and_nobody_waits(
    tmp_path: Path, near: int, far: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader at a tenth of the publishing rate: the publisher goes on though it does not read, and it gets all."""
    if window is not None:
        monkeypatch.setattr(log_module, "WINDOW_EVENTS", window)
    held: dict[int, int] = {}
    async with bus_over(tmp_path / "a.db", queue_max=100) as bus:
        count = 0
        slow = bus.subscribe(Filter(), limits=Limits(100, 1 << 20), overflow="catch-up")
        async with slow as events:
            await anext(events)

            async def read(number: int) -> None:
                nonlocal count
                for _ in range(number):
                    count += 1
                    assert (await anext(events)).seq == count

            tracemalloc.start()
            try:
                while bus.head - count < far:
                    # The publisher is this task, too: it could not wait for the reader.
                    await bus.publish_batch([Event("a", {"pad": "x" * 200}) for _ in range(100)])
                    await read(10)
                    if bus.head - count >= near and near not in held:
                        gc.collect()
                        held[near] = tracemalloc.get_traced_memory()[0]
                gc.collect()
                held[far] = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
            await read(bus.head - count)
        assert bus.statistics()["counters"]["dropped"] == 0
    more = held[far] - held[near]
    print(f"{held[near]} bytes at a distance of {near}, {held[far]} at {far}")
    # A page or two as the objects that this reader is given; a queue would have 300 bytes an event at least.
    assert more < min(1024 * 1024, (far - near) * 150), f"{more} bytes more at a distance of {far}"
