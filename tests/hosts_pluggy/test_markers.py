"""A tiny host with a plugin manager of its own: its marker, ours, both, and two buses over one manager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pluggy
import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from opencode_sse_plugin import (
    NAME,
    Backlog,
    Disconnect,
    Event,
    EventBus,
    Limits,
    Settings,
    StoredEvent,
    Subscriber,
    hookimpl,
    install,
    register_specs,
)
from opencode_sse_plugin.hookspecs import SPECS
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import lifespan, settle, stream

pytestmark = pytest.mark.anyio

hostspec, hostimpl = pluggy.HookspecMarker("tiny"), pluggy.HookimplMarker("tiny")
HOOKS = {spec.__name__ for spec in SPECS}


class HostSpecs:
    @hostspec
    def tiny_greet(self, name: str) -> str:  # type: ignore[empty-body]
        """A hook of the host's own."""


def tiny_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("tiny")
    manager.add_hookspecs(HostSpecs)
    return manager


def everything(mark: Any, calls: list[str]) -> object:
    """A plugin with every hook, under a marker; it remembers its calls and has nothing to say."""

    class Plugin:
        @mark
        def sse_settings(self, settings: Settings) -> None:
            calls.append("sse_settings")

        @mark
        def sse_register_overflow_policies(self, register: Any) -> None:
            calls.append("sse_register_overflow_policies")

        @mark
        def sse_register_event_stores(self, register: Any) -> None:
            calls.append("sse_register_event_stores")

        @mark
        def sse_register_delivery_classes(self, register: Any) -> None:
            calls.append("sse_register_delivery_classes")

        @mark
        def sse_routes(self, bus: EventBus) -> None:
            calls.append("sse_routes")

        @mark
        async def sse_startup(self, bus: EventBus) -> None:
            calls.append("sse_startup")

        @mark
        def sse_shutdown(self, bus: EventBus) -> None:
            calls.append("sse_shutdown")

        @mark
        def sse_event_publish(self, event: Event) -> None:
            calls.append("sse_event_publish")

        @mark
        def sse_event_published(self, event: StoredEvent, seq: int) -> None:
            calls.append("sse_event_published")

        @mark
        def sse_publish_failed(self, events: Sequence[Event], error: Exception) -> None:
            calls.append("sse_publish_failed")

        @mark
        async def sse_subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> None:
            calls.append("sse_subscriber_attach")

        @mark
        def sse_overflow_policy(self, subscriber: Subscriber) -> None:
            calls.append("sse_overflow_policy")

        @mark
        def sse_subscriber_lag_warning(self, subscriber: Subscriber, fraction: float) -> None:
            calls.append("sse_subscriber_lag_warning")

        @mark
        def sse_subscriber_overflow(self, subscriber: Subscriber, outcome: object) -> None:
            calls.append("sse_subscriber_overflow")

        @mark
        def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
            calls.append("sse_subscriber_detach")

        @mark
        def sse_snapshot(self, subscriber: Subscriber, head: int) -> None:
            calls.append("sse_snapshot")

    return Plugin()


class Moody(MemoryEventStore):
    append_now = None  # type: ignore[assignment]
    down = False

    async def append(self, events: Sequence[StoredEvent]) -> Any:
        if self.down:
            raise OSError("disk full")
        return MemoryEventStore.append_now(self, events)


async def serve_a_day(app: Starlette, *paths: str) -> None:
    """Let every hook have its turn that needs no slow reader, on every bus of an app."""
    async with lifespan(app):
        for path in paths:
            bus: EventBus = getattr(app.state, path or "root")
            async with stream(app, f"{path}/event?snapshot=true") as response:
                await response.next()
                await bus.publish_batch([Event(type) for type in "abc"])
                await settle()
                await response.until("c")
            assert isinstance(bus.store, Moody)
            bus.store.down = True
            bus.publish_nowait("lost")
            await settle()
            bus.store.down = False


@pytest.mark.parametrize("buses", [1, 2])
@pytest.mark.parametrize("marker", ["host", "ours", "both"])
async def test_each_plugin_is_called_under_the_marker_of_its_manager(marker: str, buses: int) -> None:
    manager = tiny_manager()
    of_host: list[str] = []
    of_ours: list[str] = []
    if marker != "ours":
        manager.register(everything(hostimpl, of_host), "theirs")
    app = Starlette()
    for path in ("", "/two")[:buses]:
        loaded = Plugins(discover=False)
        if marker != "host" and not path:
            loaded.register(everything(hookimpl, of_ours), "ours")
        bus = EventBus({}, store=Moody(), plugins=loaded, plugin_manager=manager)
        install(app, bus, authorize=None, path=path, plugin_manager=manager)
        setattr(app.state, path or "root", bus)
    manager.check_pending()
    await serve_a_day(app, *("", "/two")[:buses])
    quiet = {"sse_subscriber_lag_warning", "sse_subscriber_overflow"}  # Nobody was slow.
    several = Counter({"sse_event_publish": 4, "sse_event_published": 3})
    for calls, times in ((of_host, buses if marker != "ours" else 0), (of_ours, 1 if marker != "host" else 0)):
        expected = {hook: times * (several[hook] or 1) for hook in HOOKS - quiet} if times else {}
        assert Counter(calls) == Counter(expected)
    for path in ("", "/two")[:buses]:
        shown = {info.name: info for info in getattr(app.state, path or "root").plugins.info()}
        assert ("theirs" in shown) == (marker != "ours")
        assert ("ours" in shown) == (marker != "host" and not path)
        for info in shown.values():
            assert set(info.hooks) == HOOKS
            assert info.distribution == ("tiny" if info.name == "theirs" else None)


