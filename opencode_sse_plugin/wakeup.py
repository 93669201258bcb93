"""How a publish wakes those who wait: one turn of the event loop takes all that has come.

asyncio gets bare futures, which cost a tenth of an ``anyio.Event``; any other loop gets the event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio


class Bell(Protocol):
    """A place to wait without a coroutine that would be kept meanwhile. ``wake`` before ``woken`` is not lost."""

    def wake(self) -> None: ...
    def woken(self) -> Awaitable[object]: ...


class AsyncioBell:
    """A bell of asyncio's; others derive from it what rings it."""

    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    def wake(self) -> None:
        future = self._future
        if future is None or future.done():
            self._woken = True
        else:
            future.set_result(None)

    def woken(self) -> Awaitable[object]:
        self._future = future = self._loop.create_future()
        if self._woken:
            self._woken = False
            future.set_result(None)
        return future


class _EventBell:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def wake(self) -> None:
        self._event.set()

    async def woken(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


def on_asyncio() -> bool:
    """Whether the running event loop is asyncio's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def bells() -> Callable[[], Bell]:
    """What makes bells for the running event loop, which is asked for once: on Python 3.11 that is a system call."""
    return partial(AsyncioBell, asyncio.get_running_loop()) if on_asyncio() else _EventBell


def new_bell() -> Bell:
    """A bell for the running event loop."""
    return bells()()


def call_soon() -> Callable[[Callable[[], None]], Any]:
    """What calls a function in a later turn of the running event loop, behind the turns of all who are woken now."""
    if on_asyncio():
        return asyncio.get_running_loop().call_soon
    import trio

    soon = trio.lowlevel.current_trio_token().run_sync_soon
    # In the turn after the next: within one, trio runs what is ready in no particular order.
    return lambda callback: soon(partial(soon, callback))


def call_later() -> Callable[[float, Callable[[], object]], Any] | None:
    """What calls a function after so many seconds; ``None`` where only a task could."""
    return asyncio.get_running_loop().call_later if on_asyncio() else None


def thread_safe_call_soon() -> Callable[[Callable[[], None]], Any]:
    """What calls a function on the running event loop from a signal handler or another thread."""
    if on_asyncio():
        return asyncio.get_running_loop().call_soon_threadsafe
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon
