"""Values: events, ids, cursors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencode_sse_plugin.errors import InvalidEvent
from opencode_sse_plugin.events import (
    MAX_DEPTH,
    MAX_SEQ,
    Cursor,
    Event,
    StoredEvent,
    check_event,
    parse_seq,
)
from opencode_sse_plugin.ids import event_ids, new_epoch


@pytest.mark.parametrize(
    ("type", "properties", "session"),
    [
        ("a", {"sessionID": "s"}, "s"),
        ("a", {"info": {"sessionID": "s"}}, "s"),
        ("a", {"part": {"sessionID": "s"}}, "s"),
        ("session.updated", {"info": {"id": "s"}}, "s"),
        ("message.updated", {"info": {"id": "m"}}, None),
        ("a", {"sessionID": 1}, None),
        ("a", {"info": None, "part": "x"}, None),
        ("a", {}, None),
        ("a", None, None),
    ],
)
def test_the_session_of_an_event(type: str, properties: dict[str, Any] | None, session: str | None) -> None:
    assert Event(type, properties).session == session


def test_unknown_keys_are_kept_and_ours_win() -> None:
    event = Event("a", {"x": 1}, id="evt_1", extra={"syncEvent": {}, "type": "forged", "id": "forged", "properties": 0})
    assert event.payload() == {"id": "evt_1", "type": "a", "properties": {"x": 1}, "syncEvent": {}}


def test_an_event_without_properties_has_none_on_the_wire() -> None:
    assert StoredEvent.encode(Event("sync", None, id="evt_1")).payload == b'{"id":"evt_1","type":"sync"}'


def test_a_stored_event_gives_the_event_back() -> None:
    event = Event("a", {"ä": [1]}, "evt_1", "/d", "p", "w", "global", {"more": True})
    stored = StoredEvent.encode(event)
    assert stored.event == event
    assert stored.size == len(stored.payload)


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "\x7f", "\ud800", "x" * 513, 5, None])
@pytest.mark.parametrize("field", ["type", "id"])
def test_names_that_could_break_a_line_are_refused(field: str, bad: Any) -> None:
    with pytest.raises(InvalidEvent, match=f"^{field} must be") as caught:
        check_event(Event(**{"type": "a", field: bad}), 7)
    assert caught.value.index == 7


@pytest.mark.parametrize("type", ["server.connected", "server.heartbeat", "server.stream.x", "server.stream.\u2028"])
def test_reserved_types_are_refused(type: str) -> None:
    with pytest.raises(InvalidEvent, match="own"):
        check_event(Event(type))


@pytest.mark.parametrize(
    "type", ["server.instance.disposed", "server.connected2", "server.streams", "xserver.connected"]
)
def test_other_server_types_are_not(type: str) -> None:
    check_event(Event(type))


@pytest.mark.parametrize(
    "changed",
    [{"properties": []}, {"properties": "x"}, {"directory": 1}, {"workspace": []}, {"scope": "galaxy"}, {"type": ""}],
)
def test_fields_of_another_kind_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent, match=next(iter(changed))):
        check_event(Event(**{"type": "a", **changed}))


def test_ids_look_like_opencodes() -> None:
    ids = event_ids(now=lambda: 1_795_415_252_663_000_000)
    first, second = ids(), ids()
    assert re.fullmatch(r"evt_[0-9a-f]{12}[0-9A-Za-z]{14}", first)
    stamp = 1_795_415_252_663 * 4096
    assert int(first[4:16], 16) == stamp & 0xFFFFFFFFFFFF
    assert int(second[4:16], 16) == int(first[4:16], 16) + 1


def test_ids_are_unique_even_when_the_clock_goes_back() -> None:
    times = iter([5_000_000_000, 4_000_000_000, 3_000_000_000] + [1_000_000_000] * 10_000)
    ids = event_ids(now=lambda: next(times))
    made = [ids() for _ in range(5000)]
    assert len(set(made)) == 5000
    stamps = [int(id[4:16], 16) for id in made]
    assert stamps == list(range(5000 * 4096, 5000 * 4096 + 5000))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_makes_ids_of_its_own() -> None:
    program = """
import os
from opencode_sse_plugin.ids import event_ids
new_id = event_ids(now=lambda: 1)
new_id()
if child := os.fork():
    os.waitpid(child, 0)
print(*[new_id() for _ in range(1000)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert len(set(done.stdout.split())) == 2000


def test_epochs_differ() -> None:
    assert len({new_epoch() for _ in range(1000)}) == 1000


@given(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), st.integers(0, MAX_SEQ))
def test_a_cursor_survives_the_wire(epoch: str, seq: int) -> None:
    cursor = Cursor(epoch, seq)
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "a:",
        ":1",
        "a",
        "1",
        "a:-1",
        "a:1.0",
        "a:²",
        "a b:1",
        "a:1:2x",
        "a" * 65 + ":1",
        f"a:{MAX_SEQ + 1}",
        "ä:1",
    ],
)
def test_what_is_no_cursor(text: str) -> None:
    assert Cursor.parse(text) is None


@given(st.text(max_size=20))
def test_sequence_numbers_are_ascii_digits(text: str) -> None:
    seq = parse_seq(text)
    assert (seq is not None) == (re.fullmatch("[0-9]{1,16}", text, re.ASCII) is not None and int(text) <= MAX_SEQ)


def nested(levels: int, opening: str) -> Any:
    value: Any = "[{" * 100 + '\\"'
    for _ in range(levels):
        value = [value] if opening == "[" else {"]}": value}
    return value


@pytest.mark.parametrize("opening", ["[", "{"])
def test_what_not_every_reader_can_parse_is_refused(opening: str) -> None:
    # The payload and its properties are two levels.
    deepest = Event("a", {"x": nested(MAX_DEPTH - 2, opening)}, id="evt_1")
    assert StoredEvent.encode(deepest).event == deepest
    for levels in (MAX_DEPTH - 1, 900, 5000):
        with pytest.raises(InvalidEvent) as refused:
            StoredEvent.encode(Event("a", {"x": nested(levels, opening)}, id="evt_1"), index=3)
        assert refused.value.index == 3
    broad = Event("a", {"x": [[], {}] * 1000}, id="evt_1")
    assert StoredEvent.encode(broad).event == broad
