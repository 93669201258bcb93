"""From measurements to a table: medians, spreads, ratios and goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from cells import Measurement
from rows import OURS, Extra, Goal, Metric, Row

#: A server this busy is at its limit. If all arrives all the same, it joins events, and its figure says no more than
#: what was offered: it would be higher at a higher rate.
SATURATED: Final = 0.9
#: Within so much of a goal counts as reached, and is said to be so.
NEARLY: Final = 0.05


@dataclass
class Results:
    """What the rounds have found, by row and server; ``unavailable`` says why a server is not there."""

    found: dict[str, dict[str, list[Measurement]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    #: Microseconds of a publish with no subscriber, and of its JSON alone, by round.
    publish_cost: dict[str, list[float]] = field(default_factory=dict)
    #: Seconds that all rounds of a row have taken.
    took: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row, server: str, measurement: Measurement) -> None:
        self.found.setdefault(row.name, {}).setdefault(server, []).append(measurement)

    def all_of(self, row: str, server: str, metric: Metric | Extra) -> list[float]:
        return [getattr(one, metric) for one in self.found.get(row, {}).get(server, [])]

    def median(self, row: str, server: str, metric: Metric | Extra) -> float | None:
        values = self.all_of(row, server, metric)
        return median(values) if values else None

    def ratio(self, row: str, server: str, metric: Metric, *, other_row: str = "", ours: str = OURS) -> float:
        """Ours to a peer's: the median of the rounds, each with its neighbour in time, since machines drift."""
        pairs = zip(self.all_of(row, ours, metric), self.all_of(other_row or row, server, metric), strict=False)
        return median(one / theirs if theirs else float("inf") for one, theirs in pairs)


def count(number: float) -> str:
    """``123.4 k``."""
    for limit, unit in ((1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.{1 if number < 100 * limit else 0}f}{unit}"
    return f"{number:.1f}"


def spread(values: Sequence[float]) -> str:
    """From the least to the most, in percent of the median."""
    middle = median(values)
    if len(values) < 2 or not middle:
        return "-"
    return f"{(min(values) / middle - 1) * 100:+.0f}..{(max(values) / middle - 1) * 100:+.0f} %"


def table(row: Row, results: Results) -> Iterator[str]:
    """One row as lines of text, a line a server, then its goals."""
    took = f" ({results.took[row.name]:.0f} s)" if row.name in results.took else ""
    yield row.title + took
    unit = {"cpu_us_per_event": "CPU us/event", "mb_per_cpu_second": "MB/CPU-s"}.get(row.figure, "deliv./CPU-s")
    titles = (unit, "spread", "ours/it", "arrived", "core", "ev./read", "p50 ms", "p99 ms", "KB idle")
    yield f"  {'':14}" + "".join(f"{title:>12}" for title in titles)
    ours = results.median(row.name, OURS, row.figure)
    for server in row.servers:
        rounds = results.found.get(row.name, {}).get(server)
        if not rounds:
            yield f"  {server:14}  not measured: {_why(results, row, server)}"
            continue
        figures = results.all_of(row.name, server, row.figure)
        figure, busy = median(figures), median(one.busy for one in rounds)
        cells = [
            count(figure),
            spread(figures),
            "" if server == OURS or not ours else f"{results.ratio(row.name, server, row.figure):.2f}",
            f"{median(one.delivered for one in rounds) * 100:.1f} %",
            f"{busy * 100:.0f} %{'!' if busy >= SATURATED else ' '}",
            f"{median(one.together for one in rounds):.1f}",
            f"{median(one.p50_ms for one in rounds):.2f}",
            f"{median(one.p99_ms for one in rounds):.2f}",
            f"{median(one.idle_kb for one in rounds):.1f}",
        ]
        yield f"  {server:14}" + "".join(f"{cell:>12}" for cell in cells)
        if missing := sum(one.missing for one in rounds):
            lagged = sum(one.lagged for one in rounds)
            yield f"  {'':14}  {missing} events missing or repeated by cursor, {lagged} times a loss was reported"
    busy, arrived = results.median(row.name, OURS, "busy") or 0, results.median(row.name, OURS, "delivered") or 0
    joined = results.median(row.name, OURS, "together")
    if busy >= SATURATED and arrived > 0.99 and joined:
        yield f"  ! at its limit: ours joins {joined:.1f} events a write; its figure is the offered load, not its cost"
    for goal in row.goals:
        yield f"  {verdict(row, goal, results)}"


def _why(results: Results, row: Row, server: str) -> str:
    named = (server, f"{server} in row {row.name}")
    return next((results.unavailable[name] for name in named if name in results.unavailable), "left out")


def verdict(row: Row, goal: Goal, results: Results) -> str:
    """Whether one goal is reached."""
    ours = results.median(row.name, goal.ours, goal.metric)
    name = NAMES[goal.metric] + ("" if goal.ours == OURS else f" of {goal.ours}")
    base, what, other, server = 1.0, "", "", ""
    if goal.peer is not None:
        other, server = goal.other_row, goal.peer.rpartition(":")[2]
        found = results.median(other or row.name, server, goal.metric)
        what = f" {'from that of' if goal.plus else 'x'} {server}" + (f" in row {other}" if other else "")
        if found is None:
            return f"?        {name}: {server} was not measured"
        base = found
    if ours is None:
        return f"?        {name}: ours was not measured"
    if not base:
        return f"?        {name}: no figure of{what}"
    if goal.plus:
        ratio = ours - base
    elif goal.peer is not None:
        ratio = results.ratio(row.name, server, goal.metric, other_row=other, ours=goal.ours)
    else:
        ratio = ours
    shown = f"{ratio:+.1f} ms{what}" if goal.plus else f"{ratio:.3g}{what}"
    aim = "" if goal.aim is None else f", aim {goal.aim:g}"
    bound = "at least" if goal.more else "at most"
    return f"{_reached(ratio, goal):8} {name}: {shown} ({bound} {goal.least:g}{aim})"


def _reached(ratio: float, goal: Goal) -> str:
    if goal.aim is not None and (ratio >= goal.aim if goal.more else ratio <= goal.aim):
        return "aim"
    if ratio >= goal.least if goal.more else ratio <= goal.least:
        return "reached"
    short = 1 - ratio / goal.least if goal.more else ratio / goal.least - 1
    return "nearly" if short <= NEARLY and goal.metric != "delivered" else "MISSED"


NAMES: Final[Mapping[Metric, str]] = {
    "per_cpu_second": "deliveries per CPU-second",
    "cpu_us_per_event": "CPU us an event",
    "delivered": "share that arrived",
    "p50_ms": "latency p50",
    "p99_ms": "latency p99",
    "idle_kb": "KB of an idle subscriber",
    "mb_per_cpu_second": "bytes per CPU-second",
    "p99_times": "latency p99 over that without replays",
    "turn_ms": "thread time of a turn with our wake-up, p99.9 in ms",
}
