"""Plugins and policies that raise, answer nonsense or hold everything up for a second: who they concern gets a clear
answer, and a healthy subscriber beside them every event. What each hook is for: tests/unit/test_hooks.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from starlette.requests import Request

from opencode_sse_plugin import (
    Backlog,
    Event,
    EventBus,
    Reject,
    Settings,
    Skip,
    StoredEvent,
    Subscriber,
    event_app,
    hookimpl,
)
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import request, settle, stream

from .witness import witnessed

pytestmark = pytest.mark.anyio

#: Marks the one connection that a plugin mistreats.
VICTIM = "victim"


class Broken(Exception):
    """Nothing that anyone catches by name."""


def raises(*_: Any) -> Any:
    raise Broken("the plugin's own text")


def blocks(*_: Any) -> None:
    time.sleep(1)


def answers(value: Any) -> Callable[..., Any]:
    return lambda *_: value


NONSENSE = [answers(value) for value in (0, True, "nonsense", b"", [], {}, object(), Event, Exception("x"))]


def is_victim(subscriber: Subscriber) -> bool:
    return "victim" in subscriber.filter.to_dict().get("workspace", ())


def bus_with(*plugins: object, **settings: Any) -> EventBus:
    loaded = Plugins(discover=False)
    for plugin in plugins:
        loaded.register(plugin)
    return EventBus(Settings(**settings), plugins=loaded)


def app_of(bus: EventBus) -> Any:
    return event_app(bus, authorize=None, publish=True)


def named(log: pytest.LogCaptureFixture, *words: str) -> list[logging.LogRecord]:
    """What the log says in one line with all of these words."""
    return [record for record in log.records if all(word in record.getMessage() for word in words)]


# Publishing.


class Publishing:
    def __init__(self, does: Callable[..., Any]) -> None:
        self.does = does

    @hookimpl
    def sse_event_publish(self, event: Event) -> Any:
        return self.does(event) if event.type == "bad" else None


@pytest.mark.parametrize("does", [raises, *NONSENSE])
async def test_what_a_failing_publish_hook_saw_is_dropped(does: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Publishing(does)) as bus, witnessed(bus):
        assert await bus.publish_batch([Event("good"), Event("bad"), Event("good")]) == [1, None, 2]
        answer = await request(app_of(bus), "POST", "/event", json=[{"type": "bad"}, {"type": "good"}])
        assert (answer.status, answer.json()["seqs"]) == (200, [None, 3])
        assert bus.statistics()["counters"]["failed"] == 2
    assert len(named(caplog, "Publishing", "sse_event_publish failed")) == 2


async def test_what_a_redactor_gets_wrong_does_not_go_to_the_log_instead(caplog: pytest.LogCaptureFixture) -> None:
    def redacts(event: Event) -> Any:
        return event.properties  # not an event

    async with bus_with(Publishing(redacts)) as bus, witnessed(bus):
        assert await bus.publish("bad", {"password": "s3cret"}) is None
    assert named(caplog, "Publishing", "it answered dict, not an Event")
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("type", ["server.heartbeat", "a\nb", ""])
async def test_a_publish_hook_cannot_make_what_nobody_may_publish(type: str) -> None:
    async with bus_with(Publishing(answers(Event(type)))) as bus, witnessed(bus):
        answer = await request(app_of(bus), "POST", "/event", json=[{"type": "good"}, {"type": "bad"}])
        assert (answer.status, answer.json()["index"]) == (400, 1)
        assert bus.head == 0
        await bus.publish("good")


async def test_a_publish_hook_that_takes_a_second_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Publishing(blocks)) as bus, witnessed(bus):
        assert await bus.publish_batch([Event("good"), Event("bad"), Event("good")]) == [1, 2, 3]
    assert named(caplog, "Publishing", "sse_event_publish held the event loop for 1.")


class Published:
    @hookimpl
    def sse_event_published(self, event: StoredEvent, seq: int) -> None:
        raise Broken("the plugin's own text")


async def test_a_failing_hook_after_the_publish_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Published()) as bus, witnessed(bus):
        assert await bus.publish_batch([Event("good"), Event("good")]) == [1, 2]
        assert (await request(app_of(bus), "POST", "/event", json={"type": "good"})).status == 200
    assert len(named(caplog, "Published", "sse_event_published failed")) == 4  # the witness's own end is one


# Attaching.


class Attaching:
    def __init__(self, does: Callable[..., Any], *, later: bool) -> None:
        self.does, self.later = does, later

    @hookimpl
    async def sse_subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> Any:
        if is_victim(subscriber):
            if self.later:
                await anyio.sleep(0.01)
            return self.does(subscriber)
        return None


@pytest.mark.parametrize("later", [False, True])
async def test_who_cannot_be_looked_at_is_not_let_in(later: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Attaching(raises, later=later)) as bus, witnessed(bus):
        for query in ("", "&after_seq=0", "&after_seq=bad"):
            answer = await request(app_of(bus), "GET", f"/event?workspace={VICTIM}{query}")
            assert (answer.status, answer.json()) == (500, {"error": "the stream cannot be attached"})
        await bus.publish("good")
    assert len(named(caplog, "Attaching", "sse_subscriber_attach failed")) == 3


@pytest.mark.parametrize("does", NONSENSE)
async def test_an_attach_hook_that_answers_nonsense_lets_nobody_in(does: Any) -> None:
    """It may have wanted to keep somebody out."""
    async with bus_with(Attaching(does, later=True)) as bus, witnessed(bus):
        assert (await request(app_of(bus), "GET", f"/event?workspace={VICTIM}")).status == 500
        await bus.publish("good")


@pytest.mark.parametrize("status", [399, 200, 600, 0])
async def test_a_refusal_that_is_none_does_not_let_in(status: int) -> None:
    def refuses(subscriber: Subscriber) -> None:
        raise Reject(status, "go away")

    async with bus_with(Attaching(refuses, later=False)) as bus, witnessed(bus):
        assert (await request(app_of(bus), "GET", f"/event?workspace={VICTIM}")).status == 500


async def test_an_attach_hook_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("opencode_sse_plugin.plugins.TIMEOUT", 0.2)

    class Forever:
        @hookimpl
        async def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            if is_victim(subscriber):
                await anyio.sleep_forever()

    async with bus_with(Forever()) as bus, witnessed(bus):
        await bus.publish("good")
        assert (await request(app_of(bus), "GET", f"/event?workspace={VICTIM}")).status == 500
        await bus.publish("good")
    assert named(caplog, "Forever", "sse_subscriber_attach failed", "TimeoutError")


# Policies.


class Mistreated:
    """Gives the victim a policy of its own."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @hookimpl
    def sse_overflow_policy(self, subscriber: Subscriber) -> Any:
        return (self.policy() if isinstance(self.policy, type) else self.policy) if is_victim(subscriber) else None


