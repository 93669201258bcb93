"""Whose authentication applies: the host's where the routes stand inside its middleware, ours where they do not."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from opencode_sse_plugin import BasicPassword, Filter, Grant, install
from opencode_sse_plugin.testing import lifespan, request, stream

from .apps import KINDS, make_host, new_bus

pytestmark = pytest.mark.anyio


class Bearer(AuthenticationBackend):
    """The host's own: ``Bearer NAME``, or 400."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        scheme, _, name = conn.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            raise AuthenticationError("the host does not know you")
        return AuthCredentials(["reader"]), SimpleUser(name)


def by_user(request: Request) -> Grant | None:
    """What a host writes that has authenticated the caller already."""
    name = request.user.display_name
    return None if name == "banned" else Grant(name, Filter.of(session=name))


def bearer_host(kind: str, when: str, authorize: Any, placement: Any) -> tuple[Starlette, Any]:
    app = make_host(kind)
    if when == "before":
        app.add_middleware(AuthenticationMiddleware, backend=Bearer())
    bus = install(app, new_bus(), authorize=authorize, placement=placement)
    if when == "after":
        app.add_middleware(AuthenticationMiddleware, backend=Bearer())
    return app, bus


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_inside_the_hosts_authentication_applies_and_then_ours(kind: str, when: str) -> None:
    app, bus = bearer_host(kind, when, by_user, "route")
    async with lifespan(app):
        for path in ("/hello", "/event", "/global/event", "/event/status"):
            refused = await request(app, "GET", path)
            assert (refused.status, refused.body) == (400, b"the host does not know you")
        banned = {"authorization": "Bearer banned"}
        assert (await request(app, "GET", "/hello", headers=banned)).status == 200
        assert (await request(app, "GET", "/event", headers=banned)).status == 401
        ann = {"authorization": "Bearer ann"}
        async with stream(app, "/event", headers=ann) as response:
            await response.next()
            await bus.publish("a", {"sessionID": "bob"})
            await bus.publish("b", {"sessionID": "ann"})
            assert (await response.next()).type == "b"
            status = (await request(app, "GET", "/event/status", headers=ann)).json()
            assert [subscriber["caller"] for subscriber in status["subscribers"]] == ["ann"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_outside_only_ours_applies(kind: str, when: str) -> None:
    app, _ = bearer_host(kind, when, BasicPassword("secret"), "outermost")
    basic = {"authorization": "Basic " + base64.b64encode(b"opencode:secret").decode()}
    bearer = {"authorization": "Bearer ann"}
    async with lifespan(app):
        assert (await request(app, "GET", "/hello", headers=bearer)).status == 200
        assert (await request(app, "GET", "/hello", headers=basic)).status == 400
        for path in ("/event", "/global/event", "/event/status"):
            assert (await request(app, "HEAD", path, headers=bearer)).status == 401
            assert (await request(app, "HEAD", path, headers=basic)).status == 200


@pytest.mark.parametrize("kind", KINDS)
async def test_outside_with_nothing_of_ours_everybody_is_let_in(kind: str) -> None:
    """What ``authorize=None`` says; the host's middleware does not help."""
    app, _ = bearer_host(kind, "before", None, "outermost")
    async with lifespan(app), stream(app, "/event") as response:
        assert (await response.next()).type == "server.connected"


@pytest.mark.parametrize("placement", ["outermost", "route"])
async def test_dependencies_of_fastapi_never_apply(placement: Any) -> None:
    """They belong to FastAPI's own routes; ``authorize`` is the place for what they check."""

    def nobody() -> None:
        raise HTTPException(401)

    app = FastAPI(dependencies=[Depends(nobody)])
    app.get("/hello")(lambda: "hello")
    install(
        app, new_bus(), authorize=lambda request: Grant() if "x-ok" in request.headers else None, placement=placement
    )
    async with lifespan(app):
        assert (await request(app, "GET", "/hello")).status == 401
        assert (await request(app, "GET", "/event")).status == 401
        assert (await request(app, "GET", "/hello", headers={"x-ok": "1"})).status == 401
        assert (await request(app, "HEAD", "/event", headers={"x-ok": "1"})).status == 200


# Sessions.


def by_session(request: Request) -> Grant | None:
    name = request.session.get("user")
    return Grant(name, Filter.of(session=name)) if name else None


def log_in(request: Request) -> PlainTextResponse:
    request.session["user"] = "ann"
    return PlainTextResponse("welcome")


def session_host(kind: str, when: str, placement: Any) -> tuple[Starlette, Any]:
    app = make_host(kind)
    app.router.routes.append(Route("/login", log_in))
    if when == "before":
        app.add_middleware(SessionMiddleware, secret_key="secret")
    bus = install(app, new_bus(), authorize=by_session, placement=placement)
    if when == "after":
        app.add_middleware(SessionMiddleware, secret_key="secret")
    return app, bus


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_inside_the_hosts_session_says_who_it_is(kind: str, when: str) -> None:
    app, bus = session_host(kind, when, "route")
    async with lifespan(app):
        assert (await request(app, "GET", "/event")).status == 401
        cookie = (await request(app, "GET", "/login")).headers["set-cookie"].partition(";")[0]
        await bus.publish("a", {"sessionID": "bob"})
        await bus.publish("b", {"sessionID": "ann"})
        async with stream(app, "/event?after_seq=0", headers={"cookie": cookie}) as response:
            assert [frame.type for frame in await response.rest()] == ["server.connected", "b"]
        forged = {"cookie": cookie.replace("=", "=x")}
        assert (await request(app, "GET", "/event", headers=forged)).status == 401


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_outside_there_is_no_session_and_nobody_gets_in(kind: str, when: str) -> None:
    app, _ = session_host(kind, when, "outermost")
    async with lifespan(app):
        cookie = (await request(app, "GET", "/login")).headers["set-cookie"].partition(";")[0]
        answer = await request(app, "GET", "/event", headers={"cookie": cookie})
        assert answer.status == 500
