"""``httpx2`` with its own reader of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
from report import URL, read

client = httpx2.Client(trust_env=False, timeout=30)


def reader(cursor: str | None) -> Iterator[tuple[str | None, Any]]:
    headers = {} if cursor is None else {"Last-Event-ID": cursor}
    with client.sse(URL, headers=headers) as source:
        source.response.raise_for_status()
        for sse in source:
            yield sse.id, json.loads(sse.data)


read(reader, (httpx2.HTTPError,))
