"""What the guarantees mean, as pure functions over what a client received."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from opencode_sse_plugin import Cursor, Event, Filter

#: epoch → sequence number → event
Histories = dict[str, dict[int, Event]]


@dataclass
class Received:
    """One frame as a client read it."""

    id: str | None
    data: dict[str, Any]

    @property
    def type(self) -> str:
        kind: str = self.data["type"]
        return kind


@dataclass
class Verdict:
    """What a connection gave: event ids in order, and what it was told to be lost."""

    events: list[str] = field(default_factory=list)
    #: (epoch, after, last): everything beyond ``after`` up to ``last`` was reported lost.
    lost: list[tuple[str, int, int]] = field(default_factory=list)
    #: The last ``id:``; where a resume goes on.
    cursor: Cursor | None = None
    #: Where the account began.
    start: Cursor | None = None
    reconnect: bool = False
    #: (epoch, seq) of what was folded into something later.
    folded: set[tuple[str, int]] = field(default_factory=set)
    lagged: int = 0
    dropped: int = 0
    ended: bool = False


#: What may be folded away: superseded or joined to a neighbour.
FOLDABLE = ("message.part.delta", "message.updated")


def judge(
    frames: list[Received],
    filter: Filter,
    histories: Histories,
    *,
    sees_global: bool,
    may_fold: bool = False,
) -> Verdict:
    """Check Ordered, Unique and Honest for one connection, frame by frame."""
    verdict = Verdict()
    position: int | None = None
    epoch = ""

    def between(after: int, last: int) -> list[Event]:
        history = histories[epoch]
        return [
            history[seq]
            for seq in range(after + 1, last + 1)
            if seq in history and filter.matches(history[seq]) and (sees_global or history[seq].scope == "instance")
        ]

    def advance(to: int) -> None:
        nonlocal position
        assert position is not None
        missing = [event.id for event in between(position, to) if not (may_fold and event.type in FOLDABLE)]
        verdict.folded.update((epoch, seq) for seq in range(position + 1, to + 1) if may_fold)
        assert not missing, f"skipped silently between {position} and {to}: {missing} in\n{_shown(frames)}"
        position = to

    for frame in frames:
        assert not verdict.ended, f"a frame after the last one: {frame}"
        cursor = Cursor.parse(frame.id) if frame.id is not None else None
        assert (cursor is None) == (frame.id is None), f"malformed id {frame.id}"
        if cursor is not None:
            assert cursor.epoch is not None
            epoch = cursor.epoch
            verdict.cursor = cursor
        properties = frame.data.get("properties", {})
        if frame.type == "server.connected":
            assert position is None, "connected twice"
            position = cursor.seq if cursor is not None else None
            verdict.start = verdict.start or cursor
        elif frame.type == "server.heartbeat":
            assert cursor is not None
            if position is None:
                position = cursor.seq
                verdict.start = verdict.start or cursor
            advance(cursor.seq)
        elif frame.type == "server.stream.expired":
            # Where the number means nothing in this history, everything in it may be new to the client.
            told = Cursor.parse(properties["requested"])
            known = properties["reason"] == "evicted" or (
                # Nobody looked whether the number still means what it meant.
                properties["reason"] == "disabled" and (told is None or told.epoch == properties["epoch"])
            )
            after = properties["next"] if known else 0
            if told is not None and told.epoch in histories:
                verdict.lost.append((told.epoch or "", properties["next"], 2**53))
            verdict.lost.append((properties["epoch"], after, properties["latest"] if cursor is None else cursor.seq))
            epoch = properties["epoch"]
            position = properties["latest"] if cursor is None else cursor.seq
            verdict.start = verdict.start or Cursor(epoch, position)
        elif frame.type == "server.stream.lagged":
            assert position is not None
            last_cursor = Cursor.parse(properties["lastCursor"])
            assert last_cursor is not None
            assert last_cursor.epoch is not None
            epoch = last_cursor.epoch
            assert position <= last_cursor.seq < properties["first"]
            advance(properties["first"] - 1)
            gone = between(position, properties["last"])
            if properties["dropped"] == -1:
                # Retention took it while the subscriber read from the store: nobody counted.
                assert properties["exceeded"] == "retention"
            elif may_fold:
                told = Counter(properties["byType"])
                kept = Counter(event.type for event in gone) - told
                assert told <= Counter(event.type for event in gone)
                assert kept.keys() <= set(FOLDABLE)
                assert properties["dropped"] == told.total() > 0
            else:
                assert properties["dropped"] == len(gone) > 0, (properties, gone)
                assert properties["byType"] == dict(Counter(event.type for event in gone))
            verdict.lost.append((epoch, position, properties["last"]))
            verdict.lagged += 1
            verdict.dropped += max(properties["dropped"], 0)
            position = properties["last"]
            if properties["action"] == "reconnect":
                verdict.reconnect = verdict.ended = True
                verdict.lost.pop()  # It resumes over these.
        elif frame.type == "server.stream.draining":
            assert cursor is None
            verdict.ended = True
        else:
            assert cursor is not None, f"an event without a cursor: {frame}"
            assert position is not None
            event = histories[epoch][cursor.seq]
            assert event.id == frame.data["id"], f"{cursor} means {event.id}, got {frame.data['id']}"
            assert cursor.seq > position, f"out of order or twice: {cursor} after {position}"
            assert filter.matches(event)
            advance(cursor.seq - 1)
            position = cursor.seq
            verdict.events.append(event.id)
    return verdict


def _shown(frames: list[Received]) -> str:
    return "\n".join(
        f"  {frame.id or '-':20} {frame.type} {frame.data.get('properties') if frame.type.startswith('server') else ''}"
        for frame in frames
    )
