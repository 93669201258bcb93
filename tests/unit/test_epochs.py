"""What a client's cursor is worth after its log was restarted, crashed, or had another history put into it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from opencode_sse_plugin import Event, EventBus, Settings, event_app
from opencode_sse_plugin.cli import main
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import Frame, stream

from .test_sqlite_file import another_process

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def bus_over(path: Path, query: str = "") -> AsyncIterator[EventBus]:
    settings = Settings(store=f"sqlite:///{path}{query}")
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus:
        yield bus


async def resumed(bus: EventBus, cursor: str) -> list[Frame]:
    """What a client with a cursor gets up to the head, and one more event."""
    async with stream(event_app(bus, authorize=None), "/event", headers={"Last-Event-ID": cursor}) as response:
        frames = [await response.next()]
        last = await bus.publish("last")
        while frames[-1].id != f"{bus.epoch}:{last}":
            frames.append(await response.next())
        return frames


def cursors(frames: list[Frame]) -> list[str | None]:
    return [frame.id for frame in frames]


async def assert_good(bus: EventBus, cursor: str) -> None:
    """It goes on behind a cursor, under the current epoch."""
    position = int(cursor.rpartition(":")[2])
    frames = await resumed(bus, cursor)
    assert frames[0].type == "server.heartbeat"
    assert cursors(frames) == [f"{bus.epoch}:{seq}" for seq in range(position, bus.head + 1)]


async def assert_expired(bus: EventBus, cursor: str) -> None:
    """The cursor is told to be another history's, and the stream goes on live."""
    frames = await resumed(bus, cursor)
    assert [frame.type for frame in frames] == ["server.connected", "server.stream.expired", "last"]
    assert (frames[1].properties["reason"], frames[1].properties["requested"]) == ("epoch", cursor)
    assert frames[1].id == f"{bus.epoch}:{bus.head - 1}"


@pytest.mark.parametrize("query", ["", "?synchronous=normal"])
async def test_a_clean_restart_keeps_cursors(tmp_path: Path, query: str) -> None:
    async with bus_over(tmp_path / "a.db", query) as bus:
        await bus.publish_batch([Event("a") for _ in range(5)])
        epoch = bus.epoch
    async with bus_over(tmp_path / "a.db", query) as bus:
        assert bus.epoch == epoch
        await assert_good(bus, f"{epoch}:2")
        await assert_good(bus, f"{epoch}:5")


async def test_a_killed_process_keeps_cursors(tmp_path: Path) -> None:
    async with bus_over(tmp_path / "a.db") as bus:
        epoch = bus.epoch
    with another_process(tmp_path / "a.db") as process:
        process.kill()
        process.wait()
    async with bus_over(tmp_path / "a.db") as bus:
        assert (bus.epoch, bus.head) == (epoch, 2)
        await assert_good(bus, f"{epoch}:1")


async def test_where_commits_may_be_lost_a_crash_ends_the_epoch(tmp_path: Path) -> None:
    """A client may have been given numbers that the machine lost; none of the log's own is beyond the end."""
    async with bus_over(tmp_path / "a.db", "?synchronous=normal") as bus:
        old = bus.epoch
    with another_process(tmp_path / "a.db", lossy=True) as process:
        process.kill()
        process.wait()
    async with bus_over(tmp_path / "a.db", "?synchronous=normal") as bus:
        assert bus.epoch != old
        await assert_good(bus, f"{old}:1")
        await assert_good(bus, f"{old}:2")
        await assert_expired(bus, f"{old}:3")
        await assert_good(bus, f"{bus.epoch}:3")


async def test_an_import_ends_the_epoch_and_older_cursors_are_good_up_to_there(tmp_path: Path) -> None:
    async with bus_over(tmp_path / "other.db") as bus:
        await bus.publish_batch([Event("b") for _ in range(4)])
        others = bus.epoch
    exported = ["store", "export", f"sqlite:///{tmp_path}/other.db", "--output", str(tmp_path / "x")]
    imported = ["store", "import", f"sqlite:///{tmp_path}/a.db", str(tmp_path / "x")]
    assert await anyio.to_thread.run_sync(main, exported) == 0
    async with bus_over(tmp_path / "a.db") as bus:
        await bus.publish_batch([Event("a") for _ in range(3)])
        old = bus.epoch
        async with stream(event_app(bus, authorize=None), "/event") as live:
            await live.next()
            # Into a log that is open here: its readers just go on.
            assert await anyio.to_thread.run_sync(main, imported) == 0
            frames = await live.take(4)
            assert [frame.type for frame in frames] == ["b"] * 4
            assert cursors(frames) == [f"{bus.epoch}:{seq}" for seq in range(4, 8)]
        assert bus.epoch not in (old, others)
        await assert_good(bus, f"{old}:2")
        await assert_good(bus, f"{old}:3")
        await assert_expired(bus, f"{old}:4")
        await assert_expired(bus, f"{others}:2")