class Policy:
    name = "mine"

    def __init__(self, does: Callable[..., Any]) -> None:
        self.does = does

    def __call__(self, backlog: Backlog) -> Any:
        return self.does(backlog)


class Unchoosing:
    @hookimpl
    def sse_overflow_policy(self, subscriber: Subscriber) -> Any:
        return raises() if is_victim(subscriber) else None


async def overrun(bus: EventBus) -> list[Any]:
    """Stall the victim until it is over its limit; everything it is then given."""
    async with stream(app_of(bus), f"/event?workspace={VICTIM}", window=0) as victim:
        await victim.next()
        for n in range(1, 31):
            await bus.publish("good", {"n": n})
            await settle()
        assert bus.statistics()["subscribers"][-1]["lag"]["events"] > 10
        frames = [await victim.next()]
        while frames[-1].type != "server.stream.lagged":
            frames.append(await victim.next())
        if frames[-1].properties["action"] == "reconnect":
            assert await victim.rest() == []
            assert victim.ending == "abort"
        return frames


@pytest.mark.parametrize(
    "does",
    [
        raises,
        *NONSENSE,
        answers(Skip(())),
        answers(Skip(((5, 2),))),
        answers(Skip(((-3, 2),))),
        answers(Skip(((0, 10**9),))),
        answers(Skip((("a", "b"),))),  # type: ignore[arg-type]
        answers(Skip(((0, 1),))),  # leaves too much
    ],
)
async def test_a_policy_that_fails_disconnects_and_all_is_told(does: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Mistreated(Policy(does)), queue_max=10) as bus, witnessed(bus):
        *got, lagged = await overrun(bus)
        told = lagged.properties
        assert (told["action"], told["policy"]) == ("reconnect", "mine")
        assert [frame.properties["n"] for frame in got] == list(range(1, told["first"]))
        assert told["dropped"] == 30 - len(got) == told["last"] - told["first"] + 1
    assert len(named(caplog, "overflow policy mine failed")) == 1


