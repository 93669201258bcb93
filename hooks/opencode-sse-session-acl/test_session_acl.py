"""Who sees what by which token: live, on resume and in replay."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import opencode_sse_session_acl
import pytest
from opencode_sse_session_acl import SECRETS_VARIABLE, Tokens, authorize, main

from opencode_sse_plugin import ConfigurationError, Event, EventBus, Filter, Grant, Reject, Settings, event_app
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import ManualClock, request, stream

SECRET = "a secret that nobody guesses"
SOON = time.time() + 3600
tokens = Tokens([SECRET])
#: Each token with what its holder may see of :func:`publish_all`.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a directory": ({"directories": ["/ann"]}, ["a1", "a2", "twin"]),
    "two directories": ({"directories": ["/ann", "/bob"]}, ["a1", "b1", "a2", "twin"]),
    "a workspace": ({"workspaces": ["team"]}, ["b1"]),
    "a session": ({"sessions": ["ses_a1", "ses_lost"]}, ["a1", "lost"]),
    "a session in a directory": ({"sessions": ["ses_a1", "ses_b1", "ses_lost"], "directories": ["/ann"]}, ["a1"]),
    "no directory at all": ({"directories": []}, []),
    "no session at all": ({"sessions": []}, []),
    "everything": ({"everything": True}, ["a1", "b1", "lost", "nobody", "a2", "twin"]),
}


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRETS_VARIABLE, SECRET)


def guarded(clock: ManualClock | None = None, plugin: object = opencode_sse_session_acl) -> EventBus:
    plugins = Plugins(discover=False)
    plugins.register(plugin)
    return EventBus(Settings(), plugins=plugins, clock=clock)


@pytest.fixture
async def bus(anyio_backend: object) -> AsyncIterator[EventBus]:
    async with guarded() as bus:
        yield bus


async def publish_all(bus: EventBus) -> None:
    """Sessions of two people and of nobody, one created in the middle, and a twin without properties."""
    for type, session, place in (
        ("a1", "ses_a1", {"directory": "/ann"}),
        ("b1", "ses_b1", {"directory": "/bob", "workspace": "team"}),
        ("lost", "ses_lost", {}),
        ("nobody", None, {}),
        ("a2", "ses_a2", {"directory": "/ann"}),
    ):
        await bus.publish(Event(type, {} if session is None else {"sessionID": session}, **place))
    await bus.publish(Event("twin", None, directory="/ann", extra={"syncEvent": {"aggregateID": "ses_a2"}}))


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.anyio
@pytest.mark.parametrize("with_authorize", [False, True])
@pytest.mark.parametrize(("opens", "seen"), CASES.values(), ids=CASES)
async def test_a_token_opens_the_same_live_on_resume_and_in_replay(
    bus: EventBus, opens: dict[str, Any], seen: list[str], with_authorize: bool
) -> None:
    app = event_app(bus, authorize=authorize if with_authorize else None)
    headers = bearer(tokens.sign("ann", expires_at=SOON, **opens))
    async with stream(app, "/global/event", headers=headers) as live:
        await live.next()
        await publish_all(bus)
        assert [(await live.next()).type for _ in seen] == seen
    async with stream(app, "/event?after_seq=0", headers=headers) as replay:
        assert [frame.type for frame in await replay.rest()][1:] == seen
    # A cursor that somebody else was given opens nothing.
    resumed = {**headers, "last-event-id": f"{bus.epoch}:2"}
    async with stream(app, "/event?session=ses_a2&session=ses_b1", headers=resumed) as response:
        assert (await response.next()).type == "server.heartbeat"
        await bus.publish("last", {"sessionID": "ses_a2"}, directory="/ann")
        if "a2" in seen:
            assert [frame.type for frame in await response.take(2)] == ["a2", "last"]


@pytest.mark.anyio
async def test_an_expired_token_aborts_its_streams_and_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    monkeypatch.setattr(time, "time", clock.wall)
    async with guarded(clock) as bus:
        app = event_app(bus, authorize=None)
        headers = bearer(tokens.sign("ann", expires_at=clock.wall() + 3, everything=True))
        async with stream(app, "/event", headers=headers) as response:
            await response.next()
            assert bus.statistics()["subscribers"][0]["caller"] == "ann"
            await clock.advance(1.5)
            await bus.publish("a")
            assert (await response.next()).type == "a"
            await clock.advance(2.5)
            assert await response.rest() == []
            assert response.ending == "abort"
        answer = await request(app, "GET", "/event", headers=headers)
        assert (answer.status, answer.json()) == (401, {"error": "the token has expired"})


@pytest.mark.anyio
async def test_the_hosts_grant_stays_and_the_earlier_end_counts(bus: EventBus) -> None:
    app = event_app(bus, authorize=lambda request: Grant("host", Filter.of(type="a*"), expires_at=SOON - 1000))
    headers = bearer(tokens.sign("ann", directories=["/ann"], expires_at=SOON))
    await publish_all(bus)
    async with stream(app, "/event?after_seq=0&follow=true", headers=headers) as response:
        assert [frame.type for frame in await response.take(3)] == ["server.connected", "a1", "a2"]
        (subscription,) = bus._roster.subscriptions
        grant = subscription.subscriber.grant
        assert (grant.caller, grant.expires_at, grant.may_publish) == ("ann", SOON - 1000, False)


# Tokens in requests.


def basic(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["bearer", "query", "password", "auth_token"])
async def test_ways_to_send_it(bus: EventBus, way: str) -> None:
    token = tokens.sign("ann", expires_at=SOON, everything=True)
    headers, query = {
        "bearer": ({"authorization": f"bearer {token}"}, ""),
        "query": ({"authorization": "Basic " + basic("opencode:the password of the server")}, f"?access_token={token}"),
        "password": ({"authorization": "Basic " + basic(f"opencode:{token}")}, ""),
        "auth_token": ({}, f"?auth_token={basic(f'opencode:{token}')}"),
    }[way]
    async with stream(event_app(bus, authorize=None), f"/event{query}", headers=headers) as response:
        assert (await response.next()).type == "server.connected"


GOOD = tokens.sign("ann", expires_at=SOON, everything=True)
OTHER = Tokens(["the secret of somebody else"]).sign("ann", expires_at=SOON, everything=True)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("nonsense"),
        bearer(GOOD[:-1]),
        bearer("x" + GOOD),
        bearer(GOOD.split(".")[0]),
        bearer(OTHER),
        {"authorization": "Basic ???"},
        {"authorization": "Basic " + basic("opencode:")},
        {"authorization": "Basic " + basic("opencode:secret")},
    ],
)
async def test_without_a_token_of_ours_nobody_is_let_in(bus: EventBus, headers: dict[str, str]) -> None:
    for app in (event_app(bus, authorize=None), event_app(bus, authorize=authorize)):
        answer = await request(app, "GET", "/event", headers=headers)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert (await request(event_app(bus, authorize=authorize), "GET", "/event/status", headers=headers)).status == 401


def test_every_letter_of_a_token_is_signed() -> None:
    for at in range(len(GOOD) - 1):  # The last letter of base64 has bits that mean nothing.
        changed = GOOD[:at] + ("A" if GOOD[at] != "A" else "B") + GOOD[at + 1 :]
        with pytest.raises(Reject):
            tokens.grant(changed)


@pytest.mark.parametrize(
    "claims",
    [
        [],
        {"caller": "ann"},
        {"expires": SOON},
        {"caller": 1, "expires": SOON},
        {"caller": "ann", "expires": float("nan")},
        {"caller": "ann", "expires": "soon"},
        {"caller": "ann", "expires": SOON, "directories": "/ann"},
        {"caller": "ann", "expires": SOON, "sessions": [""]},
        {"caller": "ann", "expires": SOON, "sessions": [1]},
    ],
)
def test_what_is_signed_and_makes_no_sense_is_refused(claims: Any) -> None:
    with pytest.raises(Reject):
        tokens.grant(str(tokens._serializer.dumps(claims)))


@pytest.mark.parametrize(
    ("opens", "complaint"),
    [
        ({}, "say what the token opens"),
        ({"everything": True, "sessions": ["ses_1"]}, "say what the token opens"),
        ({"sessions": ["a\nb"]}, "control characters"),
    ],
)
def test_a_token_that_opens_nothing_sensible_is_not_signed(opens: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tokens.sign("ann", expires_at=SOON, **opens)


def test_secrets_can_be_changed() -> None:
    fresh = "a secret that is newer"
    both = Tokens.from_environment({SECRETS_VARIABLE: f"{fresh}, {SECRET},"})
    assert both.grant(GOOD).caller == "ann"
    assert Tokens([fresh]).grant(both.sign("bob", expires_at=SOON, everything=True)).caller == "bob"


@pytest.mark.anyio
@pytest.mark.parametrize("secrets", ["", " , ", "short", f"{SECRET},short"])
async def test_without_a_good_secret_the_bus_does_not_start(monkeypatch: pytest.MonkeyPatch, secrets: str) -> None:
    monkeypatch.setenv(SECRETS_VARIABLE, secrets)
    with pytest.raises(ConfigurationError, match=SECRETS_VARIABLE):
        async with guarded():
            pytest.fail("it started")


@pytest.mark.anyio
async def test_the_hosts_own_code_sees_all(bus: EventBus) -> None:
    async with bus.subscribe() as events:
        await anext(events)
        await publish_all(bus)
        assert (await anext(events)).event.type == "a1"


@pytest.mark.anyio
async def test_publishing_needs_a_token_that_may(bus: EventBus) -> None:
    app = event_app(bus, authorize=authorize, publish=True)
    for may, status in ((True, 200), (False, 403)):
        token = tokens.sign("ann", expires_at=SOON, everything=True, may_publish=may)
        assert (await request(app, "POST", "/event", json={"type": "a"}, headers=bearer(token))).status == status


# The command.


def test_the_command_prints_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ann", "--directory", "/a", "--directory", "/b", "--hours", "1"]) == 0
    grant = tokens.grant(capsys.readouterr().out.strip())
    assert (grant.caller, grant.filter.directories) == ("ann", {"/a", "/b"})
    assert 3500 < (grant.expires_at or 0) - time.time() <= 3600


@pytest.mark.parametrize("secret", [SECRET, ""])
def test_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: str
) -> None:
    monkeypatch.setenv(SECRETS_VARIABLE, secret)
    with pytest.raises(SystemExit):
        main(["ann", *([] if secret else ["--everything"])])
    assert ("say what the token opens" if secret else SECRETS_VARIABLE) in capsys.readouterr().err
