"""Putting the stream into a host's app: one call, whatever the host does with middleware and lifespan."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, Final, Literal

import pluggy
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .app import EventApp, event_app
from .bus import EventBus
from .errors import ConfigurationError
from .security import Authorize
from .signals import chained_signals
from .transport import OWN_SEND

_INSTALLED: Final = "_opencode_sse"


def install(
    app: Starlette,
    bus: EventBus | None = None,
    *,
    path: str = "",
    authorize: Authorize | None,
    plugin_manager: pluggy.PluginManager | None = None,
    placement: Literal["outermost", "route"] = "outermost",
    publish: bool = False,
    origins: Collection[str] = (),
) -> EventBus:
    """Serve ``/event``, ``/global/event`` and ``/event/status`` from a Starlette or FastAPI app, and run the bus in its
    lifespan.

    :param bus: made from environment and plugins if not given.
    :param path: prefix of our paths; the root by default, so that an opencode client works unchanged.
    :param authorize: says who may attach: a function from a request to a :class:`Grant` or ``None``. ``None`` in its
        place lets everybody in, explicitly: the host's own authentication does **not** cover ``outermost``.
    :param plugin_manager: the host's own pluggy manager, whose plugins may implement our hooks too.
    :param placement: ``outermost`` puts our paths outside the host's whole middleware stack (its CORS settings still
        apply), since one ``BaseHTTPMiddleware`` turns an abort into a clean end, after which clients stay away.
        ``route`` puts them inside the stack, behind the host's authentication.
    :param publish: whether ``POST /event`` is there. :param origins: browser origins that may publish.
    :return: the bus.
    :raises ConfigurationError: if the host has one of our routes already, or is served by another bus there.
    """
    if bus is None:
        bus = EventBus(plugin_manager=plugin_manager)
    elif plugin_manager is not None:
        bus.plugins.add_manager(plugin_manager)
    events = event_app(bus, authorize=authorize, path=path, publish=publish, origins=origins)
    _refuse_conflicts(app, path.rstrip("/"))
    if placement == "outermost":
        _wrap_stack(app, lambda host: _Dispatcher(events, _with_cors(app, events), host))
    elif placement == "route":
        app.router.routes[:0] = events.routes
        _wrap_stack(app, _warning_of_middleware(app, lambda host: _Dispatcher(events, host, host)))
    else:
        raise ConfigurationError(f"placement must be 'outermost' or 'route', not {placement!r}")
    _run_in_lifespan(app, bus)
    return bus


def _refuse_conflicts(app: Starlette, path: str) -> None:
    ours = {f"{path}{name}" for name in ("/event", "/global/event", "/event/status")}
    for route in app.routes:
        if isinstance(route, Route) and route.path in ours:
            raise ConfigurationError(
                f"the app has a route {route.path} already; install with path='/some-prefix' or remove it"
            )
    installed: set[str] = getattr(app.state, _INSTALLED, set())
    if path in installed:
        raise ConfigurationError(f"a bus is installed at {path or '/'} already; give the second one another path")
    setattr(app.state, _INSTALLED, installed | {path})


class _Dispatcher:
    """Gives exactly our paths to the sub-app and everything else to the host; keeps the server's own ``send``, which
    middleware wraps, for getting rid of connections."""

    def __init__(self, events: EventApp, served: ASGIApp, host: ASGIApp) -> None:
        self._events = events
        self._served = served
        self._host = host

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not a coroutine of its own, whose frame would be kept as long as the stream.
        if scope["type"] == "http" and self._events.serves(scope):
            scope[OWN_SEND] = send
            return self._served(scope, receive, send)
        return self._host(scope, receive, send)


def _wrap_stack(app: Starlette, around: Callable[[ASGIApp], ASGIApp]) -> None:
    """Wrap the building of the stack, so that middleware added later stays inside."""
    build: Callable[[], ASGIApp] = app.build_middleware_stack
    app.build_middleware_stack = lambda: around(build())  # type: ignore[method-assign]
    if app.middleware_stack is not None:
        app.middleware_stack = around(app.middleware_stack)


def _with_cors(app: Starlette, events: EventApp) -> ASGIApp:
    served: ASGIApp = events.answer
    for middleware in reversed(app.user_middleware):
        if isinstance(middleware.cls, type) and issubclass(middleware.cls, CORSMiddleware):
            wrap: Callable[..., ASGIApp] = middleware.cls
            served = wrap(served, *middleware.args, **middleware.kwargs)
    return served


def _warning_of_middleware(app: Starlette, around: Callable[[ASGIApp], ASGIApp]) -> Callable[[ASGIApp], ASGIApp]:
    """Warn of what turns aborts into clean ends: now, and of what was added later when the stack is built."""
    known: set[Any] = set()

    def warn(stacklevel: int) -> None:
        for cls in {middleware.cls: None for middleware in app.user_middleware}:
            if cls not in known and isinstance(cls, type) and issubclass(cls, BaseHTTPMiddleware):
                known.add(cls)
                warnings.warn(
                    f"{cls.__name__} is a BaseHTTPMiddleware and stands around the event stream: it turns the abort "
                    "that makes clients reconnect into a clean end; use placement='outermost'",
                    RuntimeWarning,
                    stacklevel=stacklevel,
                )

    def warn_and_wrap(host: ASGIApp) -> ASGIApp:
        warn(stacklevel=3)
        return around(host)

    warn(stacklevel=4)
    return warn_and_wrap


def _run_in_lifespan(app: Starlette, bus: EventBus) -> None:
    """Run the bus around the host's own lifespan: a mounted sub-app's never runs."""
    host: Callable[[Any], Any] = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with bus:
            with chained_signals(bus.drain_soon):
                async with host(app) as state:
                    yield state

    app.router.lifespan_context = lifespan
