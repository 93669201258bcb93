"""The SQLite store beside bare SQLite: appends, pages, latency to the socket, memory of a long replay. One part a run.

Arguments: the part, and its parameters. Answers with one line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import uvloop
from common import TYPE, pin, properties, say

from opencode_sse_plugin import Event, EventBus, Settings, StoredEvent
from opencode_sse_plugin.app import event_app
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Page, sqlite_log
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.stores.verifying import Nobody

_PAGE: Final = 500
_PAGE_BYTES: Final = 1024 * 1024


@contextmanager
def folder() -> Iterator[Path]:
    """On the disk that the state of users lies on, since a file system in memory would flush nothing."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_STORE_FOLDER"), prefix="bench-store-") as name:
        yield Path(name)


def stored(number: int) -> StoredEvent:
    return StoredEvent.encode(Event(TYPE, properties(), f"evt_{number:026d}"))


def bare(path: Path) -> sqlite3.Connection:
    """The table of the store, without the store."""
    log = sqlite3.connect(path, isolation_level=None)
    log.execute("PRAGMA journal_mode = WAL")
    log.execute("PRAGMA synchronous = FULL")
    for statement in sqlite_log.MIGRATIONS[0]:
        log.execute(statement)
    return log


def row(number: int) -> tuple[object, ...]:
    event = stored(number)
    places = (event.session, event.directory, event.project, event.workspace)
    return (number, 0, 0, event.id, event.type, *places, event.scope, event.payload)


def bare_appends(at: Path, publishers: int, seconds: float) -> float:
    """Events a second where each commit has one event of every publisher; they were made before."""
    with closing(bare(at / "bare.db")) as log:
        number = 0
        spent = 0.0
        while spent < seconds:
            rows = [row(number + i + 1) for i in range(publishers)]
            begun = time.perf_counter()
            log.execute("BEGIN IMMEDIATE")
            log.executemany(sqlite_log._insert_statement(1), rows)
            log.execute("COMMIT")
            spent += time.perf_counter() - begun
            number += publishers
        return number / spent


async def our_appends(at: Path, publishers: int, seconds: float) -> float:
    """Events a second where so many publishers wait for their acknowledgement each."""
    bus = EventBus(Settings(store=f"sqlite:///{at / 'ours.db'}"), plugins=Plugins(discover=False))
    async with bus:
        body = properties()
        until = time.perf_counter() + seconds

        async def publish() -> None:
            while time.perf_counter() < until:
                await bus.publish(TYPE, body)

        begun = time.perf_counter()
        await asyncio.gather(*(publish() for _ in range(publishers)))
        return bus.head / (time.perf_counter() - begun)


async def appends(publishers: int, seconds: float) -> None:
    with folder() as at:
        before = bare_appends(at, publishers, seconds / 2)
        ours = await our_appends(at, publishers, seconds)
    with folder() as at:
        after = bare_appends(at, publishers, seconds / 2)
    say(ours=ours, bare=(before + after) / 2)


async def pages(events: int, rounds: int) -> None:
    """Events a second in pages, and by a bare SELECT of the same pages."""
    with folder() as at:
        store = SQLiteEventStore(at / "a.db")
        await store.open(Nobody())
        for start in range(0, events, 1000):
            await store.append([stored(start + i) for i in range(1000)])
        ours, other = [], []
        for _ in range(rounds):
            begun, after = time.perf_counter(), 0
            while after < events:
                page = await store.read(after, _PAGE, _PAGE_BYTES)
                assert isinstance(page, Page)
                after = page.last
            ours.append(events / (time.perf_counter() - begun))
            with closing(sqlite3.connect(at / "a.db")) as log:
                begun, after = time.perf_counter(), 0
                while after < events:
                    after = log.execute(sqlite_log._PAGE, (after, _PAGE)).fetchall()[-1][0]
                other.append(events / (time.perf_counter() - begun))
        await store.close()
    say(ours=max(ours), bare=max(other))


