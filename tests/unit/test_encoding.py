"""JSON as it goes on the wire: whichever encoder is installed, the same value."""

from __future__ import annotations

import enum
import json
import math
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencode_sse_plugin.encoding import ENCODERS, decode, encode_stdlib

#: All of Unicode, lone surrogates included.
TEXT = st.text(st.characters(exclude_categories=()))
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**64, -(2**63) - 1, 2**70, 1e16, 1e-5, -0.0])
KEYS = TEXT | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner) | st.tuples(inner, inner),
    max_leaves=20,
)


def without_nan(value: Any) -> Any:
    """What the wire says of a value: no NaN, no infinity, no tuple."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def test_both_encoders_are_here() -> None:
    assert list(ENCODERS) == ["orjson", "stdlib"], "install the extra 'fast': one of the two paths is not tested"


@given(VALUES)
def test_every_encoder_writes_the_same_value(value: Any) -> None:
    parsed = [decode(encode(value)) for encode in ENCODERS.values()]
    assert all(one == without_nan(value) for one in parsed)


@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_keys_that_are_no_strings_become_strings(value: dict[Any, Any]) -> None:
    texts = [json.loads(encode(value), object_pairs_hook=list) for encode in ENCODERS.values()]
    assert texts[0] == texts[1]


@given(VALUES)
def test_a_frame_cannot_be_broken_out_of(value: Any) -> None:
    for encode in ENCODERS.values():
        data = encode(value)
        assert not set(data) & {0, 10, 13}
        data.decode("utf-8")


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_what_it_looks_like(encode: Any) -> None:
    assert encode({"ä": [1, None, True], "b": "\ud800"}) == '{"ä":[1,null,true],"b":"\\ud800"}'.encode()
    assert encode([math.nan, math.inf, -math.inf]) == b"[null,null,null]"
    assert encode(2**70) == str(2**70).encode()
    assert encode({1: 2, None: 3}) == b'{"1":2,"null":3}'
    assert encode("\r\n\0\u2028") == '"\\r\\n\\u0000\u2028"'.encode()


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_types_beyond_json(encode: Any) -> None:
    class Colour(enum.Enum):
        RED = "red"

    some = uuid.UUID(int=1)
    assert encode({"id": some, "colour": Colour.RED}) == b'{"id":"%b","colour":"red"}' % str(some).encode()


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, b"bytes", [[object()]]])
def test_what_is_no_json_is_an_error(encode: Any, value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_a_circle_is_an_error(encode: Any) -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises((ValueError, RecursionError)):
        encode(circle)


def test_decode_refuses_what_json_does_not_have() -> None:
    for text in ("NaN", "[Infinity]", "-Infinity", "{", ""):
        with pytest.raises(ValueError, match=r"JSON|Expecting"):
            decode(text)


def test_lone_surrogates_come_back() -> None:
    assert decode(encode_stdlib("a\udfffb")) == "a\udfffb"
