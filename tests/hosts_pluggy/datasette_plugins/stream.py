"""A Datasette plugin: what happens in Datasette, as a stream that its actors may read at ``/-/stream/event``.

Each actor sees what it did itself, ``root`` sees all. Other plugins may implement our hooks with Datasette's
own marker.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from datasette import hookimpl
from datasette.plugins import pm
from datasette.utils import await_me_maybe
from datasette.utils.asgi import Request as DatasetteRequest
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from opencode_sse_plugin import EventBus, Filter, Grant, event_app
from opencode_sse_plugin.signals import chained_signals

PATH = "/-/stream"
_buses: WeakKeyDictionary[Any, EventBus] = WeakKeyDictionary()


def bus_of(datasette: Any) -> EventBus:
    """One bus for each Datasette; all of them call the plugins of Datasette's one manager."""
    if datasette not in _buses:
        _buses[datasette] = EventBus({}, plugin_manager=pm)
    return _buses[datasette]


@hookimpl
def startup(datasette: Any) -> Any:
    return bus_of(datasette).start


@hookimpl
def shutdown(datasette: Any) -> Any:
    return bus_of(datasette).drain


@hookimpl
def asgi_wrapper(datasette: Any) -> Any:
    bus = bus_of(datasette)

    async def authorize(request: Request) -> Grant | None:
        asked = DatasetteRequest(request.scope, request.receive)
        for answer in pm.hook.actor_from_request(datasette=datasette, request=asked):
            if actor := await await_me_maybe(answer):
                name = str(actor["id"])
                return Grant(name, Filter() if name == "root" else Filter.of(workspace=name, placed=True))
        return None

    events = event_app(bus, authorize=authorize, path=PATH)

    def wrap(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and events.serves(scope):
                await events(scope, receive, send)
            elif scope["type"] == "lifespan":
                # Streams must end before the server waits for them.
                with chained_signals(bus.drain_soon):
                    await app(scope, receive, send)
            else:
                await app(scope, receive, send)

        return wrapped

    return wrap


@hookimpl
def track_event(datasette: Any, event: Any) -> None:
    actor = str((event.actor or {}).get("id", ""))
    properties = {key: value for key, value in event.properties().items() if key != "created"}
    bus_of(datasette).publish_nowait(f"datasette.{event.name}", properties, workspace=actor or None)