def resident() -> float:
    """MB of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@asynccontextmanager
async def place(store: str, at: Path) -> AsyncIterator[str]:
    """The URL of a store of a kind in a folder, its server started where it needs one."""
    engine, mark, options = store.partition("?")
    if engine != "redis://":
        yield store if engine == "memory://" else f"{engine}{at / 'a.db'}{mark}{options}"
        return
    from store_redis import answering, start

    server, url = start(str(at))
    try:
        await answering(url)
        yield url
    finally:
        server.terminate()
        server.wait()


async def latency(store: str, events: int) -> None:
    """Milliseconds from the call of ``publish`` until the frame is read from a socket."""
    with folder() as at:
        async with place(store, at) as url, serving(Settings(store=url, retain_events=10_000)) as (bus, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /event HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b"server.connected")
            took = []
            for number in range(events):
                begun = time.perf_counter()
                publishing = asyncio.ensure_future(bus.publish(TYPE, {"n": number}))
                await reader.readuntil(b'"n":%d}' % number)
                took.append((time.perf_counter() - begun) * 1e3)
                await publishing
            writer.close()
    cuts = quantiles(took, n=100)
    say(p50=cuts[49], p99=cuts[98])


async def told(events: int) -> None:
    """Milliseconds from another process's commit until this one is told."""
    with folder() as at:
        store, arrived = SQLiteEventStore(at / "a.db"), asyncio.Queue[float]()

        class Listener(Nobody):
            waiting = 0

            def visible(self, events: Any) -> None:
                arrived.put_nowait(time.monotonic() - json.loads(events[-1].payload)["properties"]["committed"])

        await store.open(Listener())
        program = [sys.executable, __file__, "writer", str(at / "a.db"), str(events)]
        process = await asyncio.create_subprocess_exec(*program)
        took = sorted([await arrived.get() * 1e3 for _ in range(events)])
        await process.wait()
        await store.close()
    say(p50=took[len(took) // 2], p99=took[int(len(took) * 0.99)], max=took[-1])


async def writer(path: str, events: int) -> None:
    """The other process; it says when it is about to commit, which is a little before the commit."""
    store = SQLiteEventStore(Path(path))
    await store.open(Nobody())
    for number in range(events):
        await asyncio.sleep(0.02 + number % 7 * 0.013)
        event = Event(TYPE, {"committed": time.monotonic()}, f"evt_{number:026d}")
        await store.append([StoredEvent.encode(event)])
    await store.close()


class serving:
    """A bus behind uvicorn, in this process."""

    def __init__(self, settings: Settings) -> None:
        import uvicorn

        self.bus = EventBus(settings, plugins=Plugins(discover=False))
        app = event_app(self.bus, authorize=None)
        config = uvicorn.Config(app, port=0, ws="none", access_log=False, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)

    async def __aenter__(self) -> tuple[EventBus, int]:
        await self.bus.start()
        self.task = asyncio.create_task(self.server.serve())
        while not self.server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        return self.bus, self.server.servers[0].sockets[0].getsockname()[1]

    async def __aexit__(self, *_: object) -> None:
        await self.bus.drain()
        self.server.should_exit = True
        await self.task


#: Reads ten replays to their end and counts their events; on its own, so that its memory is its own.
_READERS: Final = """
import asyncio, sys
async def read(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /event?after_seq=0 HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
    count, rest = 0, b""
    while got := await reader.read(262144):
        got = rest + got
        count += got.count(b"\\nid: ")
        rest = got[-4:]
        count -= rest.count(b"\\nid: ")
        if got.endswith(b"0\\r\\n\\r\\n"):
            break
    writer.close()
    return count
async def main():
    print(await asyncio.gather(*(read(int(sys.argv[1])) for _ in range(10))))
asyncio.run(main())
"""


async def replay(events: int) -> None:
    """MB above idle while ten clients read a log of so many events."""
    with folder() as at:
        store = SQLiteEventStore(at / "a.db")
        await store.open(Nobody())
        for start in range(0, events, 5000):
            await store.append([stored(start + i) for i in range(5000)])
        await store.close()
        del store
        async with serving(Settings(store=f"sqlite:///{at / 'a.db'}")) as (_, port):
            gc.collect()
            idle = most = resident()
            begun = time.perf_counter()
            readers = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _READERS, str(port), stdout=asyncio.subprocess.PIPE
            )
            reading = asyncio.ensure_future(readers.communicate())
            while not reading.done():
                most = max(most, resident())
                await asyncio.wait([reading], timeout=0.02)
            seconds = time.perf_counter() - begun
            counts = json.loads((await reading)[0])
    say(above_mb=most - idle, idle_mb=idle, seconds=seconds, complete=all(abs(n - events) <= 1 for n in counts))


PARTS: Final[dict[str, Callable[..., Any]]] = {
    "appends": lambda publishers, seconds: appends(int(publishers), float(seconds)),
    "pages": lambda events, rounds: pages(int(events), int(rounds)),
    "latency": lambda store, events: latency(store, int(events)),
    "told": lambda events: told(int(events)),
    "writer": lambda path, events: writer(path, int(events)),
    "replay": lambda events: replay(int(events)),
}

if __name__ == "__main__":
    uvloop.install()  # As servers do.
    pin()
    asyncio.run(PARTS[sys.argv[1]](*sys.argv[2:]))
