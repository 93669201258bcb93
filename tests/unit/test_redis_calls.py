"""How long one call to Redis after another may take: they share a timer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis import exceptions

from opencode_sse_plugin.stores.redis_link import TIMEOUT, KeptConnection

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


#: Nothing is sent.
SCRIPT: Any = None


class Clock:
    """Stands in for the event loop: time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        self.timers.append((when, callback))
        return object()

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, callback in due:
            callback()


class Link:
    """One whose server answers when it is told to, and its pool."""

    def __init__(self) -> None:
        self._pool = self
        self.released = 0
        self.answer: asyncio.Future[list[Any]]

    async def get_connection(self) -> Any:
        return type("Connection", (), {"socket_timeout": TIMEOUT})()

    async def release(self, connection: Any) -> None:
        self.released += 1

    def _command(self, *arguments: Any) -> bytes:
        return b""

    async def _run(self, *arguments: Any) -> list[Any]:
        self.answer = asyncio.get_running_loop().create_future()
        return await self.answer


@pytest.fixture
def link() -> Any:
    return Link()


@pytest.fixture
def clock() -> Any:
    return Clock()


@pytest.fixture
async def kept(link: Any, clock: Any) -> KeptConnection:
    kept = KeptConnection(link)
    kept._patience._loop = clock
    return kept


async def begun(kept: KeptConnection) -> asyncio.Task[list[Any]]:
    """A call that waits for its answer."""
    task = asyncio.create_task(kept.call(None))  # type: ignore[arg-type]
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_each_call_has_all_of_the_time(kept: KeptConnection, link: Link, clock: Clock) -> None:
    for _ in range(10):
        call = await begun(kept)
        clock.pass_by(0.75 * TIMEOUT)
        link.answer.set_result([b"answer"])
        assert await call == [b"answer"]
        assert len(clock.timers) == 1, "one timer does for all"
    assert link.released == 0
    clock.pass_by(TIMEOUT)
    assert clock.timers == [], "nothing runs where nobody calls"


async def test_a_call_without_an_answer_ends(kept: KeptConnection, link: Link, clock: Clock) -> None:
    call = await begun(kept)
    link.answer.set_result([])
    await call
    clock.pass_by(0.9 * TIMEOUT)
    call = await begun(kept)
    clock.pass_by(0.9 * TIMEOUT)
    assert call.cancelling() == 0
    clock.pass_by(0.1 * TIMEOUT)
    with pytest.raises(exceptions.TimeoutError, match="no answer"):
        await call
    assert (link.released, call.cancelling()) == (1, 0)
    call = await begun(kept)
    link.answer.set_result([b"again"])
    assert await call == [b"again"]


@pytest.mark.parametrize("before", [True, False])
async def test_a_call_that_is_cancelled_too_is_cancelled(
    kept: KeptConnection, link: Link, clock: Clock, before: bool
) -> None:
    call = await begun(kept)
    if before:
        call.cancel()
    clock.pass_by(TIMEOUT)
    if not before:
        call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert link.released == 1


async def test_an_answer_that_comes_with_the_end_of_the_time(kept: KeptConnection, link: Link, clock: Clock) -> None:
    """It counts as none, and nothing of the cancellation is left to whoever called."""

    async def caller() -> int:
        with pytest.raises(exceptions.TimeoutError):
            await kept.call(SCRIPT)
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    task = asyncio.create_task(caller())
    for _ in range(3):
        await asyncio.sleep(0)
    link.answer.set_result([])
    clock.pass_by(TIMEOUT)
    assert await task == 0
