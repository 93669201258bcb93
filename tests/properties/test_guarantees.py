"""The named guarantees over random histories: Ordered, Unique, Reliable, Resumable, Bookmarkable, Honest, Bounded.

Publishes (single, batched, bursts, from threads), attaches in every mode on both routes, stalls, cuts after any frame,
resumes, filters, retention, policies and epoch changes, on asyncio and on trio.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import Histories, Received, Verdict, judge
from starlette.requests import Request

from opencode_sse_plugin import (
    Cursor,
    Event,
    EventBus,
    Filter,
    Limits,
    Retention,
    Settings,
    StoredEvent,
    Subscriber,
    event_app,
    hookimpl,
    log,
)
from opencode_sse_plugin.frames import parse
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Bounds, Evicted, Page
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.stores.sqlite import SQLiteEventStore
from opencode_sse_plugin.testing import ManualClock, settle
from opencode_sse_plugin.testing.samples import RecordingListener

SESSIONS = ("ses_a", "ses_b", "ses_c")
TYPES = ("message.part.delta", "message.updated", "permission.asked", "session.idle")
POLICIES = (
    "disconnect",
    "drop-oldest",
    "drop-newest",
    "coalesce",
    "coalesce?then=drop-oldest",
    "shed",
    "catch-up",
    "block?timeout=20ms",
    "block?timeout=20ms&then=drop-newest",
)
HEARTBEAT = 10.0
#: Shrinking a history of this size can take minutes; `HYPOTHESIS_SHRINK=1` asks for it.
PHASES = tuple(phase for phase in Phase if phase is not Phase.shrink or "HYPOTHESIS_SHRINK" in os.environ)

filters = st.sampled_from(
    [
        Filter(),
        Filter.of(session="ses_a"),
        Filter.of(session=["ses_b", "ses_c"]),
        Filter.of(type="message.*"),
        Filter.of(type="permission.asked"),
        Filter.of(session="ses_a", type=["session.idle", "message.updated"]),
        Filter.of(session="ses_quiet"),
    ]
)
events = st.builds(
    lambda session, type, number, size, scope: Event(
        type,
        {
            "sessionID": session,
            "info": {"id": f"msg_{session}"},
            "partID": f"prt_{session}_{number}",
            "field": "text",
            "delta": "x" * size,
        },
        scope=scope,
    ),
    st.sampled_from(SESSIONS),
    st.sampled_from(TYPES),
    st.integers(1, 2),
    st.integers(0, 120),
    st.sampled_from(["instance", "instance", "instance", "global"]),
)


class Choices:
    """A plugin that reads policy and limits from the query, as a team's own would from a header."""

    def __init__(self) -> None:
        self.attached: dict[str, Subscriber] = {}

    @hookimpl
    def sse_subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> None:
        assert request is not None
        self.attached[request.query_params["client"]] = subscriber
        subscriber.limits = Limits(int(request.query_params["limit"]), int(request.query_params["bytes"]))

    @hookimpl
    def sse_overflow_policy(self, subscriber: Subscriber) -> str:
        return str(subscriber.caller)


class Connection:
    """One request: what came, and whether the client reads."""

    def __init__(self, app: Any, path: str, query: str, headers: dict[str, str]) -> None:
        self.app = app
        self.frames: list[Received] = []
        #: How many frames there were after each send.
        self.ending: str | None = None
        self.status = 0
        self.reading = anyio.Event()
        self.reading.set()
        self.gone = anyio.Event()
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "server": ("test", 80),
        }

    async def run(self) -> None:
        await self.app(self.scope, self.receive, self.send)
        self.ending = self.ending or "abort"

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        if self.gone.is_set():
            return
        if self.status == 200:
            for id, data in parse(message["body"]):
                value = json.loads(data)
                self.frames.append(Received(id, value.get("payload", value)))
        if not message.get("more_body", False):
            self.ending = "clean"
        await self.reading.wait()


class Client:
    """A client over all its connections."""

    def __init__(self, number: int, filter: Filter, route: str, policy: str, limits: Limits, mode: str) -> None:
        self.number = number
        self.filter = filter
        self.route = route
        self.policy = policy
        self.limits = limits
        self.mode = mode
        self.connection: Connection | None = None
        self.verdicts: list[Verdict] = []
        self.cursor: Cursor | None = None
        self.stalled_ever = False
        #: Policies that were in charge of its connection.
        self.policies = {policy}
        self.complete = False

    @property
    def sees_global(self) -> bool:
        return self.route == "/global/event"


