"""Who is let in."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from opencode_sse_plugin import BasicPassword, EventBus, Filter, Grant, Reject, event_app
from opencode_sse_plugin.security import LoopbackGuard, is_loopback
from opencode_sse_plugin.testing import request, stream

pytestmark = pytest.mark.anyio


def basic(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# Passwords.


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"authorization": f"Basic {basic('opencode:secret')}"}, "", 200),
        ({"authorization": f"basic {basic('opencode:secret')}"}, "", 200),
        ({}, f"?auth_token={basic('opencode:secret')}", 200),
        ({}, "", 401),
        ({"authorization": f"Basic {basic('opencode:wrong')}"}, "", 401),
        ({"authorization": f"Basic {basic('other:secret')}"}, "", 401),
        ({"authorization": f"Basic {basic('opencode:secret2')}"}, "", 401),
        ({"authorization": "Basic ???"}, "", 401),
        ({"authorization": "Basic"}, "", 401),
        ({"authorization": "Bearer secret"}, "", 401),
        ({}, "?auth_token=%00", 401),
        ({"authorization": "Basic \u00e4"}, "", 401),
    ],
)
async def test_opencodes_kind_of_password(sse_bus: EventBus, headers: dict[str, str], query: str, status: int) -> None:
    app = event_app(sse_bus, authorize=BasicPassword("secret"))
    answer = await request(app, "HEAD", f"/event{query}", headers=headers)
    assert answer.status == status
    if status == 401:
        assert answer.headers["www-authenticate"] == 'Basic realm="Secure Area"'


def test_an_empty_password_is_no_password() -> None:
    with pytest.raises(ValueError, match="authorize=None"):
        BasicPassword("")


def test_the_comparison_takes_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return False

    monkeypatch.setattr("hmac.compare_digest", compare)
    scope: dict[str, Any] = {"type": "http", "headers": [], "query_string": b"auth_token=" + basic("a:b").encode()}
    with pytest.raises(Reject):
        BasicPassword("secret")(Request(scope))
    assert compared == [(b"a:b", b"opencode:secret")]


# Grants.


async def test_a_grant_narrows_live_replay_and_what_a_filter_may_ask(sse_bus: EventBus) -> None:
    app = event_app(sse_bus, authorize=lambda request: Grant("ann", Filter.of(session="ann")))
    for who in ("ann", "bob", "ann", "bob"):
        await sse_bus.publish("a", {"sessionID": who})
    for query in ("?after_seq=0", "?after_seq=0&session=ann&session=bob"):
        async with stream(app, f"/event{query}") as response:
            assert [frame.cursor.seq for frame in (await response.rest())[1:] if frame.cursor] == [1, 3]
    async with stream(app, "/event?after_seq=0&session=bob") as response:
        assert [frame.type for frame in await response.rest()] == ["server.connected"]
    # A cursor that another user got says nothing about that user's events.
    async with stream(app, "/event", headers={"last-event-id": f"{sse_bus.epoch}:1"}) as response:
        assert [frame.properties.get("sessionID") for frame in await response.take(2)] == [None, "ann"]
        await sse_bus.publish("a", {"sessionID": "bob"})
        await sse_bus.publish("b", {"sessionID": "ann"})
        assert (await response.next()).type == "b"


@pytest.mark.parametrize("exists", [True, False])
async def test_the_answer_does_not_tell_whether_anothers_events_exist(sse_bus: EventBus, exists: bool) -> None:
    app = event_app(sse_bus, authorize=lambda request: Grant("ann", Filter.of(session="ann")))
    await sse_bus.publish("a", {"sessionID": "bob" if exists else "carl"})
    async with stream(app, "/event?after_seq=0&session=bob") as response:
        (connected,) = await response.rest()
        assert (connected.type, connected.properties, response.ending) == ("server.connected", {}, "clean")


async def test_status_shows_only_what_the_caller_may_see(sse_bus: EventBus) -> None:
    def authorize(request: Request) -> Grant:
        who = request.headers["x-who"]
        return Grant.everything(who) if who == "root" else Grant(who, Filter.of(session=who))

    app = event_app(sse_bus, authorize=authorize)
    async with stream(app, "/event", headers={"x-who": "ann"}), stream(app, "/event", headers={"x-who": "bob"}):
        for who, seen in (("ann", ["ann"]), ("root", ["ann", "bob"])):
            status = (await request(app, "GET", "/event/status", headers={"x-who": who})).json()
            assert [subscriber["caller"] for subscriber in status["subscribers"]] == seen


@pytest.mark.parametrize("wrong", [True, "ann", {"caller": "ann"}])
async def test_nonsense_from_authorize_lets_nobody_in(sse_bus: EventBus, wrong: Any) -> None:
    answer = await request(event_app(sse_bus, authorize=lambda request: wrong), "GET", "/event")
    assert answer.status == 500


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_failing_authorize_lets_nobody_in_and_is_logged(
    sse_bus: EventBus, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(request: Request) -> Grant:
        raise LookupError("no database")

    async def fails_later(request: Request) -> Grant:
        raise LookupError("no database")

    app = event_app(sse_bus, authorize=fails if kind == "sync" else fails_later, publish=True)
    for method, path in (("GET", "/event"), ("HEAD", "/event"), ("POST", "/event"), ("GET", "/event/status")):
        answer = await request(app, method, path)
        assert (answer.status, b"database" in answer.body) == (500, False)
        record = caplog.records.pop()
        assert record.exc_info is not None
        assert record.exc_info[0] is LookupError
    assert sse_bus.statistics()["counters"]["attached"] == 0


async def test_authorize_may_be_async_and_may_refuse(sse_bus: EventBus) -> None:
    async def authorize(request: Request) -> Grant | None:
        if "x-banned" in request.headers:
            raise Reject(403, "banned", {"x-why": "spam"})
        return Grant.everything() if "x-ok" in request.headers else None

    app = event_app(sse_bus, authorize=authorize)
    assert (await request(app, "HEAD", "/event", headers={"x-ok": "1"})).status == 200
    assert (await request(app, "GET", "/event/status")).status == 401
    banned = await request(app, "GET", "/event", headers={"x-banned": "1"})
    assert (banned.status, banned.json(), banned.headers["x-why"]) == (403, {"error": "banned"}, "spam")


async def test_an_expired_grant_opens_nothing(sse_bus: EventBus) -> None:
    grant = Grant("ann", may_publish=True, expires_at=sse_bus.clock.wall())
    app = event_app(sse_bus, authorize=lambda request: grant, publish=True)
    await sse_bus.publish("a")
    for method, path in (("GET", "/event?after_seq=0"), ("HEAD", "/event"), ("GET", "/event/status")):
        assert (await request(app, method, path)).status == 401
    assert (await request(app, "POST", "/event", json={"type": "a"})).status == 401
    assert sse_bus.head == 1


# Publishing.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://testserver"}, 200),
        ({"origin": "https://allowed.example"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
)
async def test_a_foreign_origin_may_not_publish(sse_bus: EventBus, headers: dict[str, str], status: int) -> None:
    app = event_app(sse_bus, authorize=None, publish=True, origins=["https://allowed.example"])
    named = {"host": "testserver", **headers}
    answer = await request(app, "POST", "/event", json={"type": "a"}, headers=named)
    assert answer.status == status
    assert sse_bus.head == (1 if status == 200 else 0)


@pytest.mark.parametrize(("origin", "status"), [("http://testserver", 200), ("http://other", 403)])
async def test_an_origin_is_judged_whatever_else_the_request_says(sse_bus: EventBus, origin: str, status: int) -> None:
    app = event_app(sse_bus, authorize=None, publish=True)

    async def with_any_query(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "query_string": b"\x80"}, receive, send)

    assert (
        await request(with_any_query, "POST", "/event", json={"type": "a"}, headers={"origin": origin})
    ).status == status


async def test_a_form_post_is_refused(sse_bus: EventBus) -> None:
    """What a page of any origin can send without asking first."""
    app = event_app(sse_bus, authorize=None, publish=True)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = await request(
            app, "POST", "/event", content=b'{"type":"a"}', headers={"content-type": kind} if kind else {}
        )
        assert answer.status == 415
    assert sse_bus.head == 0


async def test_publishing_needs_the_grant_and_the_switch(sse_bus: EventBus) -> None:
    reader = event_app(sse_bus, authorize=lambda request: Grant("reader"), publish=True)
    assert (await request(reader, "POST", "/event", json={"type": "a"})).status == 403
    off = await request(event_app(sse_bus, authorize=None), "POST", "/event", json={"type": "a"})
    assert (off.status, off.headers["allow"]) == (405, "GET, HEAD")
    assert sse_bus.head == 0


# Loopback.


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", "", "127.0.0.1.example"]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:4096"}, 200),
        ({"host": "[::1]:4096"}, 200),
        ({"host": "mine.example"}, 200),
        ({"host": "MINE.example:80"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "10.0.0.1"}, 403),
        ({"host": "localhost", "origin": "http://localhost:3000"}, 200),
        ({"host": "localhost", "origin": "https://app.example"}, 200),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://[bad"}, 403),
    ],
)
async def test_the_guard_of_a_stand_alone_server(headers: dict[str, str], status: int) -> None:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("in"))])
    guard = LoopbackGuard(app, hosts=["mine.example"], origins=["https://app.example"])
    assert (await request(guard, "GET", "/", headers=headers)).status == status
