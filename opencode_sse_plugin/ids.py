"""Names that nobody else has: event ids and epochs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

_BASE62: Final = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TO_BASE62: Final = bytes(_BASE62[i % 62] for i in range(256))
_UNEVEN: Final = bytes(range(248, 256))
#: How many forks lie between this process and the first one: a child must not go on with its parent's letters, and
#: asking for the process id at every event is a system call.
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def event_ids(now: Callable[[], int] = time.time_ns) -> Callable[[], str]:
    """What makes opencode's ids: ``evt_`` + 12 hex of (ms * 4096 + counter) mod 2^48 + 14 base62; for one thread.

    Ids are names, not an order. Random letters come in blocks, since one system call an id would cost more than the
    rest of a publish.

    :param now: nanoseconds since 1970.
    """
    last = at = 0
    pool, forks = "", _forks

    def new_id() -> str:  # A closure, whose variables are cheaper than an object's.
        nonlocal last, at, pool, forks
        stamp = now() // 1_000_000 << 12
        if stamp <= last:
            stamp = last + 1
        last = stamp
        after = at + 14
        if after > len(pool) or forks != _forks:
            pool, forks = _letters(4096), _forks
            after = 14
        at = after
        return "evt_%012x%s" % (stamp & 0xFFFFFFFFFFFF, pool[after - 14 : after])  # noqa: UP031 - faster than f""

    return new_id


def new_epoch() -> str:
    """A fresh epoch: 12 letters, short enough to stand in every frame."""
    return _letters(24)[:12]


def _letters(count: int) -> str:
    """Random letters, a few less than there are bytes."""
    return os.urandom(count).translate(_TO_BASE62, _UNEVEN).decode("ascii")
