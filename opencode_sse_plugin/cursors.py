"""Whether a cursor can be served, and how it is told when not. Pure functions of a start and a store's bounds."""

from __future__ import annotations

from typing import Any

from . import frames
from .events import Cursor
from .stores import Bounds
from .subscriber import Start


def refusal(start: Start, bounds: Bounds, *, replay: bool) -> str | None:
    """The reason why a stream cannot begin where it asks to, or ``None`` if it can."""
    cursor = start.cursor
    if cursor is None:
        return "malformed"
    if not replay:
        return "disabled"
    if cursor.epoch is not None:
        end = bounds.end_of(cursor.epoch)
        if end is None or (cursor.seq > end and cursor.epoch != bounds.epoch):
            return "epoch"
    if cursor.seq > bounds.latest:
        return "ahead"
    # Equal to oldest - 1 is fine: the oldest event is the next one.
    return "evicted" if cursor.seq < bounds.oldest - 1 else None


def expired(start: Start, bounds: Bounds, reason: str) -> dict[str, Any]:
    """Properties of ``server.stream.expired`` at the beginning of a stream."""
    cursor = start.cursor
    disabled = reason == "disabled"
    return frames.expired(
        next=-1 if cursor is None else cursor.seq,
        oldest=0 if disabled else bounds.oldest,
        latest=0 if disabled else bounds.latest,
        reason=reason,
        requested=(start.requested or "") if cursor is None else str(cursor),
        epoch=bounds.epoch,
    )


def expired_at(epoch: str, position: int, bounds: Bounds, reason: str) -> dict[str, Any]:
    """Properties of ``server.stream.expired`` in mid-stream, at a position told under an epoch."""
    return frames.expired(
        next=position,
        oldest=bounds.oldest,
        latest=bounds.latest,
        reason=reason,
        requested=str(Cursor(epoch, position)),
        epoch=bounds.epoch,
    )


def nothing_after(cursor: Cursor, bounds: Bounds) -> bool:
    """Whether a cursor is at the head or beyond it, in this history."""
    return cursor.seq >= bounds.latest and (cursor.epoch is None or cursor.epoch == bounds.epoch)
