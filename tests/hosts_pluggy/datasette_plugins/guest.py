"""Another Datasette plugin, which knows our hooks and only Datasette's marker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasette import hookimpl

from opencode_sse_plugin import Backlog, Event, Outcome, Reject, Skip, Subscriber


class Latest:
    """Keep the newest only."""

    name = "latest-of-datasette"

    def __call__(self, backlog: Backlog) -> Outcome:
        return Skip(((0, len(backlog.events) - 1),))


@hookimpl
def sse_register_overflow_policies(register: Any) -> None:
    register(Latest.name, Latest)


@hookimpl
def sse_overflow_policy(subscriber: Subscriber) -> str:
    return Latest.name


@hookimpl
def sse_event_publish(event: Event) -> Event | bool:
    if (event.properties or {}).get("table") == "secret":
        return False
    return replace(event, properties={**(event.properties or {}), "host": "datasette"})


@hookimpl
async def sse_subscriber_attach(subscriber: Subscriber) -> None:
    if subscriber.caller == "mallory":
        raise Reject(403, "not you")
