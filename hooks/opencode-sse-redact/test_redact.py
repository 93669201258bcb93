"""What is stored, replayed and given never holds a secret, whole or in pieces."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import opencode_sse_redact
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opencode_sse_redact import MASK, PATTERNS_VARIABLE, Redactor

from opencode_sse_plugin import ConfigurationError, Event, EventBus, Page, Settings, event_app
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import stream

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def letters(count: int, seed: int = 1) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=count))


KEY = f"-----BEGIN RSA PRIVATE KEY-----\n{letters(1600)}\n-----END RSA PRIVATE KEY-----"
#: A text with a secret, the secret, and the text without it.
SECRETS = {
    "openai": (f"use sk-proj-{letters(40)} now", letters(40), f"use {MASK} now"),
    "github": (f"ghp_{letters(36)}", letters(36), MASK),
    "aws": ("id AKIAIOSFODNN7EXAMPLE.", "IOSFODNN7", f"id {MASK}."),
    "slack": ("xoxb-1234567890-abcdef!", "1234567890", f"{MASK}!"),
    "jwt": (f"eyJ{letters(20)}.{letters(30)}.{letters(43)} x", letters(30), f"{MASK} x"),
    "private key": (f"see\n{KEY}\nend", letters(60), f"see\n{MASK}\nend"),
    "a private key cut short": (KEY[:900], letters(60), MASK),
    "bearer": ("-H 'Authorization: Bearer abcdef0123456789'", "abcdef0123", f"-H 'Authorization: Bearer {MASK}'"),
    "url": ("postgres://me:hunter22@db:5432/x", "hunter22", f"postgres://me:{MASK}@db:5432/x"),
    "env file": ("A=1\nDB_PASSWORD=hunter22\nB=2", "hunter22", f"A=1\nDB_PASSWORD={MASK}\nB=2"),
    "two": (f"ghp_{letters(36)} ghp_{letters(36, 2)}", letters(30), f"{MASK} {MASK}"),
}
HARMLESS = (
    "http://localhost:4096/event",
    "a task-list of sk- and ghp_ and AKIA",
    "max_tokens: 100, secret: no",
    "-----BEGIN CERTIFICATE-----",
    "\ud800 a lone surrogate",
)


@pytest.fixture
def redactor() -> Redactor:
    return Redactor.from_environment({})


def published(redactor: Redactor, event: Event) -> Event:
    return redactor.sse_event_publish(event) or event


@pytest.mark.parametrize(("text", "secret", "without"), SECRETS.values(), ids=SECRETS)
def test_a_secret_is_masked_anywhere(redactor: Redactor, text: str, secret: str, without: str) -> None:
    properties = {"sessionID": "ses_1", "part": {"id": "prt_1", "n": [1, 2.5, None, True, {"deep": [text]}]}}
    event = Event("tool.result", properties, id="evt_1", extra={"syncEvent": {"text": text}})
    masked = published(redactor, event)
    assert masked.properties == {**properties, "part": {"id": "prt_1", "n": [1, 2.5, None, True, {"deep": [without]}]}}
    assert masked.extra == {"syncEvent": {"text": without}}
    assert secret not in json.dumps(masked.payload())
    assert (masked.type, masked.id) == ("tool.result", "evt_1")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(redactor: Redactor, text: str) -> None:
    assert redactor.sse_event_publish(Event("a", {"text": text})) is None


def test_values_under_telling_names_are_masked(redactor: Redactor) -> None:
    headers = {"Set-Cookie": ["a", "b"], "API_KEY": {"value": "c"}, "password": "", "tokens": {"input": 1}}
    assert published(redactor, Event("a", headers)).properties == {
        "Set-Cookie": [MASK, MASK],
        "API_KEY": {"value": MASK},
        "password": "",
        "tokens": {"input": 1},
    }


def test_more_patterns_and_names_by_environment() -> None:
    environ = {PATTERNS_VARIABLE: "\n EMP-[0-9]{6} \n", "OPENCODE_SSE_REDACT_NAMES": "Home-Address, "}
    event = Event("a", {"text": "ask EMP-123456", "home_address": "x"})
    assert published(Redactor.from_environment(environ), event).properties == {
        "text": f"ask {MASK}",
        "home_address": MASK,
    }


# Text in pieces.


def delta(text: str, part: str = "prt_1", id: str = "") -> Event:
    place = {"sessionID": "ses_1", "messageID": "msg_1", "partID": part, "field": "text"}
    return Event("message.part.delta", {**place, "delta": text}, id=id)


def updated(text: str, part: str = "prt_1") -> Event:
    return Event(
        "message.part.updated",
        {"sessionID": "ses_1", "part": {"sessionID": "ses_1", "messageID": "msg_1", "id": part, "text": text}},
    )


def streamed(redactor: Redactor, pieces: list[str]) -> list[str]:
    return [(published(redactor, delta(piece)).properties or {})["delta"] for piece in pieces]


def cut(text: str, at: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(n % (len(text) + 1) for n in at)})
    return [text[a:b] for a, b in pairwise(bounds)]


TEXTS = st.lists(
    st.sampled_from([*(text for text, _, _ in SECRETS.values() if text != KEY[:900]), *HARMLESS, "a", "b-sk"]),
    min_size=1,
    max_size=6,
).map(" ".join)


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=30))
def test_pieces_give_what_the_whole_text_would(text: str, at: list[int]) -> None:
    redactor = Redactor.from_environment({})
    whole = (published(redactor, Event("a", {"text": text + " . "})).properties or {})["text"]
    assert "".join(streamed(redactor, [*cut(text, at), " . "])) == whole


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=10), st.integers(0, 10_000))
def test_a_secret_does_not_come_in_two_halves_around_a_whole_text(text: str, at: list[int], turn: int) -> None:
    """What was shown of it in the middle stays shown, and the rest is masked."""
    redactor = Redactor.from_environment({})
    turn %= len(text) + 1
    shown = (published(redactor, updated(text[:turn])).properties or {})["part"]["text"]
    rest = "".join(streamed(redactor, [*cut(text[turn:], at), " . "]))
    for _, secret, _ in SECRETS.values():
        if secret in text and secret not in text[:turn]:
            # More than half of a secret may have been shown before it could be known; then the rest must be missing.
            assert secret not in shown + rest


def test_text_goes_on_at_once_and_only_what_may_be_a_secret_waits(redactor: Redactor) -> None:
    given = streamed(redactor, ["Hello", ", the", " key is s", "k", "y blue. sk-", "a" * 30, "!"])
    assert given == ["Hello", ", the", " key is ", "", "sky blue. ", "", f"{MASK}!"]


def test_texts_of_two_parts_do_not_mix(redactor: Redactor) -> None:
    for part, text, wanted in (("prt_1", "a s", "a "), ("prt_2", "k-b ", "k-b "), ("prt_1", "ky", "sky")):
        assert (published(redactor, delta(text, part)).properties or {})["delta"] == wanted


def test_a_piece_that_is_published_again_is_not_taken_twice(redactor: Redactor) -> None:
    for piece, id, wanted in (
        ("a s", "evt_1", "a "),
        ("ky s", "evt_2", "sky "),
        ("ky s", "evt_2", "sky "),
        ("o", "", "so"),
    ):
        assert (published(redactor, delta(piece, id=id)).properties or {})["delta"] == wanted


def test_a_secret_without_end_is_masked_in_bounded_memory(redactor: Redactor) -> None:
    given = "".join(streamed(redactor, ["PASSWORD=", *["x1y2z3w4" * 100] * 200, " done"]))
    assert given.replace(MASK, "") == " done"
    (piece,) = redactor._texts.values()
    assert len(piece.after.text) < 20_000
    for n in range(2000):
        published(redactor, delta("s", f"prt_{n}"))
    assert len(redactor._texts) == 1000


# In a bus.


def bus_with_redactor() -> EventBus:
    plugins = Plugins(discover=False)
    plugins.register(opencode_sse_redact)
    return EventBus(Settings(), plugins=plugins)


@pytest.mark.anyio
async def test_no_secret_is_stored_replayed_or_given() -> None:
    async with bus_with_redactor() as bus:
        app = event_app(bus, authorize=None)
        async with stream(app, "/event") as live:
            for text, _, _ in SECRETS.values():
                await bus.publish("a", {"text": text})
                for piece in cut(text + " .", list(range(0, len(text), 7))):
                    await bus.publish(delta(piece))
            await bus.publish("end")
            seen = [frame.data for frame in await live.until("end")]
        page = await bus.store.read(0, 10_000, 1 << 30)
        assert isinstance(page, Page)
        async with stream(app, "/event?after_seq=0") as replay:
            assert [frame.data for frame in await replay.rest()][1:] == seen[1:]
        stored = b"".join(event.payload for event in page.events).decode()
        texts = "".join(event.event.properties.get("delta", "") for event in page.events)  # type: ignore[union-attr]
        for _, secret, _ in SECRETS.values():
            assert secret not in stored
            assert secret not in texts


@pytest.mark.anyio
async def test_when_it_fails_the_event_does_not_go_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATTERNS_VARIABLE, r"(?:a|aa)+$b")
    monkeypatch.setattr(opencode_sse_redact, "TIMEOUT", 0.01)
    async with bus_with_redactor() as bus:
        assert await bus.publish("a", {"text": "a" * 60}) is None
        assert await bus.publish("a", {"when": object()}) is None
        assert bus.statistics()["counters"]["failed"] == 2
        assert await bus.publish("a", {"text": "fine"}) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(("pattern", "complaint"), [("(", "no regular expression"), ("x*", "the empty text")])
async def test_a_pattern_that_makes_no_sense_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, pattern: str, complaint: str
) -> None:
    monkeypatch.setenv(PATTERNS_VARIABLE, f"fine\n{pattern}")
    with pytest.raises(ConfigurationError, match=complaint):
        async with bus_with_redactor():
            pytest.fail("it started")


@pytest.mark.anyio
async def test_each_bus_has_a_redactor_of_its_own_also_when_it_starts_again() -> None:
    one, two = bus_with_redactor(), bus_with_redactor()
    for _ in range(2):
        async with one, two:
            await one.publish(delta("a s"))
            await two.publish(delta("a b"))
            await one.publish(delta("k"))


def test_values_it_cannot_look_into_are_refused(redactor: Redactor) -> None:
    value: Any = {1, 2}
    with pytest.raises(TypeError, match="set"):
        redactor.sse_event_publish(Event("a", {"x": value}))
