"""What an overflow policy costs: readers that fall behind again and again, under each policy, and beside it under none.

    make bench-policies                     50 readers of the captured session, the median of 5 rounds (a minute)
    make bench-policies ARGS="--rounds 1"   one of them

The whole way of an event but for the socket, in one process: a burst is published while nobody reads, then everybody
reads until they are level. Each burst is larger than a reader's limit, so that each policy acts on each reader in each;
under `none` the limit is too large for that. The figure is CPU time of the process per event and reader: what the
policy spared to send counts for it. `block` lets the burst wait until readers read; under `disconnect` they come back
with `Last-Event-ID`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import anyio

from opencode_sse_plugin import Event, EventBus, Settings, event_app
from opencode_sse_plugin.cli.demo import one_round, read_trace
from opencode_sse_plugin.plugins import Plugins

CAPTURE: Final = Path(__file__).resolve().parents[1] / "data/event.jsonl.xz"
POLICIES: Final = (
    "none",
    "disconnect",
    "drop-oldest",
    "drop-newest",
    "coalesce",
    "shed",
    "catch-up",
    "block?timeout=1m",
    "block?timeout=1ms&then=coalesce",
)
#: A third of the captured session; more than a reader's limit by what lies in a reader's first `send`, which is no lag.
BURST: Final = 2085
LIMIT: Final = 1500
_BATCH: Final = 100


@dataclass(frozen=True)
class Row:
    """One policy in one round, or the median over rounds."""

    policy: str
    #: CPU time per event published and reader, in microseconds.
    cost: float
    #: Given, per reader.
    frames: float
    bytes: float
    dropped: float
    merged: float
    overflows: float


class Reader:
    """A client in this process: takes what it is sent while its gate is open, and comes back after an abort."""

    def __init__(self, app: Any, gate: Gate) -> None:
        self.app = app
        self.gate = gate
        self.frames = self.bytes = 0
        self.cursor = b""
        self.left = asyncio.Event()

    async def run(self) -> None:
        while not self.left.is_set():
            headers = [(b"last-event-id", self.cursor)] if self.cursor else []
            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "GET",
                "scheme": "http",
                "path": "/event",
                "query_string": b"",
                "headers": headers,
                "server": ("bench", 80),
                "client": ("127.0.0.1", 1),
            }
            await self.app(scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        body = message.get("body", b"")
        self.frames += body.count(b"\n\n")
        self.bytes += len(body)
        at = body.rfind(b"\nid: ")
        if at >= 0:
            self.cursor = body[at + 5 : body.index(b"\n", at + 5)]
        await self.gate.passed()


class Gate:
    """Whether readers read."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    async def passed(self) -> None:
        if not self._open.is_set():
            await self._open.wait()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


async def level(bus: EventBus, readers: int) -> None:
    """Wait until everybody is there and has everything."""
    while True:
        subscribers = bus.statistics()["subscribers"]
        if len(subscribers) == readers and {one["position"] for one in subscribers} == {bus.head}:
            return
        await asyncio.sleep(0.002)


async def measure(policy: str, count: int) -> Row:
    """The captured session once, in bursts."""
    events = [event for _, event in one_round(read_trace(CAPTURE))]
    settings = Settings(
        queue_max=LIMIT if policy != "none" else 10**9,
        queue_max_bytes=8 << 20 if policy != "none" else 1 << 40,
        overflow=policy if policy != "none" else "disconnect",
        heartbeat=1e6,
    )
    async with EventBus(settings, plugins=Plugins(discover=False)) as bus:
        gate = Gate()
        app = event_app(bus, authorize=None)
        readers = [Reader(app, gate) for _ in range(count)]
        async with asyncio.TaskGroup() as tasks:
            for reader in readers:
                tasks.create_task(reader.run())
            await level(bus, count)
            before = time.process_time()
            for first in range(0, len(events), BURST):
                gate.close()
                publishing = tasks.create_task(publish(bus, events[first : first + BURST]))
                await asyncio.wait([publishing], timeout=1.0 if "1m" in policy else None)
                gate.open()
                await publishing
                await level(bus, count)
            spent = time.process_time() - before
            counters = bus.statistics()["counters"]
            for reader in readers:
                reader.left.set()
    return Row(
        policy,
        spent / (len(events) * count) * 1e6,
        sum(reader.frames for reader in readers) / count,
        sum(reader.bytes for reader in readers) / count,
        counters["dropped"] / count,
        counters["merged"] / count,
        counters["overflows"] / count,
    )


async def publish(bus: EventBus, events: list[Event]) -> None:
    for first in range(0, len(events), _BATCH):
        await bus.publish_batch(events[first : first + _BATCH])


def middle(rows: list[Row]) -> Row:
    """Each figure's median."""
    first, *_ = rows
    figures = {name: median(getattr(row, name) for row in rows) for name in asdict(first) if name != "policy"}
    return Row(first.policy, **figures)


def shown(rows: list[Row]) -> str:
    """A table, and what `coalesce` saved."""
    lines = [
        "| policy | µs CPU per event and reader | beside none | frames | KB | dropped | merged | overflows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_name = {row.policy: row for row in rows}
    none = by_name["none"]
    for row in rows:
        cells = f"{row.cost:.2f} | {row.cost / none.cost:.2f} | {row.frames:.0f} | {row.bytes / 1000:.0f}"
        lines.append(f"| `{row.policy}` | {cells} | {row.dropped:.0f} | {row.merged:.0f} | {row.overflows:.0f} |")
    if (coalesce := by_name.get("coalesce")) is not None:
        lines.append(
            f"\n`coalesce` on the captured session: {coalesce.frames:.0f} frames instead of {none.frames:.0f} "
            f"({none.frames / coalesce.frames:.1f} times fewer), {coalesce.bytes / 1000:.0f} KB instead of "
            f"{none.bytes / 1000:.0f} KB ({none.bytes / coalesce.bytes:.1f} times fewer)"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each policy, whose median counts (5)")
    parser.add_argument("--readers", type=int, default=50, help="how many fall behind (50)")
    parser.add_argument("--policies", default=",".join(POLICIES[1:]), help="only these, by comma")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians there")
    options = parser.parse_args(arguments)
    names = ["none", *options.policies.split(",")]
    rounds = [[anyio.run(measure, name, options.readers) for name in names] for _ in range(options.rounds)]
    rows = [middle(list(column)) for column in zip(*rounds, strict=True)]
    print(shown(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
