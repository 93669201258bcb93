"""Letting in: opencode's own kind of password, and what a stand-alone server on loopback needs against browsers."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Reject
from .subscriber import Grant
from .transport import OWN_SEND

#: Says who may attach: a grant, or ``None`` for a caller who is not let in. May be async; may raise ``Reject``.
Authorize = Callable[[Request], Grant | Awaitable[Grant | None] | None]

_CHALLENGE: Final = {"WWW-Authenticate": 'Basic realm="Secure Area"'}


class BasicPassword:
    """opencode's authentication: Basic, or ``?auth_token=base64(user:password)``.

    :param password: as in ``OPENCODE_SERVER_PASSWORD``. :param username: as in ``OPENCODE_SERVER_USERNAME``.
    """

    def __init__(self, password: str, username: str = "opencode") -> None:
        if not password:
            raise ValueError("an empty password lets everybody in; use authorize=None to say so")
        self._expected = f"{username}:{password}".encode()
        self._grant = Grant.everything(username)

    def __call__(self, request: Request) -> Grant:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            token = request.query_params.get("auth_token", "")
        try:
            given = base64.b64decode(token, validate=True)
        except (binascii.Error, ValueError):
            given = b""
        # Constant time: the time of a comparison must not tell how much of a guess was right.
        if not hmac.compare_digest(given, self._expected):
            raise Reject(401, "a password is needed", _CHALLENGE)
        return self._grant


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host.lower().rstrip(".") in ("localhost",) or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _hostname(url: str) -> str:
    """The host of a URL; empty for one that makes no sense."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_foreign(connection: HTTPConnection, origins: Collection[str]) -> bool:
    """Whether a request comes from a page of another origin than ours and the allowed ones. Clients that are not
    browsers send no ``Origin``."""
    origin = connection.headers.get("origin")
    if origin is None or origin in origins or "*" in origins:
        return False
    # Not ``connection.url``, which parses a query that may be anything.
    return origin != f"{connection.scope['scheme']}://{connection.headers.get('host', '')}"


class LoopbackGuard:
    """Wraps a stand-alone app: a page in a browser must not reach it by DNS rebinding or from a foreign origin.

    :param hosts: names allowed in ``Host`` besides loopback ones.
    :param origins: origins allowed besides loopback ones.
    :param addresses: whether any address is allowed in ``Host``; rebinding needs a name.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str] = (), origins: Collection[str] = (), addresses: bool = False
    ) -> None:
        self._app = app
        self._addresses = addresses
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = _hostname("//" + headers.get("host", ""))
            if not (is_loopback(host) or host in self._hosts or (self._addresses and _is_address(host))):
                response = JSONResponse({"error": f"host {host!r} is not served here", "parameter": "host"}, 403)
                return await response(scope, receive, send)
            origin = headers.get("origin")
            if origin is not None and origin not in self._origins and not is_loopback(_hostname(origin)):
                response = JSONResponse({"error": f"origin {origin!r} is not allowed", "parameter": "origin"}, 403)
                return await response(scope, receive, send)
            scope[OWN_SEND] = send
            try:
                return await self._app(scope, receive, send)
            finally:
                del scope[OWN_SEND]  # Else what belongs to the request would be a cycle, left to the garbage collector.
        await self._app(scope, receive, send)