async def test_a_policy_that_takes_a_second_holds_up_but_loses_nothing() -> None:
    def slow(backlog: Backlog) -> Skip:
        time.sleep(1)
        return Skip(((0, len(backlog.events)),))

    async with bus_with(Mistreated(Policy(slow)), queue_max=10) as bus, witnessed(bus):
        *got, lagged = await overrun(bus)
        assert (lagged.properties["action"], lagged.properties["policy"]) == ("continue", "mine")
        assert lagged.properties["dropped"] == 30 - len(got)


@pytest.mark.parametrize(
    "plugin",
    [
        Unchoosing(),
        *(Mistreated(value) for value in (7, b"", "nonsense", "mine?x=", object(), Event("a"), lambda b: None)),
    ],
)
async def test_where_none_can_be_chosen_the_configured_one_acts(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(plugin, queue_max=10, overflow="drop-oldest") as bus, witnessed(bus):
        *_, lagged = await overrun(bus)
        assert (lagged.properties["policy"], lagged.properties["action"]) == ("drop-oldest", "continue")
    assert named(caplog, "sse_overflow_policy")


# What is only told.


class Telling:
    """Whatever it is told, it fails."""

    @hookimpl
    def sse_subscriber_lag_warning(self, subscriber: Subscriber, fraction: float) -> None:
        raises()

    @hookimpl
    def sse_subscriber_overflow(self, subscriber: Subscriber, outcome: Any) -> None:
        raises()

    @hookimpl
    def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
        raises()

    @hookimpl
    def sse_snapshot(self, subscriber: Subscriber, head: int) -> None:
        raises()


async def test_hooks_that_are_only_told_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Telling(), queue_max=10) as bus, witnessed(bus):
        *_, lagged = await overrun(bus)
        assert lagged.properties["policy"] == "disconnect"
        async with stream(app_of(bus), f"/event?workspace={VICTIM}&snapshot=true") as response:
            connected = await response.next()
            assert (connected.type, connected.id) == ("server.connected", f"{bus.epoch}:{bus.head}")
    for hook in ("lag_warning", "overflow", "detach"):
        assert named(caplog, "Telling", f"sse_subscriber_{hook} failed")
    assert named(caplog, "Telling", "sse_snapshot failed")


class Snapshots:
    def __init__(self, does: Callable[..., Any]) -> None:
        self.does = does

    @hookimpl
    def sse_snapshot(self, subscriber: Subscriber, head: int) -> Any:
        return self.does(subscriber)


@pytest.mark.parametrize("does", NONSENSE)
async def test_a_snapshot_that_is_none(does: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with bus_with(Snapshots(does)) as bus, witnessed(bus):
        await bus.publish("good")
        for query in ("snapshot=true", "after_seq=99&follow=true"):
            async with stream(app_of(bus), f"/event?{query}") as response:
                assert (await response.next()).type == "server.connected"
                await bus.publish("good")
                frames = await response.until("good")
                assert {frame.type for frame in frames} <= {"server.stream.expired", "good"}
    assert len(named(caplog, "Snapshots", "sse_snapshot failed")) == 2
