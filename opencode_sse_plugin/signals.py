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


@contextmanager
def chained_signals(callback: Callable[[], None]) -> Iterator[None]:
    """Call back on the event loop when a termination signal comes, before the server's own handler runs.

    Only on the main thread and only where a handler is installed already: replacing one that is not callable hung
    hypercorn. Handlers are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    call_soon = thread_safe_call_soon()
    previous: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        call_soon(callback)
        previous[signal.Signals(number)](number, frame)

    for which in _SIGNALS:
        handler = signal.getsignal(which)
        if callable(handler):
            previous[which] = handler
            signal.signal(which, handle)
    try:
        yield
    finally:
        for which, before in previous.items():
            if signal.getsignal(which) is handle:
                signal.signal(which, before)
