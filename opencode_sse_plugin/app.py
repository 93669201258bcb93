"""The ASGI sub-app: routes, and who may use them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Collection, Iterable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from . import cursors, frames
from .bus import EventBus
from .errors import BusClosed, InvalidFilter, Reject, StoreUnavailable
from .parameters import Reading, read_parameters
from .position import PAGE_EVENTS
from .posting import post_events
from .response import EventStreamResponse
from .security import Authorize, is_foreign
from .signals import chained_signals
from .stores import Evicted
from .subscriber import Grant
from .transport import OWN_SEND, is_closed, server_status

logger = logging.getLogger("opencode_sse")

_SCAN_BYTES: Final = 1024 * 1024


class EventApp:
    """Serves one bus under a prefix; made by :func:`event_app`.

    Endpoints are ASGI callables rather than Starlette functions, whose wrapping of ``send`` would cost every delivery.
    """

    def __init__(
        self, bus: EventBus, *, authorize: Authorize | None, path: str, publish: bool, origins: Collection[str]
    ) -> None:
        if path and not path.startswith("/"):
            raise ValueError(f"path must start with /, not {path!r}")
        self.bus = bus
        self._authorize = authorize
        self._publish = publish
        self._origins = frozenset(origins)
        prefix = path.rstrip("/")
        self._own = [
            Route(f"{prefix}{name}", _Endpoint(self, methods))
            for name, methods in (
                ("/event", {"GET": self._event, "HEAD": self._head, "POST": self._post}),
                ("/global/event", {"GET": self._global_event, "HEAD": self._head}),
                ("/event/status", {"GET": self._status, "HEAD": self._status}),
            )
        ]
        others: list[BaseRoute] = list(bus.plugins.routes(bus))
        if prefix and others:
            others = [_Prefix(prefix, routes=others)]
        self.routes: list[BaseRoute] = [*self._own, *others]
        self._router = Router(routes=self.routes, redirect_slashes=False)

    def serves(self, scope: Scope) -> bool:
        """Whether a request is for one of our paths."""
        return _any_matches(self.routes, scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(scope, receive, send)

    def answer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """What to await. Not a coroutine, and ours are not left to the router: the frames of both would be kept as long
        as a stream, a kilobyte for each."""
        if scope["type"] == "lifespan":
            return self._lifespan(receive, send)
        for route in self._own:
            if route.matches(scope)[0] is Match.FULL:
                # As the router does, but for parameters of the path, since ours have none.
                scope.update(route=route, endpoint=route.endpoint)
                scope.setdefault("router", self._router)
                return route.app(scope, receive, send)
        return self._router(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            async with self.bus:
                with chained_signals(self.bus.drain_soon):
                    await send({"type": "lifespan.startup.complete"})
                    await receive()
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.shutdown.complete"})

    async def grant(self, request: Request) -> Grant:
        """Who is calling, and what it may do.

        :raises Reject: if it is not let in.
        """
        if self._authorize is None:
            return Grant.everything()
        try:
            grant = self._authorize(request)
            if inspect.isawaitable(grant):
                grant = await grant
        except Reject:
            raise
        except Exception as error:
            logger.exception("authorize failed, the caller is not let in")
            raise Reject(500, "the caller could not be checked") from error
        if grant is None:
            raise Reject(401, "not authorized")
        if not isinstance(grant, Grant):
            logger.error("authorize answered %s, not a Grant or None", type(grant).__name__)
            raise Reject(500, "the caller could not be checked")
        if grant.expires_at is not None and grant.expires_at <= self.bus.clock.wall():
            raise Reject(401, "the grant has expired")
        return grant

    # Endpoints: each gives an ASGI response.

    async def _event(self, request: Request) -> ASGIApp:
        return await self._stream(request, frames.EVENT)

    async def _global_event(self, request: Request) -> ASGIApp:
        return await self._stream(request, frames.GLOBAL)

    async def _stream(self, request: Request, envelope: frames.Envelope[bytes]) -> ASGIApp:
        grant = await self.grant(request)
        reading = read_parameters(request)
        if await self._is_complete(request, reading, grant, envelope):
            return Response(status_code=204)
        subscriber = self.bus.new_subscriber(
            request.scope["path"],
            reading.filter,
            grant,
            mode=reading.mode,
            start=reading.start,
            snapshot=reading.snapshot,
            sees_abort=request.scope.get("http_version") != "1.0",
        )
        return EventStreamResponse(self.bus, await self.bus.attach(subscriber, envelope, request))

    async def _is_complete(
        self, request: Request, reading: Reading, grant: Grant, envelope: frames.Envelope[bytes]
    ) -> bool:
        """Whether an EventSource comes back after a terminal replay that gave it everything: only 204 stops it."""
        cursor = reading.start.cursor
        accepts = "text/event-stream" in request.headers.get("accept", "")
        if reading.mode != "terminal" or not reading.returning or not accepts or cursor is None:
            return False
        store = self.bus.store
        bounds = await store.bounds()
        if cursors.nothing_after(cursor, bounds):
            return True
        if cursors.refusal(reading.start, bounds, replay=True) is not None:
            return False
        filter, position = grant.filter & reading.filter, cursor.seq
        while position < bounds.latest:
            page = await store.read(position, PAGE_EVENTS, _SCAN_BYTES)
            if isinstance(page, Evicted):
                return False
            if any(envelope.sees(event) and filter.matches(event) for event in page.events):
                return False
            position = page.last
        return True

    async def _head(self, request: Request) -> ASGIApp:
        await self.grant(request)
        read_parameters(request)
        response = Response()
        response.raw_headers = list(frames.HEADERS)
        return response

    async def _post(self, request: Request) -> ASGIApp:
        if not self._publish:
            raise Reject(405, "publishing over HTTP is not enabled here", {"Allow": "GET, HEAD"})
        if is_foreign(request, self._origins):
            raise Reject(403, "publishing from this origin is not allowed")
        grant = await self.grant(request)
        if not grant.may_publish:
            raise Reject(403, "this caller may not publish")
        return await post_events(self.bus, request)

    async def _status(self, request: Request) -> ASGIApp:
        said = self.bus.statistics(await self.grant(request))

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            server = server_status(scope, scope.get(OWN_SEND, send))
            await JSONResponse({**said, "server": server})(scope, receive, send)

        return answer


class _Prefix(Mount):
    """A mount that takes only what its routes match: other paths under the same prefix stay the host's."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is not Match.NONE and not _any_matches(self.routes, {**scope, **child}):
            return Match.NONE, {}
        return match, child


