"""Nonsense from clients and publishers: each gets its clear answer, and a healthy subscriber beside it gets every good
event and nothing else. Nonsense below HTTP: test_bad_clients.py."""

from __future__ import annotations

import datetime
import json
from typing import Any
from urllib.parse import quote

import pytest

from opencode_sse_plugin import Event, EventBus, InvalidEvent, event_app
from opencode_sse_plugin.app import EventApp
from opencode_sse_plugin.events import MAX_SEQ
from opencode_sse_plugin.testing import Response, request, stream

from .apps import new_bus
from .witness import witnessed

pytestmark = pytest.mark.anyio

JSON, LINES = "application/json", "application/x-ndjson"


def app_of(bus: EventBus) -> EventApp:
    return event_app(bus, authorize=None, publish=True)


async def post(bus: EventBus, content: bytes, kind: str = JSON) -> Response:
    return await request(app_of(bus), "POST", "/event", content=content, headers={"content-type": kind})


# Cursors.

#: No numbers.
NO_NUMBERS = [
    "bad",
    "-1",
    "1.5",
    "1e3",
    "²",
    "1_0",
    str(MAX_SEQ + 1),
    "\uff19",
    "0x1",
    "+1",
    " 1",
    "1 ",
    "1:",
    "0" * 17,
]
NO_NUMBERS += ["9" * 10_240, "null", "[]", "1,2", "∞", "%", "-0"]
WAYS = ["?after_seq={}", "?after_seq={}&follow=true", "?last_event_id={}", "header", "header+terminal"]


async def ask(bus: EventBus, cursor: str, way: str) -> tuple[list[Any], str | None, Any]:
    """Read a stream up to its second frame; with what follows after a good event, if it is still open."""
    path, headers = "/event", {}
    if way.startswith("header"):
        headers["last-event-id"] = cursor.encode().decode("latin-1")
        path += "?after_seq=0" if way == "header+terminal" else ""
    else:
        path += way.format(quote(cursor))
    async with stream(app_of(bus), path, headers=headers) as response:
        assert response.status == 200
        frames = await response.take(2)
        if way in (WAYS[0], WAYS[4]):
            assert await response.rest() == []
            return frames, response.ending, None
        await bus.publish("good")
        return frames, None, await response.next()


@pytest.mark.parametrize("way", WAYS)
async def test_a_cursor_that_is_none(way: str) -> None:
    async with new_bus() as bus, witnessed(bus):
        await bus.publish("good")
        cursors = [*NO_NUMBERS]
        if "after_seq" in way:
            cursors += ["", f"{bus.epoch}:1"]
        else:
            cursors += ["7", ":", ":1", f"{bus.epoch}:", "a b:1", "ä:1", "x" * 65 + ":1"]
            cursors += [f"{bus.epoch}:{text}" for text in NO_NUMBERS]
        for cursor in cursors:
            head = bus.head
            (connected, expired), ending, live = await ask(bus, cursor, way)
            assert (connected.type, connected.id) == ("server.connected", None)
            assert (expired.type, expired.id) == ("server.stream.expired", f"{bus.epoch}:{head}")
            # HTTP says that a header is Latin-1.
            said = cursor.encode().decode("latin-1") if way.startswith("header") else cursor
            assert expired.properties == {
                "next": -1,
                "oldest": 1,
                "latest": head,
                "reason": "malformed",
                "requested": said.encode()[:256].decode(errors="ignore"),
                "epoch": bus.epoch,
            }
            if live is None:
                assert ending == "clean"
            else:
                assert live.type == "good"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("seq", "epoch", "reason"),
    [(2, "other", "epoch"), (99, "", "ahead"), (MAX_SEQ, "", "ahead"), (0, "", "evicted"), (1, "", "evicted")],
)
async def test_a_cursor_of_elsewhere(way: str, seq: int, epoch: str, reason: str) -> None:
    async with new_bus(retain_events=4) as bus, witnessed(bus):
        for _ in range(6):
            await bus.publish("good")
        named = epoch or bus.epoch
        cursor = f"{seq}&epoch={named}" if "after_seq" in way else f"{named}:{seq}"
        if "after_seq" in way:
            path = f"/event{way.format(cursor)}"
            async with stream(app_of(bus), path) as response:
                frames = await response.take(2)
        else:
            frames, _, _ = await ask(bus, cursor, way)
        assert [frame.type for frame in frames] == ["server.connected", "server.stream.expired"]
        told = frames[1].properties
        assert (told["reason"], told["next"], told["requested"]) == (reason, seq, f"{named}:{seq}")
        # Nobody loops: what is told with it is a cursor that can be served.
        async with stream(app_of(bus), "/event", headers={"last-event-id": frames[1].id or ""}) as response:
            assert (await response.next()).type == "server.heartbeat"


