"""The overflow policies that ship with the package: each a pure function from a backlog to an outcome."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .events import StoredEvent
from .overflow import (
    Backlog,
    Block,
    Disconnect,
    Lag,
    Merge,
    Outcome,
    OverflowPolicy,
    PolicyRegistry,
    ReadFromStore,
    Skip,
)

#: Payload bytes of deltas that are given as one: what a batch may hold.
_JOINED_BYTES: Final = 64 * 1024
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|)", re.ASCII)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class DisconnectPolicy:
    """Drop the backlog and abort: nothing is lost if the client resumes within retention."""

    name: str = "disconnect"

    def __call__(self, backlog: Backlog) -> Outcome:
        return Disconnect()


@dataclass(frozen=True, slots=True)
class DropOldest:
    """Skip from the oldest on; the newest half of the limits stays."""

    name: str = "drop-oldest"

    def __call__(self, backlog: Backlog) -> Outcome:
        kept = _fitting(reversed(backlog.events), backlog)
        return Skip(((0, len(backlog.events) - kept),))


@dataclass(frozen=True, slots=True)
class DropNewest:
    """Skip the newest; the oldest half of the limits stays."""

    name: str = "drop-newest"

    def __call__(self, backlog: Backlog) -> Outcome:
        kept = _fitting(backlog.events, backlog)
        return Skip(((kept, len(backlog.events)),))


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Read on from the store at the client's pace, then rejoin: nothing is lost within retention, nobody waits."""

    name: str = "catch-up"

    def __call__(self, backlog: Backlog) -> Outcome:
        return ReadFromStore()


@dataclass(frozen=True, slots=True)
class Coalesce:
    """Take away what a later event of the backlog supersedes, then give deltas that are neighbours as one.

    Whoever folds the stream into state ends in the same state, cut after any frame and resumed: what supersedes is
    still ahead, and nothing lies between deltas that are joined.

    :param then: the policy for a backlog that stays too large.
    """

    then: OverflowPolicy = CatchUp()
    name: str = "coalesce"

    def __call__(self, backlog: Backlog) -> Outcome:
        removed = _superseded(backlog)
        replaced: dict[int, StoredEvent] = {}
        left = [index for index in range(len(backlog.events)) if index not in removed]
        for run in _runs(backlog, left):
            replaced[run[-1]] = backlog.join([backlog.events[index] for index in run])
            removed.update(run[:-1])
        rest = [replaced.get(index, backlog.events[index]) for index in left if index not in removed]
        return Merge(replaced, frozenset(removed)) if backlog.fits(rest) else self.then(backlog)


@dataclass(frozen=True, slots=True)
class Shed:
    """Lose what is ``ephemeral``, then take away what is superseded, never what is ``required``; else disconnect."""

    name: str = "shed"

    def __call__(self, backlog: Backlog) -> Outcome:
        ephemeral = {i for i, event in enumerate(backlog.events) if backlog.delivery_class(event) == "ephemeral"}
        skipped = Skip.of(ephemeral)
        rest = [event for index, event in enumerate(backlog.events) if index not in ephemeral]
        if backlog.fits(rest):
            return skipped
        removed = _superseded(backlog) - ephemeral
        rest = [e for index, e in enumerate(backlog.events) if index not in ephemeral and index not in removed]
        return Merge(remove=frozenset(removed), skip=skipped) if backlog.fits(rest) else Disconnect()


@dataclass(frozen=True, slots=True)
class BlockPublishers:
    """Let publishers of this process wait for this subscriber; one that keeps them too long is on ``then``.

    :param timeout: seconds a publish waits at most, over all subscribers.
    """

    timeout: float
    then: str
    name: str = "block"
    blocks: bool = True

    def __call__(self, backlog: Backlog) -> Outcome:
        return Block(self.timeout, self.then)


def builtin_policies(registry: PolicyRegistry) -> None:
    """Register what ships with the package."""

    def other_than(name: str, then: str) -> OverflowPolicy:
        if then.partition("?")[0] == name:
            raise ValueError(f"then={then!r} would ask itself")
        return registry.create(then)

    def coalesce(then: str = "catch-up") -> OverflowPolicy:
        return Coalesce(other_than("coalesce", then))

    def block(timeout: str = "1s", then: str = "disconnect") -> OverflowPolicy:
        other_than("block", then)
        return BlockPublishers(seconds(timeout), then)

    registry.register("disconnect", lambda: DisconnectPolicy())
    registry.register("drop-oldest", lambda: DropOldest())
    registry.register("drop-newest", lambda: DropNewest())
    registry.register("catch-up", lambda: CatchUp())
    registry.register("coalesce", coalesce)
    registry.register("shed", lambda: Shed())
    registry.register("block", block)


def seconds(text: str) -> float:
    """Read a duration: ``2s``, ``500ms``, ``1m``, or a number of seconds.

    :raises ValueError: if it is none, or zero.
    """
    found = _DURATION.fullmatch(text)
    value = float(found[1]) * _UNITS[found[2]] if found is not None else 0.0
    if not value:
        raise ValueError(f"{text!r} is not a duration such as 2s or 500ms")
    return value


def _superseded(backlog: Backlog) -> set[int]:
    """Events that say nothing beyond what a later one of the backlog says about the same thing."""
    settled: set[str] = set()
    superseded: set[int] = set()
    for index in range(len(backlog.events) - 1, -1, -1):
        event = backlog.events[index]
        key = backlog.key(event)
        if key is None:
            continue
        delivery_class = backlog.delivery_class(event)
        if delivery_class != "required" and key in settled:
            superseded.add(index)
        elif delivery_class != "ephemeral":
            settled.add(key)
    return superseded


def _runs(backlog: Backlog, left: list[int]) -> Iterable[list[int]]:
    """Neighbours among these indexes that add up, two or more at a time."""
    run: list[int] = []
    size = 0
    for index in left:
        event = backlog.events[index]
        if run and size + event.size <= _JOINED_BYTES and backlog.adds_up(backlog.events[run[-1]], event):
            run.append(index)
            size += event.size
            continue
        if len(run) > 1:
            yield run
        run, size = [index], event.size
    if len(run) > 1:
        yield run


def _fitting(events: Iterable[StoredEvent], backlog: Backlog) -> int:
    """How many of these events, from the first on, a policy may leave; at least one."""
    half = backlog.limits.half
    count = size = 0
    for event in events:
        size += event.size
        if not half.allow(Lag(count + 1, size)):
            break
        count += 1
    return count
