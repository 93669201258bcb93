"""Ours: ``install()`` into a Starlette app, with the settings a host gets by default, but for what a row names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from importlib.metadata import version
from typing import Any

from common import TYPE, properties, serve
from starlette.applications import Starlette

from opencode_sse_plugin import EventBus, PublishBufferFull, Settings, install
from opencode_sse_plugin.cli.demo import one_round, read_trace, shipped

named = [*os.environ.get("BENCH_SETTINGS", "").split(), *sys.argv[1:]]
given: dict[str, Any] = {
    name: int(value) if value.isdigit() else value for name, _, value in (pair.partition("=") for pair in named)
}
bus = EventBus(Settings(max_subscribers=20_000, **given))
app = Starlette()
install(app, bus, authorize=None)


def publish(session: int | None) -> None:
    # Under `block` the buffer is full while a stalled reader still has time: an open loop loses what comes then.
    with contextlib.suppress(PublishBufferFull):
        bus.publish_nowait(TYPE, properties(session))


class Turns:
    """Thread time of the turns of the event loop in which readers were woken, their writes included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._wake_some = bus.log.fanout._wake_some
        bus.log.fanout._wake_some = self._timed  # type: ignore[method-assign]

    def _timed(self) -> None:
        begun = time.thread_time()
        # uvloop writes at the end of the turn; this runs at the start of the next.
        asyncio.get_running_loop().call_soon(lambda: self.seconds.append(time.thread_time() - begun))
        self._wake_some()


async def turns() -> dict[str, float]:
    """Begin to look at turns; from the second call on, the slowest thousandth since the last."""
    global looking
    if looking is None:
        looking = Turns()
    found, looking.seconds = sorted(looking.seconds), []
    return {"turn_ms": found[int(len(found) * 0.999)] * 1000 if found else 0.0, "turns": len(found)}


looking: Turns | None = None


async def fill(count: str) -> dict[str, int]:
    """Put so many events into the log before anybody comes."""
    for number in range(int(count)):
        bus.publish_nowait(TYPE, properties())
        if number % 1000 == 0:
            await asyncio.sleep(0)
    return {"head": bus.head}


async def trace(speed: str) -> dict[str, Any]:
    """Publish the shipped opencode trace once, so many times as fast as it was recorded."""
    events = list(one_round(read_trace(shipped())))
    begun, at = time.monotonic(), 0
    while at < len(events):
        now = (time.monotonic() - begun) * float(speed)
        due = []
        while at < len(events) and events[at][0] <= now:
            due.append(events[at][1])
            at += 1
        if due:
            await bus.publish_batch(due)
        await asyncio.sleep(0.005)
    return {"published": len(events), "seconds": time.monotonic() - begun}


named = " ".join(f"{name}={value}" for name, value in given.items())
serve(
    app,
    publish,
    f"opencode-sse-plugin {version('opencode-sse-plugin')}, {named or 'default settings'}, uvicorn "
    f"{version('uvicorn')} with uvloop and httptools, orjson {version('orjson')}",
    {"turns": turns, "fill": fill, "trace": trace},
)