async def eventually(reached: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what no event tells of."""
    with anyio.fail_after(seconds):
        while True:
            if reached():
                return
            await anyio.sleep(0.001)


class Guarantees(RuleBasedStateMachine):
    backend = "asyncio"
    #: Over a memory store, whose window holds whatever the store does.
    settings = Settings(heartbeat=HEARTBEAT, write_timeout=1e9)

    def __init__(self) -> None:
        super().__init__()
        self._stop: list[Any] = []
        manager = start_blocking_portal(self.backend)
        self.portal: BlockingPortal = manager.__enter__()
        self._stop.append(lambda: manager.__exit__(None, None, None))
        self.clients: list[Client] = []
        self.histories: Histories = {}

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self.portal.call(functools.partial(self._settled, function, *args, **options))

    async def _settled(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if hasattr(result, "__await__"):
            result = await result
        await self.settled()
        # A policy lets publishers wait, for 20 ms at most.
        await eventually(lambda: not self.bus.statistics()["counters"]["buffered"])
        await self.bus.log.pace()
        await self.settled()
        return result

    def make_store(self) -> Any:
        return MemoryEventStore(self.retain)

    def window(self) -> Retention:
        """What may be in memory."""
        return self.retain

    def limits(self, events: int, bytes: int) -> Limits:
        """What a client's limits are to be."""
        return Limits(events, bytes)

    async def settled(self) -> None:
        """Everything has run that can."""
        await settle()

    @initialize(
        retain=st.integers(5, 60),
        retain_bytes=st.sampled_from([1500, 100_000]),
        replay=st.sampled_from([True] * 9 + [False]),
    )
    def begin(self, retain: int, retain_bytes: int, replay: bool) -> None:
        self.retain = Retention(retain, retain_bytes)

        async def make() -> EventBus:
            plugins = Plugins(discover=False)
            self.choices = Choices()
            plugins.register(self.choices)
            self.clock = ManualClock()
            self.store = self.make_store()
            return EventBus(
                replace(self.settings, replay=replay),
                store=self.store,
                plugins=plugins,
                clock=self.clock,
            )

        self.replay = replay
        self.bus: EventBus = self.portal.call(make)
        running = self.portal.wrap_async_context_manager(self.bus)
        running.__enter__()
        self._stop.append(lambda: running.__exit__(None, None, None))
        self.histories[self.bus.epoch] = {}

        async def app() -> Any:
            from opencode_sse_plugin import Grant

            return event_app(self.bus, authorize=lambda r: Grant.everything(r.query_params["policy"]))

        self.app = self.portal.call(app)

    def record(self, event: Event, seq: int | None) -> None:
        assert seq is not None
        history = self.histories[self.bus.epoch]
        assert seq == max(history, default=self._ended_at()) + 1
        history[seq] = event

    def _ended_at(self) -> int:
        return self.bus.log.bounds.epochs[-1].began

    # Publishing.

    def named(self, event: Event) -> Event:
        self.count = getattr(self, "count", 0) + 1
        return Event(event.type, event.properties, f"evt_{self.count}", scope=event.scope)

    @rule(event=events)
    def publish(self, event: Event) -> None:
        event = self.named(event)
        self.record(event, self.call(self.bus.publish, event))

    @rule(batch=st.lists(events, min_size=1, max_size=40))
    def publish_batch(self, batch: list[Event]) -> None:
        batch = [self.named(event) for event in batch]
        for event, seq in zip(batch, self.call(self.bus.publish_batch, batch), strict=True):
            self.record(event, seq)

    @rule(burst=st.lists(events, min_size=1, max_size=30))
    def publish_burst(self, burst: list[Event]) -> None:
        burst = [self.named(event) for event in burst]
        first = max(self.histories[self.bus.epoch], default=self._ended_at()) + 1

        def publish() -> None:
            for event in burst:
                self.bus.publish_nowait(event)

        self.call(publish)
        for number, event in enumerate(burst):
            self.record(event, first + number)

    @rule(event=events)
    def publish_from_thread(self, event: Event) -> None:
        event = self.named(event)
        self.record(event, self.bus.publish_from_thread(event))
        self.call(settle)

    # Reading.

    @rule(
        filter=filters,
        route=st.sampled_from(["/event", "/event", "/global/event"]),
        policy=st.sampled_from(POLICIES),
        limit=st.sampled_from([1, 2, 5, 10, 1000]),
        limit_bytes=st.sampled_from([400, 2000, 10**6]),
        mode=st.sampled_from(["live", "live", "terminal", "follow"]),
        after=st.integers(0, 80),
    )
    @precondition(lambda self: len(self.clients) < 8)
    def attach(
        self, filter: Filter, route: str, policy: str, limit: int, limit_bytes: int, mode: str, after: int
    ) -> None:
        client = Client(len(self.clients), filter, route, policy, self.limits(limit, limit_bytes), mode)
        self.clients.append(client)
        parameters = {} if mode == "live" else {"after_seq": str(after)}
        self.connect(client, parameters, {})

    def connect(self, client: Client, parameters: dict[str, str], headers: dict[str, str]) -> None:
        if client.mode == "follow" and "after_seq" in parameters:
            parameters["follow"] = "true"
        query = [("policy", client.policy), ("limit", client.limits.events), ("bytes", client.limits.bytes)]
        query += [("client", client.number), *parameters.items()]
        query += [("session", value) for value in client.filter.sessions or ()]
        query += [("type", value) for group in client.filter.types for value in group]

        async def start() -> Connection:
            return Connection(self.app, client.route, urlencode(query), headers)

        client.connection = connection = self.portal.call(start)
        client.stalled_ever = False
        client.policies = {client.policy}
        self.portal.start_task_soon(connection.run)
        self.call(settle)

    def judged(self, client: Client, frames: list[Received]) -> Verdict:
        verdict = judge(
            frames,
            client.filter,
            self.histories,
            sees_global=client.sees_global,
            may_fold=any(policy.startswith("coalesce") or policy == "shed" for policy in client.policies),
        )
        if not client.stalled_ever and self.replay:
            # Reliable: who keeps up gets all that matches.
            told = [frame.data["properties"] for frame in frames if frame.type == "server.stream.lagged"]
            assert not told, f"a reader that keeps up was told that it lagged: {client.policies} {told}"
        return verdict

    def close(self, client: Client, kept: int | None = None) -> None:
        """Its connection is over; the client has what it read of it."""
        connection = client.connection
        assert connection is not None
        verdict = self.judged(client, connection.frames[:kept])
        client.verdicts.append(verdict)
        client.cursor = verdict.cursor or client.cursor
        client.connection = None
        client.complete = client.mode == "terminal" and connection.ending == "clean" and kept is None

    def pick(self, data: st.DataObject, *, connected: bool) -> Client | None:
        found = [client for client in self.clients if (client.connection is not None) == connected]
        number = data.draw(st.integers(0, 11))  # Whatever is there: a thread may have been faster the last time.
        return found[number % len(found)] if found else None

    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        client = self.pick(data, connected=True)
        if client is not None and client.connection is not None and client.connection.reading.is_set():
            client.stalled_ever = True
            connection = client.connection

            def stop() -> None:
                connection.reading = anyio.Event()

            self.call(stop)

    @rule(data=st.data())
    def read_on(self, data: st.DataObject) -> None:
        client = self.pick(data, connected=True)
        if client is not None and client.connection is not None:
            self.call(client.connection.reading.set)

    @rule(data=st.data(), policy=st.sampled_from(POLICIES))
    def switch(self, data: st.DataObject, policy: str) -> None:
        """Another policy takes over in mid-stream."""
        client = self.pick(data, connected=True)
        if client is not None and client.connection is not None and client.connection.ending is None:
            client.policies.add(policy)
            self.call(self.bus.set_overflow_policy, self.choices.attached[str(client.number)], policy)

    @rule(data=st.data(), cut=st.integers(0, 40))
    def cut(self, data: st.DataObject, cut: int) -> None:
        """The connection breaks; the client read all but the last few frames."""
        client = self.pick(data, connected=True)
        if client is None or client.connection is None:
            return
        connection = client.connection
        kept = max(0, len(connection.frames) - cut)
        self.leave(connection)
        self.close(client, kept)

    def leave(self, connection: Connection) -> None:
        def leave() -> None:
            connection.gone.set()
            connection.reading.set()

        self.call(leave)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        client = self.pick(data, connected=False)
        if client is None or client.complete:
            return
        parameters = {"after_seq": "0"} if client.mode == "terminal" else {}
        if client.cursor is None:
            client.verdicts.clear()
            self.connect(client, {} if client.mode == "live" else {"after_seq": "0"}, {})
        else:
            self.connect(client, parameters, {"last-event-id": str(client.cursor)})

    # What else happens.

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.call(self.clock.advance, seconds)

    @rule(back=st.integers(0, 12))
    def history_is_lost(self, back: int) -> None:
        before = dict(self.histories[self.bus.epoch])
        end = max(max(before, default=0) - back, 0)
        self.call(self.store.begin_epoch, end)
        self.histories[self.bus.epoch] = {seq: event for seq, event in before.items() if seq <= end}

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "bus"):
            self.ended_streams_are_over()
            self.bounded()
            self.bookmarkable()

    def ended_streams_are_over(self) -> None:
        for client in self.clients:
            connection = client.connection
            if connection is None or connection.ending is None:
                continue
            verdict = self.judged(client, connection.frames)
            expected = "clean" if client.mode == "terminal" else "abort"
            if verdict.reconnect:
                expected = "abort"
            if connection.frames and connection.frames[-1].data["properties"].get("reason") == "epoch":
                # Told at the beginning it is the answer, in mid-stream the stream breaks off.
                expected = "clean" if len(connection.frames) == 2 else "abort"
            assert connection.ending == expected
            self.close(client)

    def bounded(self) -> None:
        """No buffer over its limit, whatever happens."""
        status = self.portal.call(self.bus.statistics)
        assert status["store"]["events"] <= self.retain.events
        assert status["store"]["bytes"] <= max(self.retain.bytes, 400)
        channels, window = self.bus.log.channels, self.window()
        assert len(channels) <= window.events
        assert channels.bytes <= max(window.bytes, 400)
        assert all(len(channel.events) <= len(channels) for channel in channels)
        assert status["counters"]["buffered"] == 0
        assert self.bus.log.waiting == 0
        connected = sum(client.connection is not None for client in self.clients)
        assert len(status["subscribers"]) == connected

    def bookmarkable(self) -> None:
        """Whoever reads has a cursor that can be served."""
        bounds = self.portal.call(self.store.bounds)
        for client in self.clients:
            connection = client.connection
            if connection is None or not connection.reading.is_set() or not connection.frames:
                continue
            ids = [frame.id for frame in connection.frames if frame.id is not None]
            cursor = Cursor.parse(ids[-1])
            assert cursor is not None
            assert cursor.epoch is not None
            end = bounds.end_of(cursor.epoch)
            assert end is not None
            assert bounds.oldest - 1 <= cursor.seq <= end, f"{cursor} cannot be served, {bounds.oldest} is the oldest"

    def teardown(self) -> None:
        try:
            if hasattr(self, "bus"):
                self.finish()
        finally:
            for stop in reversed(self._stop):
                stop()

    def finish(self) -> None:
        """Everyone reads on to the head, over as many connections as it takes; then the accounts must balance."""
        for client in self.clients:
            if client.connection is not None:
                self.call(client.connection.reading.set)
        for _ in range(4):
            self.ended_streams_are_over()
            for client in self.clients:
                if client.connection is None and not client.complete and client.cursor is not None:
                    parameters = {"after_seq": "0"} if client.mode == "terminal" else {}
                    self.connect(client, parameters, {"last-event-id": str(client.cursor)})
        self.call(self.clock.advance, HEARTBEAT + 2)
        self.ended_streams_are_over()
        for client in self.clients:
            if client.connection is not None:
                assert client.mode != "terminal"
                self.leave(client.connection)
                self.close(client)
            self.balance(client)

    def balance(self, client: Client) -> None:
        """Across resumes: received once, or reported lost and never resumed over, is all that matched."""
        received = [event for verdict in client.verdicts for event in verdict.events]
        assert len(received) == len(set(received)), "an event came twice"
        starts = [verdict.start for verdict in client.verdicts if verdict.start is not None]
        if not starts or client.mode == "terminal":
            return
        epoch = self.bus.epoch
        folded = {
            seq
            for verdict in client.verdicts
            for folded_in, seq in verdict.folded
            if self.histories[epoch].get(seq) is self.histories.get(folded_in, {}).get(seq)
        }
        lost = {
            seq
            for verdict in client.verdicts
            for lost_in, after, last in verdict.lost
            for seq, event in self.histories.get(lost_in, {}).items()
            if after < seq <= last and self.histories[epoch].get(seq) is event
        }
        first = starts[0]
        for seq, event in self.histories[epoch].items():
            if seq <= first.seq and self.histories.get(first.epoch or "", {}).get(seq) is event:
                continue
            if client.filter.matches(event) and (client.sees_global or event.scope == "instance"):
                assert event.id in received or seq in lost or seq in folded, f"{seq} of {epoch} was lost without a word"


