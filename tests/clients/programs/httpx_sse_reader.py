"""``httpx-sse``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import httpx_sse
from report import URL, read

client = httpx.Client(trust_env=False, timeout=30)


def reader(cursor: str | None) -> Iterator[tuple[str | None, Any]]:
    headers = {} if cursor is None else {"Last-Event-ID": cursor}
    with httpx_sse.connect_sse(client, "GET", URL, headers=headers) as source:
        source.response.raise_for_status()
        for sse in source.iter_sse():
            yield sse.id, sse.json()


read(reader, (httpx.HTTPError,))
