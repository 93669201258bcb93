"""The benchmark: our server beside its peers, in one run, interleaved; see ``--help``.

    make bench                  every row, the median of 5 rounds (about twenty minutes)
    make bench ARGS=--quick     one short round of the main rows, in about a minute

The server runs on one core, the load client on another. The figure is deliveries per CPU-second of the server's
process, by the operating system's books: it does not depend on how fast the client is, and little on what else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from cells import SERVERS, Child, Measurement, Shape, Unavailable
from machine import HERE, CannotRun, compile_all, description, raise_file_limit, stolen, two_cores
from plot import plot
from report import Results, spread, table
from rows import NCHAN, OPENCODE, OURS, ROWS, Row
from scenarios import measure

COST = "publish-cost"
RESULTS = Path("bench-results")
QUICK = ("100", "1000", "5000", "10k", "replay", "stalled-none", "stalled-disconnect")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of the main rows")
    parser.add_argument("--rounds", type=int, help="measurements of each cell, whose median counts (5)")
    parser.add_argument("--seconds", type=float, help="how long a measurement publishes (4)")
    parser.add_argument("--rows", help=f"only these, by comma: {','.join([row.name for row in ROWS])},{COST}")
    parser.add_argument("--servers", help=f"only these, by comma: {','.join(SERVERS)}")
    parser.add_argument("--subscribers", type=int, help="a row of its own, with --rate, instead of the table's")
    parser.add_argument("--rate", type=float, default=100, help="its events per second (100)")
    parser.add_argument("--sessions", action="store_true", help="each of its subscribers filtered to its own session")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every measurement (bench-results/results.json)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the plot (bench-results/plot.svg)")
    parser.add_argument("--from", type=Path, nargs="+", metavar="FILE", help="measure nothing; table and plot of these")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """The rows to measure, and whether the cost of a publish is among them.

    :raises CannotRun: for a name that does not exist.
    """
    every = [*(QUICK if options.quick else [row.name for row in ROWS]), COST]
    names = every if options.rows is None else options.rows.split(",")
    # In a minute there is no time for the variants.
    every_server = [one for one in SERVERS if not (options.quick and one.endswith("*"))]
    servers = every_server if options.servers is None else options.servers.split(",")
    if unknown := {*servers} - {*SERVERS} | {*names} - {row.name for row in ROWS} - {COST}:
        raise CannotRun(f"there is no {', '.join(sorted(unknown))}; see --help")
    if options.subscribers:
        title = f"{options.subscribers} subscribers x {options.rate:g} events/s"
        shape = Shape(options.subscribers, options.rate, options.sessions)
        return [Row("own", title, shape, tuple(servers))], False
    rows = [row for row in ROWS if row.name in names]
    kept = [
        Row(row.name, row.title, row.shape, tuple(one for one in row.servers if one in servers), row.goals, row.figure)
        for row in rows
    ]
    return [row for row in kept if row.servers], COST in names and OURS in servers


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that are compared with each other together, so that their rounds alternate."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        others = [goal.other_row for goal in row.goals if goal.other_row and not goal.plus]
        group = next((found[name] for name in others if name in found), [])
        group.append(row)
        found[row.name] = group
    return list({id(group): group for group in found.values()}.values())


def publish_cost(results: Results, rounds: int) -> None:
    server_cpu, _ = two_cores()
    environment = {} if server_cpu is None else {"BENCH_SERVER_CPU": str(server_cpu)}
    command = [sys.executable, str(HERE / "servers/publish_cost.py"), str(rounds)]
    with Child("the cost of a publish", command, environment) as child:
        results.publish_cost = child.hear(60 + 5 * rounds)


def cost_table(results: Results) -> list[str]:
    cost = {name: median(values) for name, values in results.publish_cost.items()}
    above = cost["publish_nowait"] - cost["encode"]
    reached = "aim" if above <= 3 else "reached" if above <= 5 else "nearly" if above <= 5.25 else "MISSED"
    lines = ["A publish with no subscriber and no plugin, microseconds"]
    lines += [f"  {name:14}{cost[name]:>13.2f}{spread(values):>13}" for name, values in results.publish_cost.items()]
    return [*lines, f"  {reached:8} publish_nowait above its JSON: {above:.2f} (at most 5, aim 3)"]


def run(options: argparse.Namespace) -> int:
    rows, cost = chosen(options)
    rounds = options.rounds or (1 if options.quick else 5)
    seconds = options.seconds or (1.0 if options.quick else 4.0)
    compile_all()
    most = max([row.shape.subscribers for row in rows], default=0)
    complaint = raise_file_limit(most + 500)
    if complaint:
        print(f"note: {complaint}", file=sys.stderr)
    machine = description()
    server_cpu, load_cpu = two_cores()
    if server_cpu is None:
        print("note: one core only; server and load client share it", file=sys.stderr)
    else:
        os.sched_setaffinity(0, {load_cpu or 0})
    print(f"{machine}; server on core {server_cpu}, load on core {load_cpu}")
    print(f"events of 300 bytes, {seconds:g} s a measurement, median of {rounds}, servers interleaved\n", flush=True)
    results = Results()
    progress = Progress(rounds * sum(len(row.servers) for row in rows))
    stolen_before, ticks_before = stolen()
    for group in groups(rows):
        for number in range(rounds):
            for row in group:
                for server in row.servers:
                    progress.next(f"{row.title}: round {number + 1} of {rounds}, {server}")
                    measure_cell(results, row, server, seconds)
        progress.clear()
        for row in group:
            print("\n".join(table(row, results)), end="\n\n", flush=True)
    if cost:
        try:
            publish_cost(results, rounds)
            print("\n".join(cost_table(results)), end="\n\n", flush=True)
        except Unavailable as error:
            results.unavailable[COST] = str(error)
    configurations(results)
    stolen_after, ticks_after = stolen()
    share = (stolen_after - stolen_before) / max(ticks_after - ticks_before, 1)
    print(f"taken by other guests of this host meanwhile: {share * 100:.1f} % of the time")
    write(options, results, rounds, seconds)
    # A peer that is not installed is said in its line; anything else should have run.
    optional = (NCHAN, OPENCODE)
    failed = {name: why for name, why in results.unavailable.items() if name not in optional or "apt-get" not in why}
    for server, why in failed.items():
        print(f"could not run {server}: {why}", file=sys.stderr)
    return 1 if failed else 0


def measure_cell(results: Results, row: Row, server: str, seconds: float) -> None:
    name = f"{OURS} in row {row.name}" if server == OURS else server
    if name in results.unavailable:
        return
    begun = time.monotonic()
    try:
        results.add(row, server, measure(server, row.shape, seconds))
    except Unavailable as error:
        results.unavailable[name] = str(error)
    results.took[row.name] = results.took.get(row.name, 0.0) + time.monotonic() - begun


class Progress:
    """What is going on, and how long it may take: in place on a terminal, else a line each.

    :param cells: how many measurements there will be.
    """

    def __init__(self, cells: int) -> None:
        self._cells = cells
        self._done = 0
        self._begun = time.monotonic()
        self._in_place = sys.stderr.isatty()

    def next(self, text: str) -> None:
        took = time.monotonic() - self._begun
        left = f", about {took / self._done * (self._cells - self._done) / 60:.1f} min left" if self._done else ""
        self._done += 1
        line = f"[{self._done}/{self._cells}{left}] {text}"
        print(f"\r\033[K{line}" if self._in_place else f"{line}\n", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def configurations(results: Results) -> None:
    about = {server: rounds[0].about for row in results.found.values() for server, rounds in row.items()}
    print("\n".join(f"{server}: {text}" for server, text in about.items()))


def write(options: argparse.Namespace, results: Results, rounds: int, seconds: float) -> None:
    """The measurements and the plot."""
    body = {
        "machine": description(),
        "rounds": rounds,
        "seconds": seconds,
        "rows": {
            name: {server: [asdict(one) for one in found] for server, found in row.items()}
            for name, row in results.found.items()
        },
        "publish_cost_us": results.publish_cost,
        "took_seconds": results.took,
        "unavailable": results.unavailable,
    }
    path: Path = options.json or RESULTS / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
    picture: Path = options.svg or path.with_suffix(".svg")
    picture.write_text(plot(results, f"events of 300 bytes, one core, median of {rounds}; {description()}"))
    print(f"\nwritten: {path}, {picture}")


def read(files: Sequence[Path]) -> tuple[Results, int, float]:
    """What earlier runs wrote, put together: the last one that has a row counts."""
    results, rounds, seconds = Results(), 0, 0.0
    for file in files:
        body = json.loads(file.read_text())
        rounds, seconds = max(rounds, body["rounds"]), max(seconds, body["seconds"])
        results.unavailable |= body["unavailable"]
        results.took |= body.get("took_seconds", {})
        if body["publish_cost_us"]:
            results.publish_cost = body["publish_cost_us"]
        for name, servers in body["rows"].items():
            results.found[name] = {server: [Measurement(**one) for one in found] for server, found in servers.items()}
    return results, rounds, seconds


def show(options: argparse.Namespace) -> int:
    """Table and plot of what was measured before."""
    results, rounds, seconds = read(getattr(options, "from"))
    for row in ROWS:
        if row.name in results.found:
            print("\n".join(table(row, results)), end="\n\n")
    if results.publish_cost:
        print("\n".join(cost_table(results)), end="\n\n")
    configurations(results)
    write(options, results, rounds, seconds)
    return 0


if __name__ == "__main__":
    try:
        given = arguments()
        sys.exit(show(given) if getattr(given, "from") else run(given))
    except CannotRun as error:
        sys.exit(f"the benchmark cannot run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