# Filters and flags.


@pytest.mark.parametrize("route", ["/event", "/global/event"])
async def test_filters_that_make_no_sense(route: str) -> None:
    many = "&".join(f"type={n:04}{'*a' * 20}" for n in range(200))
    bad = [
        *((f"{name}={value}", name) for name in FILTERS for value in ("", "%00", "%0d%0a", "%7f", "x" * 4097)),
        *((f"{name}=good&{name}=", name) for name in FILTERS),
        (many, "type"),
        *((f"{name}={value}", name) for name in ("follow", "snapshot") for value in ("", "1", "TRUE", "yes", "%00")),
    ]
    async with new_bus() as bus, witnessed(bus):
        for query, name in bad:
            for more in ("", "&after_seq=0", "&after_seq=bad"):
                answer = await request(app_of(bus), "GET", f"{route}?{query}{more}")
                assert (answer.status, answer.json()["parameter"]) == (400, name)
                assert answer.json()["error"]
            assert (await request(app_of(bus), "HEAD", f"{route}?{query}")).status == 400
        for header in ("%ff", "%00", "/a%0a", "\xff%ff", "%C3", "%" * 3 + "%ed%a0%80"):
            answer = await request(app_of(bus), "GET", route, headers={"x-opencode-directory": header})
            assert (answer.status, answer.json()["parameter"]) in ((400, "x-opencode-directory"), (400, "directory"))
        await bus.publish("good")


FILTERS = ("session", "type", "directory", "workspace")


@pytest.mark.parametrize(
    "query",
    ["unknown=%00", "=", "&&&=&", "%", "%zz", "type[]=x", "a=b=c", "?", "TYPE=", "%00=%00", "+", ";", "auth_token="],
)
async def test_what_is_none_of_ours_is_ignored(query: str) -> None:
    async with new_bus() as bus, witnessed(bus), stream(app_of(bus), f"/event?{query}") as response:
        assert (await response.next()).type == "server.connected"
        await bus.publish("good")
        assert (await response.next()).type == "good"


# Types, ids, properties.

BREAKING = ["\r", "\n", "\0", "\r\n", "\n\ndata: {}", "\x1f", "\x7f", "\ud800", "\udfff", "\udc80\ud800"]


@pytest.mark.parametrize("text", BREAKING, ids=ascii)
async def test_names_that_could_break_out_are_refused(text: str) -> None:
    async with new_bus() as bus, witnessed(bus):
        for index, place in enumerate(("a" + text, text, text + "a", "a" + text + "a") * 2):
            event = Event(place) if index < 4 else Event("a", {}, id=place)
            with pytest.raises(InvalidEvent):
                await bus.publish(event)
            with pytest.raises(InvalidEvent):
                bus.publish_nowait(event)
            with pytest.raises(InvalidEvent) as refused:
                await bus.publish_batch([Event("good"), event])
            assert refused.value.index == 1
            body = [{"type": "good"}, {"type": event.type, **({"id": event.id} if event.id else {})}]
            for kind, content in ((JSON, json.dumps(body)), (LINES, "\n".join(map(json.dumps, body)))):
                answer = await post(bus, content.encode(), kind)
                assert (answer.status, answer.json()["index"]) == (400, 1)
                assert ("id" if event.id else "type") in answer.json()["error"]
        assert bus.head == 0


@pytest.mark.parametrize(
    "text", [*BREAKING[:-1], "\u2028", "\u0085", "\ufeff", "data: x\n\n", "😀", "\x1b[31m"], ids=ascii
)
async def test_properties_may_hold_anything(text: str) -> None:
    properties = {text: [text, {"a" + text: text * 3}], "sessionID": text}
    async with new_bus() as bus, witnessed(bus):
        await bus.publish("good", properties)
        assert (await post(bus, json.dumps({"type": "good", "properties": properties}).encode())).status == 200
        await bus.publish(Event("good", properties, directory=text, project=text, workspace=text, extra={text: text}))
        for route in ("/event", "/global/event"):
            async with stream(app_of(bus), f"{route}?after_seq=0") as response:
                _, *events = await response.rest()
            assert [event.properties for event in events] == [properties] * 3
            assert events[2].payload[text] == text
        assert events[2].data["directory"] == text