def _any_matches(routes: Iterable[BaseRoute], scope: Scope) -> bool:
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)


class _Endpoint:
    """One path: answers by method, and turns refusals into JSON before the first byte."""

    def __init__(self, app: EventApp, methods: dict[str, Any]) -> None:
        self._app = app
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._response(Request(scope, receive, send))
        try:
            if not isinstance(response, EventStreamResponse):
                await response(scope, receive, send)
                return
            try:
                if response.can_be_stepped(scope, receive, send):
                    while await response.give(scope, send):
                        await response.subscription.news()
                    response.finish(scope, send)
                else:
                    await response(scope, receive, send)
            finally:
                response.close()
        except RuntimeError:
            if not is_closed(scope.get(OWN_SEND, send)):
                raise

    async def _response(self, request: Request) -> ASGIApp:
        handler = self._methods.get(request.method)
        try:
            if handler is None:
                raise Reject(405, f"{request.method} is not served here", {"Allow": ", ".join(self._methods)})
            if not self._app.bus.running:
                await _first_use(self._app.bus)
            response: ASGIApp = await handler(request)
            return response
        except Reject as refusal:
            return JSONResponse({"error": refusal.detail}, refusal.status, refusal.headers)
        except InvalidFilter as error:
            return JSONResponse({"error": str(error), "parameter": error.parameter}, 400)


async def _first_use(bus: EventBus) -> None:
    """Start a bus whose host gives no lifespan; one that was drained stays closed."""
    if bus.state != "new":
        raise Reject(503, "the event stream is draining", {"Retry-After": "1"})
    try:
        await bus.start()
    except (BusClosed, StoreUnavailable) as error:
        raise Reject(503, str(error), {"Retry-After": "1"}) from error


def event_app(
    bus: EventBus,
    *,
    authorize: Authorize | None,
    path: str = "",
    publish: bool = False,
    origins: Collection[str] = (),
) -> EventApp:
    """The bare ASGI app, for hosts that are not Starlette; it runs the bus in its lifespan, or from first use.

    :param authorize: says who may attach; ``None`` lets everybody in, explicitly.
    :param path: prefix of ``/event``, ``/global/event`` and ``/event/status``.
    :param publish: whether ``POST /event`` is there.
    :param origins: browser origins that may publish besides our own.
    :raises ValueError: if the path does not begin with a slash. Whatever an ``sse_routes`` plugin raises.
    """
    return EventApp(bus, authorize=authorize, path=path, publish=publish, origins=origins)