class Watched:
    """Mixed into a store: says whether it is at work."""

    asked = 0

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        self.asked += 1
        try:
            return await super().read(after, limit, max_bytes)
        finally:
            self.asked -= 1

    async def bounds(self) -> Bounds:
        self.asked += 1
        try:
            return await super().bounds()
        finally:
            self.asked -= 1


class WatchedStore(Watched, SQLiteEventStore):
    """An SQLite log that says so."""


class GuaranteesOverSQLite(Guarantees):
    """Over a durable store that holds more than the window does: who falls out of the window reads the store."""

    settings = Settings(heartbeat=HEARTBEAT, write_timeout=1e9, queue_max=3, queue_max_bytes=700)

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        patch = pytest.MonkeyPatch()
        patch.setattr(log, "WINDOW_EVENTS", 6)
        patch.setattr(log, "WINDOW_BYTES", 1500)
        self._stop[:0] = [self.folder.cleanup, patch.undo]

    def make_store(self) -> Any:
        return WatchedStore(Path(self.folder.name, "a.db"), self.retain, lossy=True)

    def other_store(self) -> Any:
        """What another process has open."""
        return SQLiteEventStore(self.store.path, lossy=True)

    def window(self) -> Retention:
        return Retention(6, 1500)

    def limits(self, events: int, bytes: int) -> Limits:
        """Mostly so large that the window is left before they are reached. Never so small that two events may exceed
        them: two commits may come while a reader that keeps up writes."""
        return Limits(1000, 10**6) if events > 2 else Limits(2, max(bytes, 2000))

    @rule()
    def stall_everyone(self) -> None:
        def stop() -> None:
            for client in self.clients:
                connection = client.connection
                if connection is not None and connection.reading.is_set():
                    client.stalled_ever = True
                    connection.reading = anyio.Event()

        self.call(stop)

    @rule(batch=st.lists(events, min_size=1, max_size=40))
    def publish_elsewhere(self, batch: list[Event]) -> None:
        """Another process appends."""
        batch = [self.named(event) for event in batch]

        async def append() -> list[int]:
            other = self.other_store()
            await other.open(RecordingListener())
            appended = await other.append([StoredEvent.encode(event) for event in batch])
            await other.close()
            await eventually(lambda: self.bus.head + self.bus.log.waiting >= appended.seqs[-1])
            return appended.seqs

        for event, seq in zip(batch, self.call(append), strict=True):
            self.record(event, seq)

    async def settled(self) -> None:
        await settle()
        with anyio.fail_after(10):
            while self.store.asked:
                await anyio.sleep(0.0005)
                await settle()
        if self.bus.running:
            await self.store.prune()
        await settle()


def _case(base: type[Guarantees], backend: str, examples: int) -> type[Any]:
    machine = type(f"{base.__name__}_{backend}", (base,), {"backend": backend})
    machine.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=PHASES,
    )
    case: type[Any] = machine.TestCase
    return case


TestGuaranteesOnAsyncio = pytest.mark.timeout(300)(_case(Guarantees, "asyncio", 60))
TestGuaranteesOnTrio = pytest.mark.timeout(300)(_case(Guarantees, "trio", 30))
TestGuaranteesOverSQLiteOnAsyncio = pytest.mark.timeout(300)(_case(GuaranteesOverSQLite, "asyncio", 20))
TestGuaranteesOverSQLiteOnTrio = pytest.mark.timeout(300)(_case(GuaranteesOverSQLite, "trio", 10))


@pytest.mark.chaos
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("base", [Guarantees, GuaranteesOverSQLite])
def test_guarantees_for_long(base: type[Guarantees], backend: str) -> None:
    case = _case(base, backend, int(os.environ.get("EXAMPLES", "1000")))
    case("runTest").debug()
