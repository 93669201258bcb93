"""The stream over HTTP, on both routes: the seed's own tests by behaviour, and the rules beside them."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from opencode_sse_plugin import Event, EventBus, Filter, Grant, Limits, Settings, event_app
from opencode_sse_plugin.app import EventApp
from opencode_sse_plugin.events import MAX_SEQ
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.subscriber import Subscriber
from opencode_sse_plugin.testing import ManualClock, Response, request, settle, stream

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("route", ["/event", "/global/event"])]


class Bus(EventBus):
    """A bus with nothing installed; time stands still."""

    def __init__(self, store: MemoryEventStore | None = None, **settings: Any) -> None:
        super().__init__(Settings(**settings), store=store, plugins=Plugins(discover=False), clock=ManualClock())


def app_of(bus: EventBus, **options: Any) -> EventApp:
    return event_app(bus, authorize=None, publish=True, **options)


async def get(bus: EventBus, route: str, query: str = "", **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await request(app_of(bus), "GET", f"{route}{query}", headers=named)


# What the proposal to opencode tests.


@pytest.mark.parametrize("queue_max", [1000, 1])
async def test_expired_when_replay_is_off(route: str, queue_max: int) -> None:
    async with Bus(replay=False, queue_max=queue_max) as bus:
        await bus.publish("a")
        async with stream(app_of(bus), f"{route}?after_seq=0") as response:
            connected, expired = await response.rest()
            assert (connected.type, expired.type) == ("server.connected", "server.stream.expired")
            assert response.ending == "clean"
            assert (expired.properties["next"], expired.properties["oldest"], expired.properties["latest"]) == (0, 0, 0)
            assert expired.properties["reason"] == "disabled"


@pytest.mark.parametrize("queue_max", [1000, 1])
async def test_expired_when_the_cursor_is_older_than_the_oldest_event(route: str, queue_max: int) -> None:
    async with Bus(retain_events=3, queue_max=queue_max) as bus:
        for _ in range(10):
            await bus.publish("a")
        async with stream(app_of(bus), f"{route}?after_seq=2") as response:
            connected, expired = await response.rest()
            assert connected.type == "server.connected"
            assert connected.id is None
            assert expired.id == f"{bus.epoch}:10"
            assert expired.properties == {
                "next": 2,
                "oldest": 8,
                "latest": 10,
                "reason": "evicted",
                "requested": "2",
                "epoch": bus.epoch,
            }


@pytest.mark.parametrize("queue_max", [1000, 1])
@pytest.mark.parametrize(
    "cursor", ["bad", "-1", "1.5", "1e3", "%C2%B2", "1_0", "", "+1", "%201", str(MAX_SEQ + 1), "9" * 10_000]
)
async def test_expired_when_the_cursor_is_malformed(route: str, cursor: str, queue_max: int) -> None:
    async with Bus(queue_max=queue_max) as bus:
        await bus.publish("a")
        async with stream(app_of(bus), f"{route}?after_seq={cursor}") as response:
            assert response.status == 200
            connected, expired = await response.rest()
            assert connected.type == "server.connected"
            assert expired.properties["next"] == -1
            assert expired.properties["reason"] == "malformed"
            assert len(expired.properties["requested"].encode()) <= 256


@pytest.mark.parametrize("queue_max", [1000, 1])
async def test_a_valid_replay_holds_the_events_and_ends_cleanly(route: str, queue_max: int) -> None:
    async with Bus(queue_max=queue_max) as bus:
        for n in range(1, 21):
            await bus.publish("a", {"n": n})
        async with stream(app_of(bus), f"{route}?after_seq=5") as response:
            connected, *events = await response.rest()
            assert connected.type == "server.connected"
            assert connected.id == f"{bus.epoch}:5"
            assert [event.properties["n"] for event in events] == list(range(6, 21))
            assert [event.id for event in events] == [f"{bus.epoch}:{n}" for n in range(6, 21)]
            assert response.ending == "clean"


async def test_the_number_before_the_oldest_is_served(route: str) -> None:
    async with Bus(retain_events=3) as bus:
        for _ in range(10):
            await bus.publish("a")
        _, *events = [frame for frame in await _replay(bus, route, 7)]
        assert [event.cursor.seq for event in events] == [8, 9, 10]


async def _replay(bus: EventBus, route: str, after: int) -> list[Any]:
    async with stream(app_of(bus), f"{route}?after_seq={after}") as response:
        return await response.rest()


async def test_a_burst_at_limit_one_with_a_stalled_reader_is_told(route: str) -> None:
    async with Bus(queue_max=1, retain_events=5000) as bus, stream(app_of(bus), route, window=4096) as response:
        assert (await response.next()).type == "server.connected"
        for _ in range(2000):
            await bus.publish("a", {"pad": "x" * 128})
        frames = await response.rest()
        lagged = frames[-1]
        assert lagged.type == "server.stream.lagged"
        assert lagged.id is None
        assert response.ending == "abort"
        told = lagged.properties
        assert (told["limit"], told["exceeded"], told["action"], told["policy"]) == (
            1,
            "events",
            "reconnect",
            "disconnect",
        )
        received = [frame.cursor.seq for frame in frames[:-1]]
        assert told["dropped"] > 1
        assert received == list(range(1, told["first"]))
        assert told["last"] - told["first"] + 1 == told["dropped"]
        assert told["queued"] == told["dropped"] == sum(told["byType"].values())
        assert told["lastCursor"] == f"{bus.epoch}:{told['first'] - 1}"
        async with stream(app_of(bus), route, headers={"last-event-id": told["lastCursor"]}) as resumed:
            got = [frame.cursor.seq for frame in await resumed.take(2001 - len(received))]
            assert got == list(range(told["first"] - 1, 2001))


async def test_connected_comes_before_expired(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), route, headers={"last-event-id": "nonsense"}) as response:
        assert [frame.type for frame in await response.take(2)] == ["server.connected", "server.stream.expired"]


# Reading.


async def test_headers(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), route) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "connection" not in response.headers
        first = await response.next()
        assert (first.retry, first.id) == (1000, f"{bus.epoch}:0")


async def test_head_starts_no_stream(route: str) -> None:
    async with Bus() as bus:
        answer = await request(app_of(bus), "HEAD", route)
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["content-type"] == "text/event-stream"
        assert bus.statistics()["counters"]["attached"] == 0


async def test_resume_begins_with_a_heartbeat_and_goes_on_live(route: str) -> None:
    async with Bus() as bus:
        for n in range(1, 6):
            await bus.publish("a", {"n": n})
        async with stream(app_of(bus), route, headers={"last-event-id": f"{bus.epoch}:2"}) as response:
            frames = await response.take(4)
            assert [frame.type for frame in frames] == ["server.heartbeat", "a", "a", "a"]
            assert frames[0].id == f"{bus.epoch}:2"
            await bus.publish("a", {"n": 6})
            assert (await response.next()).properties["n"] == 6


async def test_the_header_wins_over_the_query(route: str) -> None:
    async with Bus() as bus:
        for n in range(1, 4):
            await bus.publish("a", {"n": n})
        headers = {"last-event-id": f"{bus.epoch}:2"}
        async with stream(app_of(bus), f"{route}?last_event_id={bus.epoch}:0", headers=headers) as response:
            assert (await response.take(2))[1].properties["n"] == 3


async def test_an_empty_header_is_no_header(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), route, headers={"last-event-id": ""}) as response:
        assert (await response.next()).type == "server.connected"


async def test_follow_replays_and_stays(route: str) -> None:
    async with Bus() as bus:
        await bus.publish("a", {"n": 1})
        async with stream(app_of(bus), f"{route}?after_seq=0&follow=true") as response:
            assert [frame.type for frame in await response.take(2)] == ["server.connected", "a"]
            await bus.publish("a", {"n": 2})
            assert (await response.next()).properties["n"] == 2


async def test_a_terminal_replay_with_last_event_id_takes_its_number(route: str) -> None:
    async with Bus() as bus:
        for n in range(1, 4):
            await bus.publish("a", {"n": n})
        headers = {"last-event-id": f"{bus.epoch}:2"}
        async with stream(app_of(bus), f"{route}?after_seq=0", headers=headers) as response:
            connected, event = await response.rest()
            assert connected.type == "server.connected"
            assert event.properties["n"] == 3
            assert response.ending == "clean"


async def test_an_eventsource_that_has_everything_is_stopped_by_204(route: str) -> None:
    async with Bus() as bus:
        await bus.publish("a", {"sessionID": "s1"})
        await bus.publish("b", {"sessionID": "s2"})
        cursor = f"{bus.epoch}:1"
        everything = await get(bus, route, "?after_seq=0", last_event_id=f"{bus.epoch}:2", accept="text/event-stream")
        assert everything.status == 204
        filtered = await get(bus, route, "?after_seq=0&session=s1", last_event_id=cursor, accept="text/event-stream")
        assert filtered.status == 204
        more = await get(bus, route, "?after_seq=0", last_event_id=cursor, accept="text/event-stream")
        assert more.status == 200
        sdk = await get(bus, route, "?after_seq=0", last_event_id=f"{bus.epoch}:2", accept="*/*")
        assert sdk.status == 200


@pytest.mark.parametrize(
    ("cursor", "reason", "next"),
    [("other:1", "epoch", 1), ("{epoch}:99", "ahead", 99), ("{epoch}:", "malformed", -1), ("7", "malformed", -1)],
)
async def test_a_resume_that_cannot_be_served_goes_live_at_the_head(
    route: str, cursor: str, reason: str, next: int
) -> None:
    async with Bus() as bus:
        await bus.publish("a")
        cursor = cursor.format(epoch=bus.epoch)
        async with stream(app_of(bus), route, headers={"last-event-id": cursor}) as response:
            connected, expired = await response.take(2)
            assert connected.id is None
            assert expired.id == f"{bus.epoch}:1"
            assert (expired.properties["reason"], expired.properties["next"]) == (reason, next)
            assert expired.properties["requested"] == cursor
            await bus.publish("b")
            assert (await response.next()).type == "b"


async def test_an_integer_cursor_with_an_epoch_is_as_safe_as_a_full_one(route: str) -> None:
    async with Bus() as bus:
        await bus.publish("a")
        async with stream(app_of(bus), f"{route}?after_seq=0&epoch=other") as response:
            assert (await response.take(2))[1].properties["reason"] == "epoch"
        async with stream(app_of(bus), f"{route}?after_seq=0&epoch={bus.epoch}") as response:
            assert (await response.take(2))[1].type == "a"


async def test_a_new_epoch_in_mid_stream_is_told_only_to_who_is_beyond_its_end(route: str) -> None:
    store = MemoryEventStore()
    async with Bus(store) as bus:
        await bus.publish("a")
        async with stream(app_of(bus), f"{route}?after_seq=0&follow=true") as behind:
            await behind.take(2)
            await bus.publish("b")
            async with stream(app_of(bus), route) as level:
                await level.next()
                old = bus.epoch
                store.begin_epoch(1)
                expired = await level.next()
                assert expired.type == "server.stream.expired"
                assert expired.properties["requested"] == f"{old}:2"
                assert expired.id == f"{bus.epoch}:1"
                assert expired.id != f"{old}:1"


# Filters.


@pytest.mark.parametrize(
    ("query", "seen"),
    [
        ("session=s1", "a1"),
        ("session=s1&session=s2", "a1a2"),
        ("type=b*", "b"),
        ("type=b*&type=a1", "a1b"),
        ("type=a*&session=s2", "a2"),
        ("directory=/x", "a1b"),
        ("unknown=1", "a1a2b"),
    ],
)
async def test_filters(route: str, query: str, seen: str) -> None:
    async with Bus() as bus:
        await bus.publish(Event("a1", {"sessionID": "s1"}, directory="/x"))
        await bus.publish(Event("a2", {"sessionID": "s2"}, directory="/y"))
        await bus.publish(Event("b", {}))
        async with stream(app_of(bus), f"{route}?after_seq=0&{query}") as response:
            assert "".join(frame.type for frame in (await response.rest())[1:]) == seen


async def test_the_directory_header_is_uri_encoded(route: str) -> None:
    async with Bus() as bus:
        await bus.publish(Event("a", {}, directory="/ä b"))
        await bus.publish(Event("b", {}, directory="/c"))
        headers = {"x-opencode-directory": "/%C3%A4%20b"}
        async with stream(app_of(bus), f"{route}?after_seq=0", headers=headers) as response:
            assert [frame.type for frame in (await response.rest())[1:]] == ["a"]


@pytest.mark.parametrize("name", ["session", "type", "directory", "workspace"])
@pytest.mark.parametrize("value", ["", "%00", "a%0Ab", "x" * 5000])
async def test_a_malformed_filter_is_400_and_names_the_parameter(route: str, name: str, value: str) -> None:
    async with Bus() as bus:
        answer = await get(bus, route, f"?{name}={value}")
        assert answer.status == 400
        assert answer.json()["parameter"] == name
        assert answer.json()["error"]


# Falling behind, liveness, ending.


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
async def test_a_dropping_policy_tells_in_place_and_goes_on(route: str, policy: str) -> None:
    async with Bus(queue_max=10, overflow=policy) as bus, stream(app_of(bus), route, window=0) as response:
        await response.next()
        for n in range(1, 31):
            await bus.publish("a", {"n": n})
            await anyio.lowlevel.checkpoint()
        frames = [await response.next()]
        while frames[-1].properties.get("n") != 30 and frames[-1].properties.get("last") != 30:
            frames.append(await response.next())
        told = [frame for frame in frames if frame.type == "server.stream.lagged"]
        assert told
        assert all(frame.properties["action"] == "continue" for frame in told)
        received = [frame.properties["n"] for frame in frames if frame.type == "a"]
        assert received == sorted(set(received))
        assert len(received) + sum(frame.properties["dropped"] for frame in told) == 30
        await bus.publish("b")
        assert (await response.next()).type == "b"


async def test_over_http_1_0_disconnect_reads_on_from_the_store(route: str) -> None:
    async with Bus(queue_max=2) as bus, stream(app_of(bus), route, http_version="1.0", window=0) as response:
        await response.next()
        for n in range(1, 31):
            await bus.publish("a", {"n": n})
            await anyio.lowlevel.checkpoint()
        assert [frame.properties["n"] for frame in await response.take(30)] == list(range(1, 31))


async def test_draining_tells_with_a_retry_and_aborts(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), route) as response:
        await response.next()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.drain)
            draining = await response.next()
            assert draining.type == "server.stream.draining"
            assert draining.id is None
            assert draining.retry == draining.properties["retry"]
            assert 1000 <= draining.retry <= 2000
            assert await response.rest() == []
            assert response.ending == "abort"


async def test_new_streams_and_posts_get_503_while_draining(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), route, window=0) as stalled:
        await stalled.until_blocked()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.drain)
            await settle()
            assert not bus.running
            assert (await get(bus, route)).status == 503
            refused = await request(app_of(bus), "POST", "/event", json={"type": "a"})
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")


async def test_the_instances_disposal_ends_the_stream_of_its_directory(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), f"{route}?directory=/x") as response:
        await response.next()
        await bus.publish(Event("server.instance.disposed", {"directory": "/x"}, directory="/x"))
        assert (await response.next()).type == "server.instance.disposed"
        if route == "/event":
            assert await response.rest() == []
            assert response.ending == "clean"
        else:
            await bus.publish("a")
            assert (await response.next()).type == "a"


async def test_an_expired_grant_aborts_the_stream(route: str) -> None:
    clock = ManualClock()
    expires_at = clock.wall() + 1
    bus = EventBus(Settings(), plugins=Plugins(discover=False), clock=clock)

    def authorize(request: Any) -> Grant:
        return Grant("caller", Filter(), expires_at=expires_at)

    async with bus, stream(event_app(bus, authorize=authorize), route) as response:
        await response.next()
        await clock.advance(1.5)
        assert await response.rest() == []
        assert response.ending == "abort"


async def test_too_many_subscribers_get_503_with_retry_after(route: str) -> None:
    async with Bus(max_subscribers=1) as bus, stream(app_of(bus), route):
        refused = await get(bus, route)
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) > 0


async def test_a_global_event_is_seen_on_the_global_route_only(route: str) -> None:
    async with Bus() as bus:
        twin = Event("sync", None, id="evt_1", scope="global", extra={"syncEvent": {"seq": 1}})
        await bus.publish(Event("a", {}, id="evt_1"))
        await bus.publish(twin)
        async with stream(app_of(bus), f"{route}?after_seq=0") as response:
            events = (await response.rest())[1:]
        if route == "/event":
            assert [event.payload for event in events] == [{"id": "evt_1", "type": "a", "properties": {}}]
        else:
            assert events[1].payload == {"id": "evt_1", "type": "sync", "syncEvent": {"seq": 1}}


async def test_places_are_shown_on_the_global_route_only(route: str) -> None:
    async with Bus() as bus:
        await bus.publish(Event("a", {}, directory="/ä", project="p", workspace="w"))
        async with stream(app_of(bus), f"{route}?after_seq=0") as response:
            event = (await response.rest())[1]
        places = {key: value for key, value in event.data.items() if key in ("directory", "project", "workspace")}
        assert places == ({} if route == "/event" else {"directory": "/ä", "project": "p", "workspace": "w"})


async def test_status_tells_of_the_subscriber(route: str) -> None:
    async with Bus() as bus, stream(app_of(bus), f"{route}?session=s1") as response:
        await response.next()
        await bus.publish("a", {"sessionID": "s1"})
        await response.next()
        status = (await request(app_of(bus), "GET", "/event/status")).json()
        (subscriber,) = status["subscribers"]
        assert subscriber["route"] == route
        assert subscriber["filter"] == {"session": ["s1"]}
        assert subscriber["policy"] == "disconnect"
        assert subscriber["delivered"] == 1
        assert subscriber["lag"]["events"] == 0
        assert status["store"]["kind"] == "memory"
        assert status["store"]["latest"] == 1
        assert status["counters"]["published"] == 1
        assert status["pid"] > 0


async def test_limits_of_a_subscriber_are_its_own(route: str) -> None:
    class Narrow:
        def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
            subscriber.limits = Limits(1, 1000)

    from opencode_sse_plugin import hookimpl

    Narrow.sse_subscriber_attach = hookimpl(Narrow.sse_subscriber_attach)  # type: ignore[method-assign]
    async with Bus() as bus:
        bus.plugins.register(Narrow())
        async with stream(app_of(bus), route, window=0) as response:
            await response.next()
            for _ in range(5):
                await bus.publish("a")
                await anyio.lowlevel.checkpoint()
            lagged = (await response.rest())[-1]
            assert lagged.properties["limit"] == 1
