"""Names that nobody else has: event ids and epochs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

_BASE62: Final = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TO_BASE62: Final = bytes(_BASE62[i % 62] for i in range(256))
_UNEVEN: Final = bytes(range(248, 256))
_BYTES: Final = tuple(f"{i:02x}" for i in range(256))
#: Random letters for ids, in blocks: a system call for each would cost more than the rest of a publish. Threads share
#: them, since a list is popped by one at a time; a forked child does not go on with its parent's.
_at_hand: Final[list[str]] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_at_hand.clear)


def event_ids(now: Callable[[], int] = time.time_ns) -> Callable[[], str]:
    """What makes opencode's ids: ``evt_`` + 12 hex of (ms * 4096 + counter) mod 2^48 + 14 base62; for one thread.

    Ids are names, not an order.

    :param now: nanoseconds since 1970.
    """
    high = low = until = 0
    head = ""

    def new_id() -> str:  # A closure, whose variables are cheaper than an object's.
        nonlocal high, low, until, head
        at = now()
        if at < until and low < 255:
            low += 1
        else:  # What stands before the last byte stays for a millisecond, as a rule.
            high, low = high + 1 if at < until else at // 1_000_000 << 4, 0
            until = ((high >> 4) + 1) * 1_000_000
            head = "evt_%010x" % (high & 0xFFFFFFFFFF)
        try:
            return f"{head}{_BYTES[low]}{_at_hand.pop()}"
        except IndexError:
            return f"{head}{_BYTES[low]}{_more()}"

    return new_id


def _more() -> str:
    """Get more letters for ids; those of one."""
    letters = _letters(4096)
    first, *others = [letters[at : at + 14] for at in range(0, len(letters) - 13, 14)]
    _at_hand.extend(others)
    return first


def new_epoch() -> str:
    """A fresh epoch: 12 letters, short enough to stand in every frame."""
    return _letters(24)[:12]


def _letters(count: int) -> str:
    """Random letters, a few less than there are bytes."""
    return os.urandom(count).translate(_TO_BASE62, _UNEVEN).decode("ascii")