@pytest.mark.parametrize(
    "type", ["server.connected", "server.heartbeat", "server.stream.lagged", "server.stream.", "server.stream.x\u2028"]
)
async def test_types_of_ours_are_refused(type: str) -> None:
    async with new_bus() as bus, witnessed(bus):
        with pytest.raises(InvalidEvent, match="the stream's own"):
            await bus.publish(type)
        answer = await post(bus, json.dumps({"type": type}).encode())
        assert answer.status == 400
        assert "the stream's own" in answer.json()["error"]


def circular() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["self"] = [found]
    return found


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "value",
    [
        object(),
        b"bytes",
        {1, 2},
        datetime.datetime(2026, 1, 1),
        circular(),
        deep(200),
        deep(5000),
        10**5000,
        {(1, 2): 3},
    ],
    ids=["object", "bytes", "set", "datetime", "circular", "deep", "deeper", "digits", "key"],
)
async def test_an_event_that_cannot_be_written_among_good_ones(value: Any) -> None:
    async with new_bus() as bus, witnessed(bus):
        await bus.publish("good")
        with pytest.raises(InvalidEvent):
            await bus.publish("bad", {"x": value})
        bus.publish_nowait("good")
        with pytest.raises(InvalidEvent):
            bus.publish_nowait("bad", {"x": value})
        with pytest.raises(InvalidEvent) as refused:
            await bus.publish_batch([Event("good"), Event("good"), Event("bad", {"x": value})])
        assert refused.value.index == 2
        await bus.publish_batch([Event("good"), Event("good")])
        assert bus.head == 4


async def test_fifty_megabytes() -> None:
    pad = "x" * 50_000_000
    async with new_bus() as bus, witnessed(bus):
        with pytest.raises(InvalidEvent, match="max_event_bytes") as refused:
            await bus.publish("bad", {"pad": pad})
        assert refused.value.too_large
        await bus.publish("good")
        body = b'{"type":"bad","properties":{"pad":"%b"}}' % pad.encode()
        assert (await post(bus, body)).status == 413
        chunks = [body[at : at + 65536] for at in range(0, len(body), 65536)]
        answer = await request(app_of(bus), "POST", "/event", content=chunks, headers={"content-type": LINES})
        assert (answer.status, answer.json()["error"]) == (413, "the body is larger than max_request_bytes (16777216)")
        # One that the limit of a request lets through, and the limit of an event does not.
        answer = await post(
            bus, b'[{"type":"good"},{"type":"bad","properties":{"pad":"%b"}}]' % pad[:2_000_000].encode()
        )
        assert (answer.status, answer.json()["index"]) == (413, 1)
        assert bus.head == 1


# Bodies.


@pytest.mark.parametrize(
    "bad", [b'{"type":', b'{"properties":{}}', b"[]", b"7", b'{"type":"server.heartbeat"}', b"\xff", b"NaN"]
)
@pytest.mark.parametrize("at", [0, 57, 99])
async def test_one_bad_event_in_a_batch(bad: bytes, at: int) -> None:
    events = [b'{"type":"good","properties":{"n":%d}}' % n for n in range(100)]
    events[at] = bad
    async with new_bus() as bus, witnessed(bus):
        answer = await post(bus, b"\n".join(events), LINES)
        assert (answer.status, answer.json()["index"]) == (400, at)
        answer = await post(bus, b"[" + b",".join(events) + b"]")
        assert answer.status == 400
        assert bus.head == 0
        assert (await post(bus, b"\n".join(events[:at] + events[at + 1 :]), LINES)).json()["last"] == 99


async def test_lines_cut_anywhere_are_refused_or_whole() -> None:
    body = b'{"type":"good","properties":{"n":1}}\n{"type":"good","properties":{"text":"\xc3\xa4"}}\n'
    async with new_bus() as bus, witnessed(bus):
        for end in range(1, len(body)):
            before = bus.head
            answer = await post(bus, body[:end], LINES)
            lines = body[:end].splitlines()
            try:
                whole = len([json.loads(line) for line in lines])
            except ValueError:
                assert (answer.status, answer.json()["index"]) == (400, len(lines) - 1)
                whole = 0
            assert bus.head - before == whole


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "text/plain",
        "text/plain; application/json",
        "application/json+x",
        "application/x-www-form-urlencoded",
        "*/*",
    ],
)
async def test_a_body_of_another_kind(kind: str) -> None:
    async with new_bus() as bus, witnessed(bus):
        answer = await request(app_of(bus), "POST", "/event", content=b'{"type":"bad"}', headers={"content-type": kind})
        assert answer.status == 415
        assert bus.head == 0
