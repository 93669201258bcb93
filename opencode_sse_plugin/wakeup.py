"""How a publish wakes those who wait: one turn of the event loop takes all that has come.

asyncio gets bare futures, which cost a tenth of an ``anyio.Event``; any other loop gets the event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol

import anyio


class Waiter(Protocol):
    """One subscriber's place to wait. ``wake`` before ``wait`` is not lost."""

    def wake(self) -> None: ...
    async def wait(self) -> None: ...


class _AsyncioWaiter:
    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None
        self._woken = False

    def wake(self) -> None:
        future = self._future
        if future is None:
            self._woken = True
        elif not future.done():
            future.set_result(None)

    async def wait(self) -> None:
        if not self._woken:
            self._future = self._loop.create_future()
            try:
                await self._future
            finally:
                self._future = None
        self._woken = False


class Signal(Protocol):
    """What one task waits for, once: ``await`` it. ``wake`` before that is not lost, and a second one does nothing."""

    def wake(self) -> None: ...
    def __await__(self) -> Generator[Any, None, object]: ...


class _AsyncioSignal:
    __slots__ = ("_future",)

    def __init__(self, new_future: Callable[[], asyncio.Future[None]]) -> None:
        self._future = new_future()

    def wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        return self._future.__await__()  # No frame of ours when the task goes on.


class _EventSignal:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def wake(self) -> None:
        self._event.set()

    def __await__(self) -> Generator[Any, None, None]:
        return self._event.wait().__await__()


class _EventWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


def on_asyncio() -> bool:
    """Whether the running event loop is asyncio's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def signals() -> Callable[[], Signal]:
    """What makes signals for the running event loop, which is asked for once: on Python 3.11 that is a system call."""
    return partial(_AsyncioSignal, asyncio.get_running_loop().create_future) if on_asyncio() else _EventSignal


def new_waiter() -> Waiter:
    """A waiter for the running event loop."""
    return _AsyncioWaiter(asyncio.get_running_loop()) if on_asyncio() else _EventWaiter()


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
