"""Draining on SIGTERM. Servers run the lifespan's shutdown only after all streams ended, so with an open stream uvicorn
and granian would wait for ever; the signal itself is the only moment early enough. Where nobody handles SIGTERM
(hypercorn on trio, its worker processes) the process drains and then dies of it, as it would have."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Final

from .wakeup import thread_safe_call_soon

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
Handler = Callable[[int, FrameType | None], Any]
#: What is called on the event loop; with what to do once that is done, if there is anything.
Callback = Callable[..., None]


class _Link:
    """One handler in the chain of one signal. It may end before those that were put around it."""

    def __init__(self, callback: Callback, previous: Handler | None) -> None:
        self._call_soon = thread_safe_call_soon()
        self._callback = callback
        self.previous = previous
        self.active = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        then = () if self.previous is not None else (partial(_die_of, number),)
        if self.active:
            self._call_soon(partial(self._callback, *then))
        if self.previous is not None:
            self.previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)  # The second one is not to be waited for.
            if not self.active:
                _die_of(number)


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def chained_signals(callback: Callback) -> Iterator[None]:
    """Call back on the event loop when a termination signal comes, before the server's own handler runs.

    Where the signal would kill the process, the callback is given what does that, to be called once it is done: whoever
    swallows the signal keeps the process alive (measured: hypercorn). Only on the main thread; a signal that is ignored
    is left alone. Handlers are put back at the end.
    """
    links: dict[signal.Signals, _Link] = {}
    if threading.current_thread() is threading.main_thread():
        for which in _SIGNALS:
            handler = signal.getsignal(which)
            if callable(handler) or handler is signal.SIG_DFL:
                links[which] = _Link(callback, handler if callable(handler) else None)
                signal.signal(which, links[which])
    try:
        yield
    finally:
        for which, link in links.items():
            link.active = False
            now = before = signal.getsignal(which)
            while isinstance(before, _Link) and not before.active:
                before = before.previous or signal.SIG_DFL
            if before is not now:
                signal.signal(which, before)
