"""The rows of the table: what is measured, for whom, and what it is to reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from cells import Shape

Metric = Literal["per_cpu_second", "cpu_us_per_event", "delivered", "p50_ms", "p99_ms", "idle_kb"]

#: Measured, but nothing to be reached.
Extra = Literal["busy", "together"]


@dataclass(frozen=True)
class Goal:
    """What ours is to reach: ``least`` and ``aim`` are multiples of a peer's figure, or figures where there is none.

    :param peer: whose; ``ROW:SERVER`` is another row's. :param more: whether more is better. :param plus: added to the
        peer's figure, instead of multiplying it.
    """

    metric: Metric
    peer: str | None
    least: float
    aim: float | None = None
    more: bool = True
    plus: bool = False


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
SSE: Final = "sse-starlette"
FASTAPI: Final = "fastapi.sse"
NCHAN: Final = "nginx+nchan"
LOOP: Final = "write() loop"

ROWS: Final = (
    # No goal, but the cost of one wake-up: so slow that nothing can be joined.
    Row("20", "1000 subscribers x 20 events/s", Shape(1000, 20), (OURS, SSE, NCHAN, LOOP)),
    Row(
        "100",
        "1000 subscribers x 100 events/s",
        Shape(1000, 100),
        (OURS, SSE, FASTAPI, NCHAN, LOOP),
        (
            Goal("per_cpu_second", SSE, 2.5, 5),
            Goal("per_cpu_second", NCHAN, 1.15, 1.4),
            Goal("per_cpu_second", LOOP, 0.55, 0.7),
            Goal("per_cpu_second", FASTAPI, 15, 20),
            Goal("p50_ms", NCHAN, 1.5, 1, more=False),
            Goal("p99_ms", NCHAN, 1.5, 1, more=False),
            Goal("idle_kb", NCHAN, 1, more=False),
            Goal("idle_kb", None, 10, more=False),
        ),
    ),
    Row(
        "1000",
        "1000 subscribers x 1000 events/s",
        Shape(1000, 1000),
        (OURS, NCHAN, LOOP),
        (
            Goal("per_cpu_second", NCHAN, 5, 7),
            Goal("per_cpu_second", LOOP, 0.8, 1),
            Goal("delivered", None, 1),
            Goal("p99_ms", f"100:{NCHAN}", 20, more=False, plus=True),
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
        Shape(1000, 1000, sessions=True),
        (OURS, NCHAN),
        (Goal("cpu_us_per_event", None, 20, 12, more=False), Goal("delivered", None, 1)),
        figure="cpu_us_per_event",
    ),
    Row(
        "filtered-10k",
        "10 000 subscribers, each its own session, 1000 events/s over all",
        Shape(10_000, 1000, sessions=True),
        (OURS, NCHAN),
        (
            Goal("cpu_us_per_event", None, 20, 12, more=False),
            Goal("cpu_us_per_event", f"filtered-1k:{OURS}", 1.1, more=False),
            Goal("delivered", None, 1),
        ),
        figure="cpu_us_per_event",
    ),
)
