"""The rows of the table: what is measured, for whom, and what it is to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cells import Shape

Metric = Literal[
    "per_cpu_second",
    "cpu_us_per_event",
    "mb_per_cpu_second",
    "delivered",
    "p50_ms",
    "p99_ms",
    "p99_times",
    "idle_kb",
    "turn_ms",
]

#: Measured, but nothing to be reached.
Extra = Literal["busy", "together"]


@dataclass(frozen=True)
class Goal:
    """What ours is to reach: ``least`` and ``aim`` are multiples of a peer's figure, or figures where there is none.

    :param peer: whose; ``ROW:SERVER`` is another row's. :param more: whether more is better. :param plus: added to the
        peer's figure, instead of multiplying it. :param ours: which of ours.
    """

    metric: Metric
    peer: str | None
    least: float
    aim: float | None = None
    more: bool = True
    plus: bool = False
    ours: str = "ours"

    @property
    def other_row(self) -> str:
        """The row of the peer, where it is another one."""
        return (self.peer or "").rpartition(":")[0]


@dataclass(frozen=True)
class Row:
    """:param figure: the metric of the first column."""

    name: str
    title: str
    shape: Shape
    servers: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    figure: Metric = "per_cpu_second"


OURS: Final = "ours"
#: The same, told to wake everyone at once rather than to join events.
OURS_AT_ONCE: Final = "ours*"
SSE: Final = "sse-starlette"
#: The same as its documentation shows it; the first is its best configuration.
SSE_EVENTS: Final = "sse-starlette*"
FASTAPI: Final = "fastapi.sse"
NCHAN: Final = "nginx+nchan"
#: What Python itself takes, without a server, a log or anybody who may be slow.
BARE: Final = "bare uvloop"
LOOP: Final = "write() loop"
OPENCODE: Final = "opencode"

#: By default a log of 10 000 events makes each of 10 000 quiet readers need a bookmark every 2.5 s at this rate, four
#: for every event. Whoever has so many sessions keeps more.
_LONG_LOG: Final = "retain_events=200000"
POLICIES: Final = ("disconnect", "drop-oldest", "drop-newest", "coalesce", "shed", "catch-up", "block")
_NOBODY_STALLED: Final = "stalled-none"


def _stalled(policy: str) -> Row:
    goal = Goal("per_cpu_second", f"{_NOBODY_STALLED}:{OURS}", 0.9, 0.97)
    title = f"1000 subscribers x 1000 events/s, 5 % of them stalled under {policy}"
    return Row(f"stalled-{policy}", title, Shape(1000, 1000, kind="stalled", policy=policy), (OURS,), (goal,))


ROWS: Final = (
    # No goal, but the cost of one wake-up: so slow that nothing can be joined.
    Row("20", "1000 subscribers x 20 events/s", Shape(1000, 20), (OURS, SSE, NCHAN, LOOP)),
    Row(
        "100",
        "1000 subscribers x 100 events/s",
        Shape(1000, 100),
        (OURS, OURS_AT_ONCE, SSE, SSE_EVENTS, FASTAPI, NCHAN, LOOP),
        (
            Goal("per_cpu_second", SSE, 4, 5),
            Goal("per_cpu_second", SSE_EVENTS, 2.5, 5),
            Goal("per_cpu_second", NCHAN, 1.15, 1.4),
            Goal("per_cpu_second", LOOP, 0.55, 0.7),
            Goal("per_cpu_second", FASTAPI, 15, 20),
            Goal("p50_ms", NCHAN, 1.5, 1, more=False),
            Goal("p99_ms", NCHAN, 1.5, 1, more=False),
            Goal("p50_ms", NCHAN, 1.5, 1, more=False, ours=OURS_AT_ONCE),
            Goal("p99_ms", NCHAN, 1.5, 1, more=False, ours=OURS_AT_ONCE),
            Goal("idle_kb", NCHAN, 1, more=False),
            Goal("idle_kb", None, 10, more=False),
        ),
    ),
    Row(
        "1000",
        "1000 subscribers x 1000 events/s",
        Shape(1000, 1000, turns=True),
        (OURS, NCHAN, LOOP),
        (
            Goal("per_cpu_second", NCHAN, 5, 7),
            Goal("per_cpu_second", LOOP, 0.8, 1),
            Goal("delivered", None, 1),
            Goal("p99_ms", f"100:{NCHAN}", 20, more=False, plus=True),
            Goal("turn_ms", None, 10, 3, more=False),
        ),
    ),
    Row(
        "5000",
        "1000 subscribers x 5000 events/s",
        Shape(1000, 5000),
        (OURS, NCHAN, LOOP),
        (Goal("per_cpu_second", NCHAN, 15, 22), Goal("per_cpu_second", LOOP, 0.5, 0.8)),
    ),
    Row(
        "10k",
        "10 000 subscribers x 10 events/s",
        Shape(10_000, 10),
        (OURS, NCHAN, LOOP),
        (
            Goal("delivered", None, 1),
            Goal("p99_ms", NCHAN, 1.5, 1, more=False),
            Goal("idle_kb", NCHAN, 1, more=False),
            Goal("idle_kb", None, 10, more=False),
        ),
    ),
    Row(
        "filtered-1k",
        "1000 subscribers, each its own session, 1000 events/s over all",
        Shape(1000, 1000, sessions=True, settings=_LONG_LOG),
        (OURS, NCHAN, BARE, LOOP),
        (Goal("cpu_us_per_event", None, 20, 12, more=False), Goal("delivered", None, 1)),
        figure="cpu_us_per_event",
    ),
    Row(
        "filtered-10k",
        "10 000 subscribers, each its own session, 1000 events/s over all",
        Shape(10_000, 1000, sessions=True, settings=_LONG_LOG),
        (OURS, NCHAN, BARE, LOOP),
        (
            Goal("cpu_us_per_event", None, 20, 12, more=False),
            Goal("cpu_us_per_event", f"filtered-1k:{OURS}", 1.1, more=False),
            Goal("delivered", None, 1),
        ),
        figure="cpu_us_per_event",
    ),
    Row(
        "replay",
        "100 subscribers replaying 100 000 events each beside 100 live ones x 100 events/s",
        Shape(100, 100, kind="replay"),
        (OURS, LOOP),
        (
            Goal("p99_times", None, 2, 1.2, more=False),
            Goal("mb_per_cpu_second", LOOP, 0.4, 0.7),
            Goal("delivered", None, 1),
        ),
        figure="mb_per_cpu_second",
    ),
    Row(_NOBODY_STALLED, "1000 subscribers x 1000 events/s, none stalled", Shape(1000, 1000, kind="stalled"), (OURS,)),
    *[_stalled(policy) for policy in POLICIES],
    Row(
        "trace",
        "500 subscribers, a recorded opencode trace at 10 x its speed (opencode: its own answers to prompts)",
        Shape(500, 1, kind="trace"),
        (OURS, OPENCODE),
        (Goal("per_cpu_second", OPENCODE, 2.5, 4),),
    ),
)
