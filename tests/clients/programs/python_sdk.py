"""``opencode-ai``, the SDK for Python. It hides the ids of events, so the last one is looked up in its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
from opencode_ai import APIError, Opencode
from report import BASE, QUERY, read

client = Opencode(base_url=BASE, http_client=httpx.Client(trust_env=False))


def reader(cursor: str | None) -> Iterator[tuple[str | None, Any]]:
    headers = {} if cursor is None else {"Last-Event-ID": cursor}
    with client.event.list(extra_headers=headers, extra_query=QUERY) as stream:
        for event in stream:
            yield stream._decoder._last_event_id, event.to_dict()


read(reader, (httpx.HTTPError, APIError))
