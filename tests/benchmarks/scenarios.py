"""Measurements that are more than publishing to readers who read: replays, stalled readers, a recorded trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

from cells import Child, Measurement, Shape, Unavailable, load_client, measure_fan_out, start_server, warm_up
from machine import cpu_seconds, resident_bytes

#: Readers who replay, and those who are live beside them, with their rate.
REPLAYING: Final = 100
BACKLOG: Final = 100_000
#: Of a thousand.
STALLED: Final = 50
#: Until the buffers of those who stall are full and their policy has acted.
_STALL_SECONDS: Final = 3.0
#: How much faster than it was recorded.
TRACE_SPEED: Final = 10
#: A prompt that makes opencode publish for about two seconds.
_DELTAS: Final = 2000


def _settle(load: Child, field: str, seconds: float, quiet: float = 0.5) -> dict[str, Any]:
    """Wait until a count stands still."""
    until, found, since = time.monotonic() + seconds, load.ask("count"), time.monotonic()
    while time.monotonic() < until and time.monotonic() - since < quiet:
        time.sleep(0.02)
        now = load.ask("count")
        if now[field] != found[field]:
            since = time.monotonic()
        found = now
    return found


def replay(server: str, shape: Shape, seconds: float) -> Measurement:
    """Live readers alone, then beside readers who replay everything that is stored. Other servers than ours have no
    log: they give the bytes they write a CPU-second to as many live readers, in writes of 100 events."""
    if server != "ours":
        return measure_fan_out(server, Shape(REPLAYING, 20_000), seconds)
    backlog = BACKLOG if seconds >= 2 else BACKLOG // 10  # --quick
    settings = f"retain_events={2 * BACKLOG}"
    with ExitStack() as stack:
        child, ready = stack.enter_context(start_server(server, settings))
        warm_up(ready["port"])
        child.ask(f"fill {backlog}", 60)
        child.ask("settle", 60)  # As in a fan-out.
        live = stack.enter_context(load_client(server, shape, ready["port"]))
        live.hear(30)
        live.ask("mark")
        child.ask(f"publish {shape.rate} {seconds} 0", seconds + 10)
        time.sleep(0.2)
        # A second live client, since one reports when it stops.
        alone = live.ask("stop")
        live = stack.enter_context(load_client(server, shape, ready["port"]))
        live.hear(30)
        live.ask("mark")
        before = cpu_seconds(ready["pids"])
        child.tell(f"publish {shape.rate} 60 0")
        path = "/event?after_seq=0"
        begun = time.monotonic()
        reading = Shape(REPLAYING, 1)
        replaying = stack.enter_context(
            load_client(server, reading, ready["port"], path=path, sample=REPLAYING * 10, yields=True)
        )
        replaying.hear(60)
        while (count := replaying.ask("count"))["closed"] < REPLAYING:
            if time.monotonic() > begun + 60:
                raise Unavailable("the replays do not end")
            time.sleep(0.01)
        took = time.monotonic() - begun
        used = cpu_seconds(ready["pids"]) - before
        beside = live.ask("stop")
    expected = REPLAYING * backlog
    return Measurement(
        events=count["events"],
        per_cpu_second=count["events"] / used,
        cpu_us_per_event=used / expected * 1e6,
        busy=used / took,
        delivered=count["events"] / expected,
        together=0.0,
        p50_ms=beside["p50_ms"],
        p99_ms=beside["p99_ms"],
        max_ms=beside["max_ms"],
        idle_kb=0.0,
        missing=beside["missing"] + beside["repeated"],
        lagged=beside["lagged"],
        about=ready["about"],
        mb_per_cpu_second=count["bytes"] / used / 1e6,
        p99_times=beside["p99_ms"] / max(alone["p99_ms"], 0.001),
    )


def stalled(server: str, shape: Shape, seconds: float) -> Measurement:
    """Readers who read beside some who do not: what the former get a CPU-second."""
    with ExitStack() as stack:
        child, ready = stack.enter_context(start_server(server, f"overflow={shape.policy}" if shape.policy else ""))
        warm_up(ready["port"])
        healthy = replace(shape, subscribers=shape.subscribers - (STALLED if shape.policy else 0))
        load = stack.enter_context(load_client(server, healthy, ready["port"]))
        load.hear(60)
        if shape.policy:
            stuck = stack.enter_context(load_client(server, Shape(STALLED, 1), ready["port"], stall=True))
            stuck.hear(60)
        child.ask(f"publish {shape.rate} {_STALL_SECONDS} 0", 60)
        _settle(load, "events", 5, 0.2)
        load.ask("mark")
        before, begun = cpu_seconds(ready["pids"]), time.monotonic()
        published = child.ask(f"publish {shape.rate} {seconds} 0", seconds + 30)
        _settle(load, "events", 5, 0.2)
        took, used = time.monotonic() - begun, cpu_seconds(ready["pids"]) - before
        result = load.ask("stop")
    return Measurement(
        events=result["events"],
        per_cpu_second=result["events"] / max(used, 0.01),
        cpu_us_per_event=used / published["due"] * 1e6,
        busy=used / took,
        delivered=result["events"] / (published["due"] * healthy.subscribers),
        together=result["parsed"] / max(result["reads"], 1),
        p50_ms=result["p50_ms"],
        p99_ms=result["p99_ms"],
        max_ms=result["max_ms"],
        idle_kb=0.0,
        missing=result["missing"] + result["repeated"],
        lagged=result["lagged"],
        about=ready["about"],
    )


def trace(server: str, shape: Shape, seconds: float) -> Measurement:
    """The trace in the package, or for opencode itself the events of a prompt, to everyone on ``/global/event``."""
    with ExitStack() as stack:
        child, ready = stack.enter_context(start_server(server, "overflow=catch-up"))
        empty = resident_bytes(ready["pids"])
        load = stack.enter_context(
            load_client(server, shape, ready["port"], path="/global/event", sample=10 * shape.subscribers)
        )
        load.hear(60)
        time.sleep(1 if server == "opencode" else 0.2)
        idle = (resident_bytes(ready["pids"]) - empty) / shape.subscribers / 1024
        load.ask("mark")
        before, begun = cpu_seconds(ready["pids"]), time.monotonic()
        for _ in range(2 if seconds < 2 else 3):
            child.ask(f"trace {_DELTAS if server == 'opencode' else TRACE_SPEED}", 60)
        count = _settle(load, "blocks", 30)
        took, used = time.monotonic() - begun, cpu_seconds(ready["pids"]) - before
        load.ask("stop")
    return Measurement(
        events=count["blocks"],
        per_cpu_second=count["blocks"] / used,
        cpu_us_per_event=used / max(count["blocks"] / shape.subscribers, 1) * 1e6,
        busy=used / took,
        delivered=1.0,
        together=0.0,
        p50_ms=0.0,
        p99_ms=0.0,
        max_ms=0.0,
        idle_kb=idle,
        missing=0,
        lagged=0,
        about=ready["about"],
        mb_per_cpu_second=count["bytes"] / used / 1e6,
    )


MEASURES: Final[dict[str, Callable[[str, Shape, float], Measurement]]] = {
    "fan-out": measure_fan_out,
    "replay": replay,
    "stalled": stalled,
    "trace": trace,
}


def measure(server: str, shape: Shape, seconds: float) -> Measurement:
    """Measure a shape, whatever its kind.

    :raises Unavailable: if the server cannot run.
    """
    return MEASURES[shape.kind](server, shape, seconds)
