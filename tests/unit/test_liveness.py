"""When subscribers are looked at: as if everyone were at each turn of the watch, but only where it may matter."""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

import anyio
import pytest

from opencode_sse_plugin import EventBus, Filter, Grant, Settings
from opencode_sse_plugin.channels import WAKE_AT_ONCE
from opencode_sse_plugin.frames import EVENT
from opencode_sse_plugin.liveness import Liveness
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.subscription import Subscription
from opencode_sse_plugin.testing import ManualClock, settle

pytestmark = pytest.mark.anyio


class Watched:
    """What the watch knows of a subscription. One that is woken writes a heartbeat at once, one that is cut leaves."""

    def __init__(self, world: World, name: int, expires_at: float | None) -> None:
        self.subscriber = self
        self.grant = Grant(expires_at=expires_at)
        self.last_frame = world.clock.now()
        self.writing_since: float | None = None
        self.on_cut: object = None
        self.heartbeat_due = False
        self._world = world
        self._name = name

    def wake(self) -> None:
        assert self.heartbeat_due
        self.heartbeat_due = False
        self.last_frame = self._world.clock.now()
        self._world.tell("heartbeat", self._name)

    def cut(self, reason: str) -> None:
        self._world.tell(reason, self._name)
        self._world.leave(self._name)

    def write(self, pump: bool) -> None:
        self.last_frame = self.writing_since = self._world.clock.now()
        self.on_cut = self if pump else None

    def written(self) -> None:
        self.writing_since = None
        if self._world.clock.now() >= self.last_frame + self._world.settings.heartbeat:
            self.heartbeat_due = True
            self.wake()


class World:
    """Some who come, get something, write for long and leave, and what became of them, by when; and their clock, which
    somebody may set."""

    def __init__(self, clock: ManualClock, settings: Settings) -> None:
        self.clock = clock
        self.settings = settings
        self.ahead = 1e9
        self.watched: dict[int, Any] = {}  # As far as a watch knows, subscriptions.
        self.told: list[tuple[float, str, int]] = []

    def tell(self, what: str, name: int) -> None:
        self.told.append((self.clock.now(), what, name))

    def now(self) -> float:
        return self.clock.now()

    def wall(self) -> float:
        return self.clock.now() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await self.clock.sleep(seconds)

    def come(self, name: int, expires_at: float | None) -> None:
        self.watched[name] = Watched(self, name, expires_at)

    def leave(self, name: int) -> None:
        del self.watched[name]

    def do(self, what: str, name: int, argument: Any) -> None:
        one = self.watched.get(name)
        if what == "set":
            self.ahead += argument
        elif one is None:
            self.come(name, None if argument is None else self.wall() + argument)
        elif what == "leave":
            self.leave(name)
        elif one.writing_since is not None:
            one.written()
        elif what == "write":
            one.write(argument is None)
        else:
            one.last_frame = self.clock.now()

    async def run(self) -> None:
        """All of them, at each turn of the watch."""
        settings = self.settings
        while True:
            await self.clock.sleep(min(1.0, settings.heartbeat / 10, settings.write_timeout / 10))
            now = self.clock.now()
            for one in tuple(self.watched.values()):
                if one.grant.expires_at is not None and self.wall() >= one.grant.expires_at:
                    one.cut("grant")
                elif one.writing_since is not None:
                    if one.on_cut is not None and now >= one.writing_since + settings.write_timeout:
                        one.cut("write-timeout")
                elif now >= one.last_frame + settings.heartbeat:
                    one.heartbeat_due = True
                    one.wake()


class WatchedWorld(World):
    """The same, watched by what is tested."""

    def __init__(self, clock: ManualClock, settings: Settings) -> None:
        super().__init__(clock, settings)
        log_and_plugins: Any = None  # Asked where events come, not by the watch.
        watched: Any = _Values(self.watched)
        self.liveness = Liveness(log_and_plugins, settings, log_and_plugins, self, watched)

    def come(self, name: int, expires_at: float | None) -> None:
        super().come(name, expires_at)
        self.liveness.watch(self.watched[name])

    def leave(self, name: int) -> None:
        self.liveness.forget(self.watched[name])
        super().leave(name)

    async def run(self) -> None:
        await self.liveness.run()


class _Values:
    def __init__(self, watched: dict[int, Watched]) -> None:
        self._watched = watched

    def __contains__(self, one: Watched) -> bool:
        return self._watched.get(one._name) is one


def waiting_in(liveness: Liveness) -> list[Any]:
    return [subscription for due in liveness._due.values() for subscription in due]


