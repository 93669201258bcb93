"""JSON as it goes on the wire: one function, the same value whichever encoder is installed.

orjson is used where it is installed (extra ``fast``); whatever it refuses (integers beyond 64 bits, keys that
are not strings, lone surrogates) goes to the standard library, which also decides what is an error.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

try:
    import orjson
except ImportError:  # pragma: no cover - both paths run in the tests through ENCODERS
    orjson = None  # type: ignore[assignment]


def _default(value: object) -> object:
    """Give the standard library the types that orjson writes by itself."""
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} is not JSON")


_strict = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_default).encode


def _without_nan(value: Any) -> Any:
    """Replace NaN and the infinities, which JSON does not have, by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, Enum):
        return _without_nan(value.value)
    return value


def encode_stdlib(value: object) -> bytes:
    """Encode with the standard library.

    :return: JSON without spaces, non-ASCII as UTF-8, lone surrogates as ``\\udXXX``, NaN and infinities ``null``.
    :raises ValueError, TypeError, RecursionError: if the value has no JSON form.
    """
    try:
        text = _strict(value)
    except ValueError:
        # "Out of range float values", or a circular reference: the walk raises RecursionError for the latter.
        text = _strict(_without_nan(value))
    # A lone surrogate can only stand inside a JSON string, where backslashreplace writes a valid JSON escape.
    return text.encode("utf-8", "backslashreplace")


_OPTIONS = 0 if orjson is None else orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def _encode_orjson(value: object) -> bytes:
    try:
        return orjson.dumps(value, _default, _OPTIONS)
    except TypeError:  # orjson.JSONEncodeError is one
        return encode_stdlib(value)


#: The installed encoders by name; the first is used.
ENCODERS: dict[str, Callable[[object], bytes]] = (
    {"stdlib": encode_stdlib} if orjson is None else {"orjson": _encode_orjson, "stdlib": encode_stdlib}
)
encode: Callable[[object], bytes] = next(iter(ENCODERS.values()))


def decode(data: bytes | str) -> Any:
    """Parse JSON, with integers of any size; ``\\udXXX`` comes back as the lone surrogate it was.

    :raises ValueError: if it is not JSON (NaN and Infinity are not).
    """
    return json.loads(data, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
