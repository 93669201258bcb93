"""Filters are values: matching, combining, comparing."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencode_sse_plugin import Event, Filter, InvalidFilter

NAMES = st.sampled_from(["a", "b", "c"])
TYPES = st.sampled_from(["x.y", "x.z", "y", "x.*", "*", "?"])
FILTERS = st.builds(
    lambda s, t, d, w, p: Filter.of(session=s, type=t, directory=d, workspace=w, placed=p),
    st.sets(NAMES, max_size=2),
    st.sets(TYPES, max_size=2),
    st.sets(NAMES, max_size=2),
    st.sets(NAMES, max_size=2),
    st.booleans(),
)
EVENTS = st.builds(
    lambda t, s, d, w: Event(t, {} if s is None else {"sessionID": s}, directory=d, workspace=w),
    st.sampled_from(["x.y", "x.z", "y", "other"]),
    st.none() | NAMES,
    st.none() | NAMES,
    st.none() | NAMES,
)


@given(FILTERS, FILTERS, EVENTS)
def test_both_of_two_filters(a: Filter, b: Filter, event: Event) -> None:
    assert (a & b).matches(event) == (a.matches(event) and b.matches(event))


@given(FILTERS, FILTERS)
def test_combining_knows_no_order(a: Filter, b: Filter) -> None:
    assert a & b == b & a
    assert hash(a & b) == hash(b & a)
    assert a & a == a
    assert a & Filter() == a


def test_an_event_without_a_session_does_not_pass_and_without_a_place_does() -> None:
    event = Event("a", {})
    assert not Filter.of(session="s").matches(event)
    assert Filter.of(directory="/d", workspace="w").matches(event)


def test_what_says_no_place_does_not_pass_where_places_are_asked_for() -> None:
    placed = Filter.of(directory="/d", placed=True)
    assert not placed.matches(Event("a", {"sessionID": "s"}))
    assert placed.matches(Event("a", directory="/d"))
    assert (placed & Filter.of(workspace="w")).matches(Event("a", directory="/d"))
    assert not (placed & Filter.of(workspace="w", placed=True)).matches(Event("a", directory="/d"))
    assert Filter.of(placed=True).everything


def test_two_filters_with_nothing_in_common_let_nothing_through() -> None:
    nothing = Filter.of(session="a") & Filter.of(session="b")
    assert not nothing.matches(Event("x", {"sessionID": "a"}))
    assert not nothing.everything


@pytest.mark.parametrize(
    ("glob", "type", "passes"),
    [
        ("message.*", "message.part.delta", True),
        ("message.?pdated", "message.updated", True),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        ("*", "", True),
        ("a", "a\n", False),
    ],
)
def test_globs(glob: str, type: str, passes: bool) -> None:
    assert Filter.of(type=glob).matches(Event(type)) is passes


def test_a_hostile_glob_does_not_hang() -> None:
    begun = time.monotonic()
    Filter.of(type="*a" * 50 + "b").matches(Event("a" * 400))
    assert time.monotonic() - begun < 5


def test_globs_are_limited_together() -> None:
    """Each of them may be good, and still would hold up everybody while they are compiled."""
    assert Filter.of(type=[f"{n:03}" + "*a" * 46 for n in range(43)])
    with pytest.raises(InvalidFilter) as caught:
        Filter.of(type=[f"{n:03}" + "*a" * 46 for n in range(44)])
    assert caught.value.parameter == "type"


@pytest.mark.parametrize("value", ["", "a\nb", "\0", "x" * 4097])
def test_a_malformed_value_names_its_parameter(value: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        Filter.of(workspace=value)
    assert caught.value.parameter == "workspace"


def test_as_json() -> None:
    filter = Filter.of(session=["b", "a"], type="x.*") & Filter.of(type="y")
    assert filter.to_dict() == {"session": ["a", "b"], "type": [["x.*"], ["y"]]}
    assert Filter().to_dict() == {}
    assert Filter.of(directory="/d", placed=True).to_dict() == {"directory": ["/d"], "placed": ["directory"]}
