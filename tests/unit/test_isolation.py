"""What a bad plugin does to others: nothing. Streams go on, attaching and publishing fail closed, the log names it."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pluggy
import pytest

from opencode_sse_plugin import (
    Backlog,
    Cursor,
    Event,
    EventBus,
    Limits,
    Outcome,
    PluginError,
    Settings,
    Skip,
    Snapshot,
    Start,
    StoredEvent,
    Subscriber,
    event_app,
    hookimpl,
    plugins,
    slowness,
)
from opencode_sse_plugin.cli import main
from opencode_sse_plugin.hookspecs import ASYNC, SPECS
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import settle, stream

pytestmark = pytest.mark.anyio

HOOKS = [spec.__name__ for spec in SPECS]
#: Those whose failure stops the host before anything was served.
FATAL = ["sse_settings", "sse_routes", "sse_startup"]
REGISTERS = [hook for hook in HOOKS if hook.startswith("sse_register_")]
AT_RUN_TIME = [hook for hook in HOOKS if hook not in FATAL and hook not in REGISTERS]


def plugin(hook: str, behave: Callable[[], Any], name: str = "Broken") -> object:
    """A plugin with one hook, which does something whatever it is given, before others."""

    def function(self: object) -> Any:
        return behave()

    function.__name__ = hook
    return type(name, (), {hook: hookimpl(tryfirst=True)(function)})()


def fail() -> None:
    raise ZeroDivisionError("what a plugin does wrong")


class Witness:
    """Implements every hook that is called at run time, and remembers which were."""

    def __init__(self) -> None:
        self.called: set[str] = set()

    @hookimpl
    def sse_event_publish(self, event: Event) -> None:
        self.called.add("sse_event_publish")

    @hookimpl
    def sse_event_published(self, event: StoredEvent, seq: int) -> None:
        self.called.add("sse_event_published")

    @hookimpl
    def sse_publish_failed(self, events: Sequence[Event], error: Exception) -> None:
        self.called.add("sse_publish_failed")

    @hookimpl
    def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
        self.called.add("sse_subscriber_attach")

    @hookimpl
    def sse_overflow_policy(self, subscriber: Subscriber) -> str:
        self.called.add("sse_overflow_policy")
        return "drop-newest"

    @hookimpl
    def sse_subscriber_lag_warning(self, subscriber: Subscriber, fraction: float) -> None:
        self.called.add("sse_subscriber_lag_warning")

    @hookimpl
    def sse_subscriber_overflow(self, subscriber: Subscriber, outcome: object) -> None:
        self.called.add("sse_subscriber_overflow")

    @hookimpl
    def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
        self.called.add("sse_subscriber_detach")

    @hookimpl
    def sse_snapshot(self, subscriber: Subscriber, head: int) -> Snapshot:
        self.called.add("sse_snapshot")
        return Snapshot([Event("state")])

    @hookimpl
    def sse_shutdown(self, bus: EventBus) -> None:
        self.called.add("sse_shutdown")


class Moody(MemoryEventStore):
    """A store that can be told to fail."""

    append_now = None  # type: ignore[assignment]
    down = False

    async def append(self, events: Sequence[StoredEvent]) -> Any:
        if self.down:
            raise OSError("disk full")
        return MemoryEventStore.append_now(self, events)


class Day:
    """A bus through a whole day with a bad plugin, and what a stream saw of it that was there before."""

    def __init__(self, bad: object, *beside: object) -> None:
        self.witness = Witness()
        self.store = Moody()
        loaded = Plugins(discover=False)
        for good in (self.witness, *beside):
            loaded.register(good)
        self.bus = EventBus(Settings(overflow="drop-oldest"), store=self.store, plugins=loaded)
        self.app = event_app(self.bus, authorize=None)
        self.bad = bad
        self.seen: list[str] = []
        self.published: list[int | None] = []
        #: What one more stream got that asked for a snapshot: a status, and the types of its first frames.
        self.attached: tuple[int, list[str]] = (0, [])

    async def live(self) -> None:
        bus = self.bus
        async with bus, stream(self.app, "/event") as early:
            await early.next()
            async with bus.subscribe(limits=Limits(4, 10_000)) as slow:
                await anext(slow)
                bus.plugins.register(self.bad, "broken")
                self.witness.called.clear()
                for type in "abcdefgh":
                    self.published.append(await bus.publish(type))
                    await settle()
                if any(self.published):
                    assert (await anext(slow)).event.type in ("a", "server.stream.lagged")
            self.store.down = True
            bus.publish_nowait("lost")
            await settle()
            self.store.down = False
            self.attached = await self.attach()
            bus.plugins.unregister("broken")
            await bus.publish("evening")
            self.seen = [frame.type for frame in await early.until("evening")]
            bus.plugins.register(self.bad, "broken")
        assert bus.state == "closed"

    async def attach(self) -> tuple[int, list[str]]:
        async with stream(self.app, "/event?snapshot=true") as late:
            if late.status == 200:
                await self.bus.publish("noon")
                # Where publishing fails, a heartbeat would be the next thing to come.
                return 200, [frame.type for frame in await late.take(3 if self.published[0] else 1)]
            return late.status, []


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# Raising.


@pytest.mark.parametrize("hook", AT_RUN_TIME)
async def test_a_hook_that_raises_harms_no_stream(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    day = Day(plugin(hook, fail))
    await day.live()
    dropped, closed = hook == "sse_event_publish", hook == "sse_subscriber_attach"
    assert day.seen == (["evening"] if dropped else [*"abcdefgh", *([] if closed else ["noon"]), "evening"])
    assert day.published == ([None] * 8 if dropped else list(range(1, 9)))
    first = ["server.connected", "state", "server.heartbeat"]
    assert day.attached == ((500, []) if closed else (200, first[:1] if dropped else first))
    # The others are asked all the same, but for what came to nothing.
    assert hook in day.witness.called or dropped or closed
    failures = errors(caplog)
    assert set(failures) == {f"plugin broken: {hook} failed: ZeroDivisionError: what a plugin does wrong"}
    assert all(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR)
    (info,) = (info for info in day.bus.plugins.info() if info.name == "broken")
    assert info.errors == len(failures)
    assert day.bus.statistics()["counters"]["failed"] == (10 if dropped else 0)


def bus_with(*bad: object, **settings: Any) -> EventBus:
    loaded = Plugins(discover=False)
    for number, one in enumerate(bad):
        loaded.register(one, f"broken{number or ''}")
    return EventBus(settings, plugins=loaded)


@pytest.mark.parametrize("hook", FATAL)
async def test_a_hook_without_which_a_host_must_not_run_stops_the_start(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def start() -> None:
        bus = bus_with(plugin(hook, fail))
        event_app(bus, authorize=None)
        try:
            async with bus:
                pytest.fail("it started")
        finally:
            assert bus.state == "closed"

    with pytest.raises(ZeroDivisionError, match="what a plugin does wrong"):
        await start()
    assert errors(caplog) == (
        ["plugin broken: sse_startup failed: ZeroDivisionError: what a plugin does wrong"]
        if hook == "sse_startup"
        else []
    )


@pytest.mark.parametrize("hook", REGISTERS)
async def test_a_plugin_that_fails_to_register_is_left_out_as_a_whole(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    published: list[str] = []

    class Both:
        @hookimpl
        def sse_event_published(self, event: StoredEvent, seq: int) -> None:
            published.append(event.type)

    setattr(Both, hook, getattr(type(plugin(hook, fail)), hook))
    # Found at the start it is left out; given by the host's own code later, the host is told.
    async with bus_with(Both()) as bus:
        assert errors(caplog) == ["plugin broken is left out: ZeroDivisionError: what a plugin does wrong"]
        (info,) = bus.plugins.info()
        assert (info.failure, info.hooks) == ("ZeroDivisionError: what a plugin does wrong", [])
        with pytest.raises(ZeroDivisionError):
            bus.plugins.register(Both(), "later")
        assert await bus.publish("a") == 1
    assert published == []


@pytest.mark.parametrize("keep", ["drop", "keep"])
async def test_an_event_that_no_plugin_could_look_at_goes_out_only_where_that_was_asked_for(keep: Any) -> None:
    loaded = Plugins(discover=False, publish_errors=keep)
    loaded.register(plugin("sse_event_publish", fail))
    async with EventBus(Settings(publish_errors=keep), plugins=loaded) as bus:
        assert await bus.publish("a") == (None if keep == "drop" else 1)
        assert await bus.publish_batch([Event("b"), Event("c")]) == ([None, None] if keep == "drop" else [2, 3])
        bus.publish_nowait("d")
        await settle()
        assert bus.head == (0 if keep == "drop" else 4)


# Wrong types.


@pytest.mark.parametrize("answer", [True, "a", {"type": "a"}, 0, StoredEvent.encode(Event("a", id="evt_1"))])
async def test_an_event_is_not_replaced_by_nonsense(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    day = Day(plugin("sse_event_publish", lambda: answer))
    await day.live()
    assert day.published == [None] * 8
    assert day.seen == ["evening"]
    assert "TypeError: it answered" in errors(caplog)[0]


@pytest.mark.parametrize("event", [Event(""), Event("server.connected"), Event("a", {"x": object()}), Event("a", 5)])  # type: ignore[arg-type]
async def test_an_event_that_cannot_be_published_is_refused_whoever_made_it(event: Event) -> None:
    async with bus_with(plugin("sse_event_publish", lambda: event)) as bus:
        with pytest.raises(ValueError, match=r"type|JSON|properties"):
            await bus.publish("a")
        assert bus.head == 0


@pytest.mark.parametrize("answer", [False, True, "no", Start()])
async def test_nobody_is_let_in_by_an_answer_that_means_nothing(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever answers ``False`` wants to keep somebody out."""
    day = Day(plugin("sse_subscriber_attach", lambda: answer))
    await day.live()
    assert day.attached == (500, [])
    assert f"TypeError: it answered {answer!r}" in errors(caplog)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limits", Limits(0, 0)),
        ("limits", Limits(1, -1)),
        ("limits", (10, 10_000)),
        ("limits", None),
        ("start", Cursor(None, 1)),
        ("start", Start("a:1")),  # type: ignore[arg-type]
        ("filter", {"session": "a"}),
        ("grant", "ann"),
        ("mode", "sideways"),
        ("policy", "drop-oldest"),
    ],
)
async def test_a_subscriber_that_was_made_nonsense_of_is_not_let_in(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Spoils:
        @hookimpl
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            setattr(subscriber, name, value)

    day = Day(Spoils())
    await day.live()
    assert day.attached == (500, [])
    assert day.seen == [*"abcdefgh", "evening"]
    assert f"plugin broken: sse_subscriber_attach failed: TypeError: subscriber.{name}" in errors(caplog)[0]


class Nameless:
    def __call__(self, backlog: object) -> None:
        pytest.fail("it is not a policy")


@pytest.mark.parametrize("answer", [5, "nix", "drop-oldest?x=1", Nameless(), Nameless])
async def test_where_no_policy_is_chosen_the_configured_one_is_taken(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = plugin("sse_overflow_policy", lambda: answer)
    async with bus_with(bad, overflow="drop-newest") as bus, bus.subscribe():
        assert bus.statistics()["subscribers"][0]["policy"] == "drop-newest"
    assert errors(caplog)


@pytest.mark.parametrize("make", [lambda: 5, fail, lambda: Nameless()])
async def test_a_factory_that_makes_no_policy_is_passed_over(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Brings:
        @hookimpl
        def sse_register_overflow_policies(self, register: Any) -> None:
            register("mine", make)

        @hookimpl
        def sse_overflow_policy(self, subscriber: Subscriber) -> str:
            return "mine"

    async with bus_with(Brings()) as bus, bus.subscribe():
        assert bus.statistics()["subscribers"][0]["policy"] == "disconnect"
    assert "mine" in errors(caplog)[0]


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "state",
        [Event("state")],
        Snapshot(5),  # type: ignore[arg-type]
        Snapshot(["state"]),  # type: ignore[list-item]
        Snapshot([Event("state", {"x": object()})]),
        Snapshot([Event("state")], at=1_000_000),
        Snapshot([Event("state")], at=-1),
        Snapshot([Event("state")], at="8"),  # type: ignore[arg-type]
    ],
)
async def test_a_snapshot_that_is_none_is_passed_over(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    day = Day(plugin("sse_snapshot", lambda: answer))
    await day.live()
    assert day.attached == (200, ["server.connected", "state", "server.heartbeat"])  # the witness's
    assert "plugin broken: sse_snapshot failed: " in errors(caplog)[0]


@pytest.mark.parametrize("answer", [5, ["/more"], [None]])
async def test_routes_that_are_none_stop_the_start(answer: Any) -> None:
    """A router would fail at each request, those of the host too."""
    with pytest.raises(PluginError, match="plugin broken: sse_routes answered"):
        event_app(bus_with(plugin("sse_routes", lambda: answer)), authorize=None)


async def test_settings_that_are_none_stop_the_start() -> None:
    with pytest.raises(PluginError, match=r"plugin broken: sse_settings answered \{\}"):
        bus_with(plugin("sse_settings", dict))


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("sse_register_overflow_policies", ()),
        ("sse_register_overflow_policies", ("mine",)),
        ("sse_register_overflow_policies", (5, dict)),
        ("sse_register_overflow_policies", ("disconnect", dict)),
        ("sse_register_event_stores", ("memory", dict)),
        ("sse_register_delivery_classes", ("a", "nix", None)),
        ("sse_register_delivery_classes", ("a", "latest", None)),
    ],
)
async def test_a_plugin_that_registers_nonsense_is_left_out(
    hook: str, arguments: tuple[Any, ...], caplog: pytest.LogCaptureFixture
) -> None:
    def function(self: object, register: Any) -> None:
        register(*arguments)

    async with bus_with(type("Broken", (), {hook: hookimpl(function, specname=hook)})()) as bus:
        (info,) = bus.plugins.info()
        assert info.failure
        assert errors(caplog) == [f"plugin broken is left out: {info.failure}"]
        async with bus.subscribe() as events:
            assert (await anext(events)).event.type == "server.connected"


