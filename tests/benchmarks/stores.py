"""The benchmark of stores: what is durable beside bare SQLite and a bare script in Valkey, in one run; see ``--help``.

    make bench-stores                  all of it (some minutes)
    make bench-stores ARGS=--quick     in short

Every part runs in a process of its own, in a folder of the disk (BENCH_STORE_FOLDER, else where temporary files are).
Appends are measured on one core, as servers are by ``make bench``; SQLite's also where its thread has another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from cells import Child, Unavailable
from machine import HERE, CannotRun, description, two_cores

PROGRAM = str(HERE / "servers/store_sqlite.py")
REDIS = str(HERE / "servers/store_redis.py")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="stores.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round of everything")
    parser.add_argument("--parts", help="only these, by comma: appends,pages,latency,told,replay,redis")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    return parser.parse_args()


def ask(part: str, *parameters: object, alone: bool = False, patience: float = 240) -> dict[str, Any]:
    """:param alone: whether the process keeps to one core."""
    command = [sys.executable, PROGRAM, part, *map(str, parameters)]
    with Child(f"the part {part}", command, cores() if alone else {}) as child:
        return child.hear(patience)


def cores() -> dict[str, str]:
    """One core for what is measured, and one for everything else."""
    server, load = two_cores()
    return {} if server is None else {"BENCH_SERVER_CPU": str(server), "BENCH_LOAD_CPU": str(load)}


def verdict(reached: bool, what: str) -> str:
    return f"  {'reached' if reached else 'MISSED':8} {what}"


def appends(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    yield "Durable appends a second, of 300 bytes, beside a loop that commits the same rows and batches"
    for publishers in (1, 10, 100):
        rounds, free = [], []
        for _ in range(1 if quick else 5):
            rounds.append(ask("appends", publishers, 0.5 if quick else 2, alone=True))
            free.append(ask("appends", publishers, 0.5 if quick else 2))
        found[f"appends {publishers}"], found[f"appends {publishers}, two cores"] = rounds, free
        ratio, freely = (median(one["ours"] / one["bare"] for one in kind) for kind in (rounds, free))
        ours, bare = (median(one[name] for one in rounds) for name in ("ours", "bare"))
        yield f"  {publishers:4} publishers {ours:>12,.0f} {bare:>12,.0f}   (on two cores {freely:.2f} of it)"
        yield verdict(ratio >= 0.5, f"{ratio:.2f} of the bare loop (at least 0.5)")


def pages(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    one = found["pages"] = ask("pages", 20_000 if quick else 200_000, 1 if quick else 5)
    yield "Events a second read in pages of 500, beside a SELECT of the same pages"
    yield f"  {one['ours']:>12,.0f} {one['bare']:>12,.0f}"
    yield verdict(one["ours"] >= one["bare"] / 2, f"{one['ours'] / one['bare']:.2f} of the bare SELECT (at least 0.5)")


def latency(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    yield "From publish to the frame at a socket, ms"
    # Valkey on this machine, which keeps nothing on disk: acknowledged is what its memory has.
    for store in ("memory://", "sqlite:///", "sqlite:///?synchronous=normal", "redis://"):
        one = found[f"latency {store}"] = ask("latency", store, 200 if quick else 2000)
        yield f"  {store.partition('?')[2] or store:20} p50 {one['p50']:.2f}  p99 {one['p99']:.2f}"


def told(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    one = found["told"] = ask("told", 50 if quick else 500)
    yield "From before another process's commit to being told, ms"
    yield f"  p50 {one['p50']:.1f}  p99 {one['p99']:.1f}  max {one['max']:.1f}"
    yield verdict(one["p99"] <= 50, f"p99 {one['p99']:.1f} ms (at most 50)")


def replay(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    yield "Memory above idle while ten clients replay, MB"
    for events in (10_000, 20_000) if quick else (100_000, 1_000_000):
        one = found[f"replay {events}"] = ask("replay", events)
        yield f"  {events:>9,} events {one['above_mb']:6.1f}   ({one['seconds']:.0f} s, idle {one['idle_mb']:.0f} MB)"
        yield verdict(one["complete"] and one["above_mb"] <= 64, "all came, and at most 64 MB")


def redis(quick: bool, found: dict[str, Any]) -> Iterator[str]:
    rounds = ("--rounds", "1", "--seconds", "0.3") if quick else ()
    with Child("the part redis", [sys.executable, REDIS, "--json", *rounds], cores()) as child:
        rows = found["redis"] = child.hear(240)
    yield "Redis/Valkey: appends a second, of 300 bytes, beside a bare pipelined script with the same batches"
    for publishers, row in rows.items():
        through, alone, bare = (median(row[name]) for name in ("bus", "ours", "bare"))
        yield f"  {publishers:>4} publishers {through:>12,.0f} {bare:>12,.0f}   (the store alone {alone:,.0f})"
        yield verdict(through >= bare / 2, f"{through / bare:.2f} of the bare script (at least 0.5)")


PARTS = {"appends": appends, "pages": pages, "latency": latency, "told": told, "replay": replay, "redis": redis}


def main() -> int:
    options = arguments()
    names = list(PARTS) if options.parts is None else options.parts.split(",")
    if unknown := {*names} - {*PARTS}:
        raise CannotRun(f"there is no {', '.join(sorted(unknown))}; see --help")
    print(description(), flush=True)
    found: dict[str, Any] = {}
    for name in names:
        for line in PARTS[name](options.quick, found):
            print(line, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unavailable as error:
        sys.exit(f"the benchmark cannot run: {error}")
    except CannotRun as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
