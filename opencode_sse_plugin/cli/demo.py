"""A recorded opencode trace, played for ever: what ``opencode-sse serve --demo`` publishes.

A trace is JSON Lines, plain or compressed (``.gz``, ``.xz``): ``{"t": seconds since the start, "data": envelope}``,
where the envelope is a frame of ``/event`` or ``/global/event``. Each round has fresh ids, or the second one would be
known already.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import anyio

from ..bus import EventBus
from ..encoding import decode
from ..errors import ConfigurationError, InvalidEvent, StoreUnavailable
from ..events import Event, check_event
from .lines import event_of

#: Between two rounds, in recorded seconds.
PAUSE: Final = 2.0
_BATCH: Final = 100
_ID: Final = re.compile(r"\b((?:evt|ses|msg|prt|call|tool)_[0-9A-Za-z]{8,})([0-9A-Za-z]{6})\b")
_OPEN: Final[dict[str, Callable[..., Any]]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a trace: when, in seconds, and the frame's JSON."""

    at: float
    text: str


def shipped() -> Path:
    """The trace in the package: 10 seconds of opencode 1.18."""
    return Path(str(files(__package__))) / "trace.jsonl.xz"


def read_trace(path: Path) -> list[Recorded]:
    """Read and check a whole trace, so that nothing is found wrong half way.

    :raises ConfigurationError: naming file, line, and what would be right.
    """
    try:
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8", newline="\n") as lines:
            trace = [_recorded(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    if not trace:
        raise ConfigurationError(f"{path}: there is no event in it")
    return sorted(trace, key=lambda recorded: recorded.at)


def _recorded(path: Path, number: int, line: str) -> Recorded:
    try:
        value = decode(line)
        if not isinstance(value, dict) or not isinstance(value.get("data"), dict):
            raise ValueError('a line is {"t": seconds, "data": {"type": …, "properties": …}}')
        at = value.get("t")
        if not isinstance(at, int | float) or isinstance(at, bool) or at < 0:
            raise ValueError(f"t must be seconds since the start, not {at!r}")
        check_event(event_of(value["data"]))
    except (ValueError, InvalidEvent, RecursionError) as error:
        raise ConfigurationError(f"{path}:{number}: {error}") from error
    return Recorded(at, json.dumps(value["data"], ensure_ascii=False))


def one_round(trace: list[Recorded]) -> Iterator[tuple[float, Event]]:
    """The events of one round with ids that no other round has; equal ids stay equal."""
    token = "".join(random.choices("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", k=6))
    for recorded in trace:
        yield recorded.at, event_of(json.loads(_ID.sub(rf"\g<1>{token}", recorded.text)))


async def play(bus: EventBus, trace: list[Recorded], rate: float = 1.0) -> None:
    """Publish a trace again and again, until cancelled or the bus drains.

    :param rate: how many recorded seconds pass in one.
    """
    length = trace[-1].at + PAUSE
    begin = anyio.current_time()
    while bus.running:
        due: list[Event] = []
        for at, event in one_round(trace):
            wait = begin + at / rate - anyio.current_time()
            if wait > 0 or len(due) >= _BATCH:
                await _publish(bus, due)
                due = []
                await anyio.sleep(max(wait, 0))
            due.append(event)
        await _publish(bus, due)
        begin = max(begin + length / rate, anyio.current_time() - length / rate)
        await anyio.sleep(max(0.0, begin - anyio.current_time()))


async def _publish(bus: EventBus, events: list[Event]) -> None:
    if events and bus.running:
        try:
            await bus.publish_batch(events)
        except StoreUnavailable:
            await anyio.sleep(1)  # The store says so in the log; the trace goes on.
