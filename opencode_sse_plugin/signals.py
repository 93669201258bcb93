"""Draining on SIGTERM. Servers run the lifespan's shutdown only after all streams ended, so with an open stream uvicorn
and granian would wait for ever; the signal itself is the only moment early enough."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from .wakeup import thread_safe_call_soon

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any]


class _Link:
    """One handler in the chain of one signal. It may end before those that were put around it."""

    def __init__(self, callback: Callable[[], None], previous: Handler) -> None:
        self._call_soon = thread_safe_call_soon()
        self._callback = callback
        self.previous = previous
        self.active = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.active:
            self._call_soon(self._callback)
        self.previous(number, frame)


@contextmanager
def chained_signals(callback: Callable[[], None]) -> Iterator[None]:
    """Call back on the event loop when a termination signal comes, before the server's own handler runs.

    Only on the main thread and only where a handler is installed already: replacing one that is not callable hung
    hypercorn. Handlers are put back at the end.
    """
    links: dict[signal.Signals, _Link] = {}
    if threading.current_thread() is threading.main_thread():
        for which in _SIGNALS:
            handler = signal.getsignal(which)
            if callable(handler):
                links[which] = _Link(callback, handler)
                signal.signal(which, links[which])
    try:
        yield
    finally:
        for which, link in links.items():
            link.active = False
            now = before = signal.getsignal(which)
            while isinstance(before, _Link) and not before.active:
                before = before.previous
            if before is not now:
                signal.signal(which, before)
