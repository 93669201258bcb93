"""ASGI scopes as a server makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, urlencode

from starlette.types import Scope

#: Names and values, for names that come several times.
Pairs = Iterable[tuple[str, str]]


def http_scope(
    path: str,
    *,
    method: str,
    headers: Mapping[str, str] | Pairs,
    params: Mapping[str, str] | Pairs,
    length: int | None,
    http_version: str,
    root_path: str,
    client: str,
    state: Mapping[str, Any] | None,
    spec_version: str,
) -> Scope:
    """The scope of one request.

    :param path: percent-encoded, with or without a query. :param length: of the body; ``None`` if it is not known.
    """
    raw_path, _, query = path.partition("?")
    added = urlencode(list(_pairs(params)))
    fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in _pairs(headers)]
    named = {name for name, _ in fields}
    defaults = [(b"host", b"testserver"), (b"accept", b"*/*")]
    if length is None:
        defaults.append((b"transfer-encoding", b"chunked"))
    elif length:
        defaults.append((b"content-length", str(length).encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": http_version,
        "method": method.upper(),
        "scheme": "http",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("ascii"),
        "query_string": "&".join(part for part in (query, added) if part).encode("ascii"),
        "root_path": root_path,
        "headers": [field for field in defaults if field[0] not in named] + fields,
        "client": (client, 50000),
        "server": ("testserver", 80),
        "extensions": {},
        "state": dict(state or {}),
    }


def _pairs(values: Mapping[str, str] | Pairs) -> Pairs:
    return values.items() if isinstance(values, Mapping) else values
