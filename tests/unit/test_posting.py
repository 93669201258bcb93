"""``POST /event``: whole or not at all, and an answer that says what and where."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opencode_sse_plugin import Event, EventBus, Settings, event_app, hookimpl
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import Response, request, stream

pytestmark = pytest.mark.anyio

NDJSON = {"content-type": "application/x-ndjson"}


async def post(bus: EventBus, content: bytes, kind: str = "application/json") -> Response:
    app = event_app(bus, authorize=None, publish=True)
    return await request(app, "POST", "/event", content=content, headers={"content-type": kind})


async def post_json(bus: EventBus, value: Any) -> Response:
    return await post(bus, json.dumps(value).encode())


async def test_one_event(sse_bus: EventBus) -> None:
    answer = await post_json(sse_bus, {"type": "a", "properties": {"x": 1}, "id": "evt_1", "more": [1]})
    assert answer.json() == {"epoch": sse_bus.epoch, "first": 1, "last": 1, "duplicates": 0}
    async with stream(event_app(sse_bus, authorize=None), "/event?after_seq=0") as response:
        assert (await response.rest())[1].payload == {"id": "evt_1", "type": "a", "properties": {"x": 1}, "more": [1]}


async def test_a_batch_and_lines(sse_bus: EventBus) -> None:
    assert (await post_json(sse_bus, [{"type": "a"}, {"type": "b"}])).json()["last"] == 2
    lines = b'{"type":"c"}\n\n{"type":"d"}\r\n'
    answer = await post(sse_bus, lines, "application/x-ndjson; charset=utf-8")
    assert answer.json() == {"epoch": sse_bus.epoch, "first": 3, "last": 4, "duplicates": 0}


async def test_known_events_answer_their_numbers(sse_bus: EventBus) -> None:
    await post_json(sse_bus, [{"type": "a", "id": "1"}, {"type": "a", "id": "2"}])
    answer = await post_json(sse_bus, [{"type": "a", "id": "2"}, {"type": "a", "id": "3"}, {"type": "a", "id": "1"}])
    assert answer.json() == {"epoch": sse_bus.epoch, "first": 1, "last": 3, "duplicates": 2, "seqs": [2, 3, 1]}


class Veto:
    @hookimpl
    def sse_event_publish(self, event: Event) -> bool | None:
        return False if event.type == "no" else None


async def test_what_a_plugin_drops_is_null() -> None:
    plugins = Plugins(discover=False)
    plugins.register(Veto())
    async with EventBus(Settings(), plugins=plugins) as bus:
        answer = await post_json(bus, [{"type": "no"}, {"type": "a"}, {"type": "no"}])
        assert answer.json() == {"epoch": bus.epoch, "first": 1, "last": 1, "duplicates": 0, "seqs": [None, 1, None]}
        answer = await post_json(bus, {"type": "no"})
        assert answer.json() == {"epoch": bus.epoch, "first": None, "last": None, "duplicates": 0, "seqs": [None]}


@pytest.mark.parametrize(
    ("content", "kind", "status", "index"),
    [
        (b"", "application/json", 400, 0),
        (b"[]", "application/json", 400, 0),
        (b"{", "application/json", 400, 0),
        (b"\xff", "application/json", 400, 0),
        (b"[1]", "application/json", 400, 0),
        (b"null", "application/json", 400, 0),
        (b'[{"type":"a"},{"properties":{}}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":1}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"server.heartbeat"}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b","properties":[]}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b\\n"}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b","id":"x\\u0000"}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b","id":7}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b","directory":7}]', "application/json", 400, 1),
        (b'[{"type":"a"},{"type":"b","scope":"x"}]', "application/json", 400, 1),
        (b'{"type":"a","properties":{"x":NaN}}', "application/json", 400, 0),
        (b'{"type":"a"}\n{"type":"b"}\n{"type":', "application/x-ndjson", 400, 2),
        (b"[" * 100_000, "application/json", 400, 0),
    ],
)
async def test_a_bad_event_is_named_and_nothing_is_stored(
    sse_bus: EventBus, content: bytes, kind: str, status: int, index: int
) -> None:
    answer = await post(sse_bus, content, kind)
    assert (answer.status, answer.json()["index"]) == (status, index)
    assert answer.json()["error"]
    assert sse_bus.head == 0


async def test_a_body_that_ends_early_is_400_and_nothing_is_stored(sse_bus: EventBus) -> None:
    """The client is gone and gets no answer; the server's log must not get a traceback either."""
    incoming = iter(
        [
            {"type": "http.request", "body": b'{"type":"a"}\n{"ty', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent: list[Any] = []

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in NDJSON.items()]
    scope = {"type": "http", "method": "POST", "path": "/event", "query_string": b"", "headers": headers}
    await event_app(sse_bus, authorize=None, publish=True)(scope, receive, send)
    assert sent[0]["status"] == 400
    assert sse_bus.head == 0


async def test_too_large_is_413() -> None:
    async with EventBus(Settings(max_event_bytes=100, max_request_bytes=1000), plugins=Plugins(discover=False)) as bus:
        assert (await post_json(bus, {"type": "a", "properties": {"pad": "x" * 200}})).status == 413
        assert (await post(bus, b"x" * 1001)).status == 413
        assert bus.head == 0


async def test_lone_surrogates_travel(sse_bus: EventBus) -> None:
    assert (await post(sse_bus, b'{"type":"a","properties":{"x":"\\ud800"}}')).status == 200
    async with stream(event_app(sse_bus, authorize=None), "/event?after_seq=0") as response:
        assert (await response.rest())[1].properties == {"x": "\ud800"}
