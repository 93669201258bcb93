"""Time that a test moves by hand."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from opencode_sse_plugin.clock import Clock
from opencode_sse_plugin.testing import ManualClock, settle
from opencode_sse_plugin.wakeup import call_soon

pytestmark = pytest.mark.anyio


async def test_time_stands_still_until_it_is_moved() -> None:
    clock: Clock = ManualClock(start=5.0)
    assert clock.now() == 5.0
    with anyio.move_on_after(0.01):
        await clock.sleep(0.001)
        raise AssertionError("it slept by the machine's time")
    assert clock.now() == 5.0
    day = clock.wall()
    await clock.advance(1.5)
    assert clock.wall() == pytest.approx(day + 1.5)


async def test_sleepers_wake_in_due_order_each_at_its_time() -> None:
    clock, woken = ManualClock(), []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((seconds, clock.now()))

    async with anyio.create_task_group() as group:
        for seconds in (3.0, 1.0, 2.0, 1.0, 4.5):
            group.start_soon(sleeper, seconds)
        await clock.advance(2.5)
        assert woken == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0)]
        assert clock.now() == 2.5
        await clock.advance(0.5)
        assert woken[3:] == [(3.0, 3.0)]
        await clock.advance(100)
        assert woken[4:] == [(4.5, 4.5)]
    assert clock.now() == 103.0


async def test_who_sleeps_again_wakes_again_within_one_advance() -> None:
    clock, ticks = ManualClock(), []

    async def tick() -> None:
        while True:
            await clock.sleep(10)
            ticks.append(clock.now())

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        await clock.advance(45)
        assert ticks == [10, 20, 30, 40]
        await clock.advance(5)
        assert ticks == [10, 20, 30, 40, 50]
        group.cancel_scope.cancel()


async def test_what_a_sleeper_sets_off_has_run_before_the_next_wakes() -> None:
    clock, log = ManualClock(), []
    events = [anyio.Event() for _ in range(20)]

    async def chain(number: int) -> None:
        await events[number].wait()
        await anyio.lowlevel.checkpoint()
        log.append(number)
        if number + 1 < len(events):
            events[number + 1].set()

    async def first() -> None:
        await clock.sleep(1)
        events[0].set()

    async def second() -> None:
        await clock.sleep(1.5)
        log.append("second")

    async with anyio.create_task_group() as group:
        for number in range(len(events)):
            group.start_soon(chain, number)
        group.start_soon(second)
        group.start_soon(first)
        await clock.advance(1.5)
        assert log == [*range(20), "second"]


async def test_ten_tenths_are_one_second() -> None:
    clock, done = ManualClock(), anyio.Event()

    async def sleeper() -> None:
        await clock.sleep(1.0)
        done.set()

    async with anyio.create_task_group() as group:
        group.start_soon(sleeper)
        for _ in range(9):
            await clock.advance(0.1)
        assert not done.is_set()
        await clock.advance(0.1)
        assert done.is_set()
        assert clock.now() == 1.0


@pytest.mark.parametrize("start", [0.0, 0.1, 0.3, 1e6 + 0.7])
async def test_a_deadline_is_reached_whatever_rounding_leaves_over(start: float) -> None:
    clock, turns = ManualClock(start), 0

    async def until_deadline() -> None:
        nonlocal turns
        deadline = clock.now() + 0.1 + 0.2
        while clock.now() < deadline:
            turns += 1
            await clock.sleep(deadline - clock.now())

    async with anyio.create_task_group() as group:
        group.start_soon(until_deadline)
        await clock.advance(0.1)
        await clock.advance(0.2)
        group.cancel_scope.cancel()
        assert clock.now() == pytest.approx(start + 0.3)
    assert 1 <= turns <= 2


async def test_who_is_cancelled_is_forgotten() -> None:
    clock, woken = ManualClock(), []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    async with anyio.create_task_group() as group:
        scopes = [anyio.CancelScope() for _ in range(5)]

        async def cancellable(number: int) -> None:
            with scopes[number]:
                await sleeper(5 - number)

        for number in range(5):
            group.start_soon(cancellable, number)
        await settle()
        scopes[4].cancel()  # the one that is due first
        scopes[1].cancel()
        await clock.advance(10)
        assert woken == [2, 3, 5]


async def test_no_time_is_no_sleep() -> None:
    clock = ManualClock()
    await clock.sleep(0)
    await clock.sleep(-1)


async def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="back"):
        await ManualClock().advance(-0.001)


async def test_two_cannot_move_it_at_once() -> None:
    clock = ManualClock()
    refused = []

    async def meddle() -> None:
        await clock.sleep(1)
        with pytest.raises(RuntimeError, match="another task"):
            await clock.advance(1)
        refused.append(clock.now())

    async with anyio.create_task_group() as group:
        group.start_soon(meddle)
        await clock.advance(2)
    assert refused == [1.0]
    await clock.advance(1)
    assert clock.now() == 3.0


async def test_settle_waits_for_all_that_can_run() -> None:
    steps = 0

    async def walk() -> None:
        nonlocal steps
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
            steps += 1
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(walk)
        await settle()
        assert steps == 300
        group.cancel_scope.cancel()


async def test_settle_waits_for_callbacks_too() -> None:
    called = []

    def call(number: int) -> None:
        called.append(number)
        if number < 5:
            call_soon()(lambda: call(number + 1))

    call(0)
    await settle()
    assert called == [0, 1, 2, 3, 4, 5]


async def test_the_fixture_gives_a_fresh_clock(manual_clock: ManualClock) -> None:
    assert manual_clock.now() == 0.0
    await manual_clock.advance(1)
    assert manual_clock.now() == 1.0