async def test_warnings_and_overflow_reach_both() -> None:
    manager = tiny_manager()
    calls: list[str] = []
    manager.register(everything(hostimpl, calls))
    loaded = Plugins(discover=False)
    loaded.register(everything(hookimpl, calls))
    bus = EventBus(Settings(), plugins=loaded, plugin_manager=manager)
    async with bus, bus.subscribe(limits=Limits(4, 10_000)) as events:
        await anext(events)
        for _ in range(6):
            await bus.publish("a")
            await settle()
        await anext(events)
    assert Counter(calls)["sse_subscriber_lag_warning"] == Counter(calls)["sse_subscriber_overflow"] == 2


async def test_ours_are_asked_first_and_the_host_sees_what_they_made_of_it() -> None:
    manager = tiny_manager()

    class Theirs:
        @hostimpl
        def sse_event_publish(self, event: Event) -> Event:
            return Event(event.type, {**(event.properties or {}), "seen": sorted(event.properties or {})})

        @hostimpl
        def sse_overflow_policy(self, subscriber: Subscriber) -> str:
            return "drop-newest"

    class Ours:
        @hookimpl
        def sse_event_publish(self, event: Event) -> Event:
            return Event(event.type, {"masked": True})

        @hookimpl
        def sse_overflow_policy(self, subscriber: Subscriber) -> str | None:
            return "drop-oldest" if subscriber.caller == "ours" else None

    manager.register(Theirs())
    loaded = Plugins(discover=False)
    loaded.register(Ours())
    bus = EventBus(Settings(), plugins=loaded, plugin_manager=manager)
    async with bus, bus.subscribe(caller="ours") as events, bus.subscribe():
        await anext(events)
        await bus.publish("a", {"secret": 1})
        assert (await anext(events)).event.properties == {"masked": True, "seen": ["masked"]}
        policies = [subscriber["policy"] for subscriber in bus.statistics()["subscribers"]]
        assert policies == ["drop-oldest", "drop-newest"]


async def test_a_plugin_that_the_host_registers_later_is_called_and_can_register() -> None:
    manager = tiny_manager()
    one, two = (EventBus(Settings(), plugins=Plugins(discover=False), plugin_manager=manager) for _ in range(2))

    class Late:
        @hostimpl
        def sse_register_overflow_policies(self, register: Any) -> None:
            register("late", Policy)

        @hostimpl
        def sse_event_publish(self, event: Event) -> bool:
            return False

    class Policy:
        name = "late"

        def __call__(self, backlog: Backlog) -> Disconnect:
            return Disconnect()

    async with one, two:
        assert await one.publish("a") == 1
        manager.register(Late())
        assert await one.publish("a") is None
        for bus in (one, two):
            assert bus.policies.create("late").name == "late"


async def test_a_late_plugin_that_registers_nonsense_does_not_break_the_host(caplog: pytest.LogCaptureFixture) -> None:
    manager = tiny_manager()

    class Late:
        @hostimpl
        def sse_register_overflow_policies(self, register: Any) -> None:
            register("disconnect", lambda: None)

    async with EventBus(Settings(), plugins=Plugins(discover=False), plugin_manager=manager) as bus:
        manager.register(Late())
        assert await bus.publish("a") == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        "a plugin of tiny: sse_register_overflow_policies failed: overflow policy 'disconnect' is registered already"
    )


def test_specs_may_come_before_the_host_checks_and_a_second_time() -> None:
    manager = tiny_manager()
    manager.register(everything(hostimpl, []))
    with pytest.raises(pluggy.PluginValidationError):
        manager.check_pending()
    register_specs(manager)
    manager.check_pending()
    register_specs(manager)
    EventBus(Settings(), plugins=Plugins(discover=False), plugin_manager=manager)
    assert manager.hook.tiny_greet(name="ann") == []


def test_ours_stays_ours() -> None:
    """The host's manager sees no plugin of ours, and a marker of ours means nothing there."""
    manager = tiny_manager()
    calls: list[str] = []
    manager.register(everything(hookimpl, calls), "misplaced")
    loaded = Plugins(discover=False)
    loaded.register(everything(hookimpl, []), "ours")
    EventBus({}, plugins=loaded, plugin_manager=manager)
    assert calls == []
    assert [name for name, _ in manager.list_name_plugin()] == ["misplaced"]
    assert loaded.manager.project_name == NAME