@pytest.mark.parametrize(
    ("heartbeat", "write_timeout"),
    [(10.0, 30.0), (30.0, 10.0), (0.5, 3.0), (3.0, 0.5), (1e9, 7.0), (float("inf"),) * 2],
)
@pytest.mark.parametrize("seed", range(3))
async def test_everything_comes_when_it_would_if_all_were_looked_at(
    heartbeat: float, write_timeout: float, seed: int
) -> None:
    chance, clock = random.Random(seed), ManualClock()
    settings = Settings(heartbeat=heartbeat, write_timeout=write_timeout)
    scale, longest = min(heartbeat, write_timeout, 60.0), 2 * min(write_timeout, 60.0)
    expected, watched = World(clock, settings), WatchedWorld(clock, settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expected.run)
        tasks.start_soon(watched.run)
        for _ in range(500):
            # Never in the very moment of a look.
            silence = chance.expovariate(40 / scale) if chance.random() < 0.95 else chance.uniform(0, longest)
            await clock.advance(round(silence, 3) + 0.00017)
            name = chance.randrange(20)
            what = chance.choices(["frame", "write", "leave", "set"], [60, 30, 5, 1])[0]
            argument = None if chance.random() < 0.7 else chance.uniform(0, 4 * scale)
            if what == "set":
                argument = chance.choice([-1, 1]) * chance.uniform(2, 2 * scale)
            expected.do(what, name, argument)
            watched.do(what, name, argument)
            assert set(waiting_in(watched.liveness)) == set(watched.watched.values())
            assert len(waiting_in(watched.liveness)) == len(watched.watched)
            assert len(watched.liveness._due) <= 61
        tasks.cancel_scope.cancel()
    assert watched.told == sorted(watched.told, key=lambda told: told[0])
    assert sorted(watched.told) == sorted(expected.told)
    told = Counter(what for _, what, _ in expected.told)
    assert told["grant"] > 5
    assert told["heartbeat"] > 5 or heartbeat > 1e6
    assert told["write-timeout"] > 5 or write_timeout > 1e6


async def attached(bus: EventBus, count: int) -> list[Subscription[bytes]]:
    """Subscribers each of a session of its own, that have been told where they are."""
    subscriptions = []
    for number in range(count):
        filter = Filter(sessions=frozenset({f"ses_{number}"}))
        subscription = await bus.attach(bus.new_subscriber("/event", filter, Grant.everything()), EVENT)
        await read(subscription)
        subscriptions.append(subscription)
    return subscriptions


async def read(subscription: Subscription[bytes]) -> None:
    assert await subscription.look() is not None
    assert await subscription.look() is None


async def test_a_delivery_postpones_a_look_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looked = ManualClock(), Counter[Any]()
    async with EventBus(plugins=Plugins(discover=False), clock=clock) as bus:
        look = bus._liveness._look

        def counting(one: Any, *times: float) -> float:
            looked[one] += 1
            return look(one, *times)

        monkeypatch.setattr(bus._liveness, "_look", counting)
        quiet, busy = await attached(bus, 2)
        await clock.advance(9.0)
        assert looked == {quiet: 1, busy: 1}  # at the first turn, to see what they are
        bus.publish_nowait("a", {"sessionID": "ses_1"})
        await read(busy)
        await clock.advance(1.0)
        assert looked == {quiet: 2, busy: 2}
        assert (quiet.heartbeat_due, busy.heartbeat_due) == (True, False)
        await clock.advance(8.0)
        assert looked == {quiet: 2, busy: 2}
        await clock.advance(1.0)
        assert looked == {quiet: 2, busy: 3}
        assert busy.heartbeat_due
        for subscription in (quiet, busy):
            bus.detach(subscription)


async def test_who_has_left_is_kept_nowhere() -> None:
    clock = ManualClock()
    async with EventBus(plugins=Plugins(discover=False), clock=clock) as bus:
        subscriptions: list[Any] = await attached(bus, 30)
        await clock.advance(5.0)
        services = bus._roster.services
        for subscription in subscriptions:
            bus.detach(subscription)
        assert waiting_in(bus._liveness) == []
        del subscription
        subscriptions.clear()
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is Subscription and one.services is services]
        await clock.advance(100.0)
        assert len(bus._liveness._due) == 0


async def test_those_who_came_together_get_heartbeats_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looked = ManualClock(), Counter[str]()
    async with EventBus(plugins=Plugins(discover=False), clock=clock) as bus, anyio.create_task_group() as tasks:
        subscriptions = await attached(bus, 5 * WAKE_AT_ONCE)
        await clock.advance(9.5)
        look = bus._liveness._look

        async def another() -> None:
            looked["before another's turn"] = looked["all"]

        def counting(*arguments: Any) -> float:
            if not looked["all"]:
                tasks.start_soon(another)
            looked["all"] += 1
            return look(*arguments)

        monkeypatch.setattr(bus._liveness, "_look", counting)
        await clock.advance(0.5)
        assert looked["all"] == len(subscriptions)
        assert looked["before another's turn"] <= 2 * WAKE_AT_ONCE
        assert all(subscription.heartbeat_due for subscription in subscriptions)
        for subscription in subscriptions:
            bus.detach(subscription)


async def test_bookmarks_of_thousands_who_follow_each_other_are_looked_for_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved, published, bookmarks = 0, 2000, 0
    settings = Settings(retain_events=800)  # A bookmark is needed 200 events after the last.
    async with EventBus(settings, plugins=Plugins(discover=False), clock=ManualClock()) as bus:
        subscriptions = await attached(bus, 300)
        look_for = bus._liveness.moved

        def counting() -> None:
            nonlocal moved
            moved += 1
            look_for()

        monkeypatch.setattr(bus._liveness, "moved", counting)
        for number in range(published):
            receiver = number % len(subscriptions)
            bus.publish_nowait("a", {"sessionID": f"ses_{receiver}"})
            await settle()
            assert bus.head == number + 1
            for subscription in subscriptions:
                if subscription.heartbeat_due:
                    bookmarks += 1
                    await read(subscription)
            if not subscriptions[receiver].is_level():
                await read(subscriptions[receiver])
            assert all(bus.head - subscription.last_id <= 201 for subscription in subscriptions)
        assert moved <= published / 200 * 8 + 1
        assert bookmarks <= published / 200 * 8 / 7 * len(subscriptions)
        for subscription in subscriptions:
            bus.detach(subscription)