# Slow.


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_that_takes_a_second_is_named_with_its_duration(
    hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0

    def take_a_second() -> None:
        nonlocal now
        now += 1.0

    for module in (plugins, slowness):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    slow = plugin(hook, take_a_second)
    if hook in FATAL or hook in REGISTERS:
        bus = bus_with(slow)
        event_app(bus, authorize=None)
        async with bus:
            pass
    else:
        day = Day(slow)
        await day.live()
        assert day.seen == [*"abcdefgh", "noon", "evening"]
    said = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert f"plugin broken: {hook} held the event loop for 1.00 s" in said
    assert errors(caplog) == []


async def test_a_policy_that_takes_a_second_is_named_with_its_duration(caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        name = "slow"

        def __call__(self, backlog: Backlog) -> Outcome:
            time.sleep(1.0)
            return Skip(((0, len(backlog.events)),))

    async with bus_with() as bus, bus.subscribe(limits=Limits(4, 10_000), overflow=Slow()) as events:
        await anext(events)
        for _ in range(6):
            await bus.publish("a")
        assert (await anext(events)).event.type == "server.stream.lagged"
    (record,) = caplog.records
    assert re.fullmatch(r"overflow policy slow held the event loop for [1-9]\.\d\d s", record.getMessage())


async def test_a_second_on_the_clock(caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(plugin("sse_event_publish", lambda: time.sleep(1.0))) as bus:
        begun = time.perf_counter()
        assert await bus.publish("a") == 1
        took = time.perf_counter() - begun
    (record,) = caplog.records
    held = float(record.getMessage().removeprefix("plugin broken: sse_event_publish held the event loop for ")[:-2])
    assert 1.0 <= held <= took + 0.01


@pytest.mark.parametrize("hook", sorted(ASYNC))
async def test_waiting_a_second_holds_nobody_else_and_is_named_too(
    hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0

    async def wait() -> None:
        nonlocal now
        await anyio.lowlevel.checkpoint()
        now += 1.0

    monkeypatch.setattr(plugins, "time", SimpleNamespace(perf_counter=lambda: now))
    bus = bus_with(plugin(hook, wait))
    async with bus, stream(event_app(bus, authorize=None), "/event?snapshot=true") as response:
        await response.next()
    assert [record.getMessage() for record in caplog.records] == [f"plugin broken: {hook} took 1.00 s"]


@pytest.mark.parametrize("hook", ["sse_subscriber_attach", "sse_snapshot"])
async def test_who_waits_for_ever_is_given_up(
    hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugins, "TIMEOUT", 0.05)
    day = Day(plugin(hook, anyio.sleep_forever))
    await day.live()
    assert day.seen[:8] == [*"abcdefgh"]
    first = ["server.connected", "state", "server.heartbeat"]
    assert day.attached == ((500, []) if hook == "sse_subscriber_attach" else (200, first))
    assert f"plugin broken: {hook} failed: TimeoutError" in errors(caplog)[0]


# Async where it must not be, and other shapes.


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ASYNC])
def test_a_coroutine_function_is_refused_where_nobody_would_await_it(hook: str) -> None:
    async def function(self: object) -> None:
        pytest.fail("nobody awaits it")

    loaded = Plugins(discover=False)
    with pytest.raises(PluginError) as caught:
        loaded.register(type("Broken", (), {hook: hookimpl(function, specname=hook)})(), "broken")
    assert str(caught.value) == (
        f"plugin broken: {hook}() -> 'None': this hook is called from synchronous code and cannot be async"
    )
    assert loaded.info() == []


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in ASYNC])
async def test_a_coroutine_that_comes_by_surprise_fails_as_any_other_answer_and_is_closed(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would else be a warning about something that was never awaited, long after and nobody knows from where."""

    async def answer() -> None:
        pytest.fail("nobody awaits it")

    bad = plugin(hook, answer)
    if hook in FATAL:
        with pytest.raises((PluginError, TypeError), match=r"async|answered"):
            event_app(bus_with(bad), authorize=None)
    elif hook in REGISTERS:
        (info,) = bus_with(bad).plugins.info()
        assert "cannot be async" in (info.failure or "")
    else:
        day = Day(bad)
        await day.live()
        assert day.seen == (["evening"] if hook == "sse_event_publish" else [*"abcdefgh", "noon", "evening"])
        assert f"plugin broken: {hook} failed: TypeError: this hook" in errors(caplog)[0]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"sse_event_publihs": lambda self, event: None}, "there is no such hook; did you mean sse_event_publish?"),
        ({"sse_event_publish": lambda self, event, seq: None}, "unknown parameter 'seq'; the hook gives event"),
        ({"sse_settings": lambda self, setting: None}, "unknown parameter 'setting'; the hook gives settings"),
    ],
)
def test_what_fits_no_hook_is_refused_by_name(bad: dict[str, Any], complaint: str) -> None:
    members = {name: hookimpl(function, specname=name) for name, function in bad.items()}
    loaded = Plugins(discover=False)
    with pytest.raises(PluginError) as caught:
        loaded.register(type("Broken", (), members)(), "broken")
    (hook,) = bad
    assert str(caught.value).startswith(f"plugin broken: {hook}(")
    assert str(caught.value).endswith(complaint)


@pytest.mark.parametrize("options", [{"wrapper": True}, {"hookwrapper": True}])
def test_wrappers_are_refused(options: dict[str, bool]) -> None:
    def function(self: object) -> Iterator[None]:
        yield

    loaded = Plugins(discover=False)
    with pytest.raises(PluginError, match="hook wrappers are not supported"):
        loaded.register(type("Broken", (), {"sse_startup": hookimpl(function, specname="sse_startup", **options)})())


async def test_a_hosts_own_manager_takes_what_ours_refuses_and_we_leave_it_out_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = pluggy.HookimplMarker("host")
    manager = pluggy.PluginManager("host")

    class Bad:
        @mine
        async def sse_event_publish(self, event: Event) -> None:
            pytest.fail("nobody awaits it")

        @mine(wrapper=True)
        def sse_subscriber_attach(self, subscriber: Subscriber) -> Iterator[None]:
            pytest.fail("it is not called")
            yield

    bus = EventBus(Settings(), plugins=Plugins(discover=False), plugin_manager=manager)
    manager.register(Bad(), "bad")
    async with bus, bus.subscribe() as events:
        await anext(events)
        for type in "abc":
            await bus.publish(type)
            assert (await anext(events)).event.type == type
    assert sorted(errors(caplog)) == [
        "plugin bad: sse_event_publish is left out: this hook is called from synchronous code and cannot be async",
        "plugin bad: sse_subscriber_attach is left out: hook wrappers are not supported",
    ]


# Installed ones.


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Install a distribution with one module: its source, found as any other by its metadata."""
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def install(distribution: str, source: str, entry: str = "") -> str:
        module = distribution.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        folder = tmp_path / f"{module}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n", encoding="utf-8"
        )
        (folder / "entry_points.txt").write_text(
            f"[opencode_sse]\n{entry or distribution} = {module}\n", encoding="utf-8"
        )
        importlib.invalidate_caches()
        return f"{entry or distribution} ({distribution} 1.2)"

    yield install
    for module in modules:
        sys.modules.pop(module, None)


