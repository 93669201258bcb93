"""Every hook a plugin can implement.

A plugin is a module or object whose functions carry the marker :data:`hookimpl`; a distribution offers it through an
entry point in the group ``opencode_sse``::

    # my_plugin.py
    from opencode_sse_plugin import Event, hookimpl

    @hookimpl
    def sse_event_publish(event: Event) -> bool | None:
        return False if event.type == "file.watcher.updated" else None

    # pyproject.toml
    [project.entry-points.opencode_sse]
    my-plugin = "my_plugin"

An implementation may leave out parameters it does not need. There is no hook per delivery: a policy is an object asked
for once, a filter is a value.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from .bus import EventBus
    from .delivery import DeliveryClass, KeyFunction
    from .events import Event, StoredEvent
    from .overflow import OverflowPolicy, PolicyFactory
    from .settings import Settings
    from .stores import StoreFactory
    from .subscriber import Outcome, Snapshot, Subscriber

#: pluggy's project name, the name of both markers, and the entry-point group.
NAME: Final = "opencode_sse"

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec(firstresult=True)
def sse_settings(settings: Settings) -> Settings | None:
    """Give a deployment's configuration: called once at start, below environment and arguments.

    :param settings: the defaults. :return: changed settings (``dataclasses.replace``), or ``None`` to leave it.
    If it raises, the bus does not start.
    """


@hookspec(historic=True)
def sse_register_overflow_policies(register: Callable[[str, PolicyFactory], None]) -> None:
    """Make overflow policies known by name: ``register("keep-latest", KeepLatest)``.

    The factory gets the parameters behind ``?`` of the operator's setting as keyword strings. If it raises, the
    plugin is left out.
    """


@hookspec(historic=True)
def sse_register_event_stores(register: Callable[[str, StoreFactory], None]) -> None:
    """Make event stores known by URL scheme: ``register("postgresql", open_store)``.

    The factory gets the URL and the settings. If it raises, the plugin is left out.
    """


@hookspec(historic=True)
def sse_register_delivery_classes(register: Callable[[str, DeliveryClass, KeyFunction | None], None]) -> None:
    """Say how event types may be treated under overflow: ``register("mood.updated", "latest", key)``.

    ``key`` gives, from an event's properties, what it describes; equal keys supersede each other. If it raises, the
    plugin is left out.
    """


@hookspec
def sse_routes(bus: EventBus) -> Iterable[BaseRoute]:  # type: ignore[empty-body]
    """Add routes to the sub-app, under its prefix; called when the sub-app is built. If it raises, that fails."""


@hookspec
def sse_startup(bus: EventBus) -> Awaitable[None] | None:
    """The bus starts: with the host's lifespan, or at first use where there is none. May be async.

    If it raises, the bus does not start.
    """


@hookspec
def sse_shutdown(bus: EventBus) -> Awaitable[None] | None:
    """The bus has drained; its store closes next. May be async. If it raises, that is logged."""


@hookspec
def sse_event_publish(event: Event) -> Event | bool | None:
    """Look at an event before it is stored, in the publishing process.

    :return: ``None`` keeps it, ``False`` drops it, an ``Event`` takes its place for the plugins that follow.
    If it raises, the event is dropped and counted, since a redactor that fails must not leak; the setting
    ``publish_errors=keep`` keeps it.
    """


@hookspec
def sse_event_published(event: StoredEvent, seq: int) -> None:
    """An event was stored under a sequence number, in the publishing process. If it raises, that is logged."""


@hookspec
def sse_publish_failed(events: Sequence[Event], error: Exception) -> None:
    """Events given to ``publish_nowait`` could not be stored. If it raises, that is logged."""


@hookspec
def sse_subscriber_attach(subscriber: Subscriber, request: Request | None) -> Awaitable[None] | None:
    """A connection asks for the stream, live or replay alike; ``request`` is ``None`` in-process. May be async, 5 s.

    May call ``subscriber.narrow(filter)``, set ``subscriber.limits``, ``subscriber.start`` or ``subscriber.grant``
    (whose ``expires_at`` ends the stream), or raise ``Reject(status, detail)``. If it raises anything else or takes
    longer, the connection is refused with 500.
    """


@hookspec(firstresult=True)
def sse_overflow_policy(subscriber: Subscriber) -> OverflowPolicy | str | None:
    """Choose a subscriber's overflow policy, as an object or by name. If it raises, the configured one is taken."""


@hookspec
def sse_subscriber_lag_warning(subscriber: Subscriber, fraction: float) -> None:
    """A subscriber's lag reached 75 % of a limit; told again after it was down to 37.5 %.

    If it raises, that is logged.
    """


@hookspec
def sse_subscriber_overflow(subscriber: Subscriber, outcome: Outcome) -> None:
    """An overflow policy acted. If it raises, that is logged."""


@hookspec
def sse_subscriber_detach(subscriber: Subscriber, reason: str) -> None:
    """A subscriber left: ``client``, ``complete``, ``overflow``, ``write-timeout``, ``drain``, ``grant`` or ``error``.

    ``subscriber.position`` is where it was: what was on its way to it by then need not have arrived. If it raises, that
    is logged.
    """


@hookspec(firstresult=True)
def sse_snapshot(subscriber: Subscriber, head: int) -> Snapshot | Awaitable[Snapshot | None] | None:
    """Give the state as events to a client whose cursor expired or who asked for it. May be async.

    :param head: the newest sequence number visible to this subscriber now.
    :return: ``Snapshot(events, at)``, where ``at`` is the last sequence number the state includes, from the oldest
        stored to the newest by then: the stream goes on behind it, and nothing is lost or doubled. Without ``at`` it
        goes on behind ``head``, and what was published meanwhile may come twice. ``None`` gives no snapshot.

    If it raises, that is logged and there is none.
    """


SPECS: Final[tuple[Any, ...]] = tuple(value for name, value in list(globals().items()) if name.startswith("sse_"))
#: The hooks that may be ``async def``; all others are called from synchronous code.
ASYNC: Final = frozenset({"sse_startup", "sse_shutdown", "sse_subscriber_attach", "sse_snapshot"})