GOOD = """
from opencode_sse_plugin import hookimpl

@hookimpl
def sse_event_publish(event):
    return False if event.type == "noise" else None
"""
DOES_NOT_LOAD = {
    "an import that is missing": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    "a syntax error": ("def broken(:", "SyntaxError: "),
    "an error of its own": ("1 / 0", "ZeroDivisionError: division by zero"),
    "a program": ("import sys; sys.exit('usage: …')", "SystemExit: usage: …"),
    "a misspelt hook": (GOOD.replace("_publish", "_publisch"), "did you mean sse_event_publish?"),
    "a hook that is async": (GOOD.replace("def sse", "async def sse"), "cannot be async"),
}


async def test_one_that_takes_a_second_to_import_is_named_with_its_duration(
    installed: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = installed("sse-test-slow", f"import time; time.sleep(1.0){GOOD}")
    assert EventBus({}).plugins.info()[0].failure is None
    (said,) = (record.getMessage() for record in caplog.records if name in record.getMessage())
    assert re.fullmatch(rf"plugin {re.escape(name)}: loading it took [1-9]\.\d\d s", said)


@pytest.mark.parametrize(("source", "failure"), DOES_NOT_LOAD.values(), ids=DOES_NOT_LOAD)
async def test_one_that_does_not_load_is_named_and_the_others_work(
    installed: Callable[..., str],
    source: str,
    failure: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = installed("sse-test-broken", source)
    installed("sse-test-good", GOOD)
    async with EventBus({}) as bus:
        assert await bus.publish("noise") is None
        assert await bus.publish("a") == 1
        (said,) = errors(caplog)
        assert said.startswith(f"plugin {name} is left out: ")
        assert failure in said
    assert main(["plugins", "--json"]) == 1
    shown = {info["name"]: info for info in json.loads(capsys.readouterr().out)}
    assert failure in shown["sse-test-broken"]["failure"]
    assert (shown["sse-test-good"]["failure"], shown["sse-test-good"]["version"]) == (None, "1.2")


@pytest.mark.parametrize("named", ["sse-test-broken", "SSE_Test.Broken"])
@pytest.mark.parametrize("source", ["1 / 0", "the register hook", None])
async def test_a_required_one_that_is_missing_or_broken_stops_the_start(
    installed: Callable[..., str],
    source: str | None,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if source is not None:
        fails_later = GOOD.replace("_event_publish(event)", "_register_overflow_policies(register)")
        fails_later = fails_later.replace("return", "raise ZeroDivisionError\n    return")
        installed("sse-test-broken", fails_later if source.startswith("the") else source)
    monkeypatch.setenv("OPENCODE_SSE_PLUGINS", named)
    with pytest.raises(PluginError, match=r"(?i)required plugin .*sse.test.broken.*(division|not installed)"):
        EventBus()
    assert main(["serve", "--port", "0"]) == 1
    assert "opencode-sse: required plugin" in capsys.readouterr().err


async def test_two_distributions_may_give_their_entry_points_one_name(installed: Callable[..., str]) -> None:
    installed("sse-test-one", GOOD, entry="plugin")
    installed("sse-test-two", GOOD.replace("noise", "racket"), entry="plugin")
    async with EventBus({}) as bus:
        assert await bus.publish("noise") is None
        assert await bus.publish("racket") is None
        infos = {info.distribution: info for info in bus.plugins.info()}
        assert {name: info.failure for name, info in infos.items()} == {"sse-test-one": None, "sse-test-two": None}


async def test_what_an_operator_disabled_is_not_even_imported(
    installed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("sse-test-broken", "raise SystemError('it was imported')")
    monkeypatch.setenv("OPENCODE_SSE_DISABLED_PLUGINS", "SSE_test_broken")
    assert EventBus({}).plugins.info() == []
