"""Who may see which sessions, by signed token.

A token says who it is for, what it opens and until when; nothing is looked up, so that every worker can check it. What
it opens becomes a filter, and a filter is applied to live events and to replay alike. Directories and workspaces open
sessions that do not exist yet; session ids open only themselves.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from itsdangerous import BadData, URLSafeSerializer
from starlette.requests import Request

from opencode_sse_plugin import ConfigurationError, Filter, Grant, InvalidFilter, Reject, Subscriber, hookimpl

#: Secrets, separated by commas: the first one signs, all of them are accepted, so that they can be changed.
SECRETS_VARIABLE: Final = "OPENCODE_SSE_ACL_SECRETS"
SHORTEST_SECRET: Final = 16
_SALT: Final = "opencode-sse-session-acl"


class Tokens:
    """Signs tokens and says what they grant.

    :param secrets: the first one signs. :raises ConfigurationError: if there is none, or one that can be guessed.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        if not secrets or min(map(len, secrets)) < SHORTEST_SECRET:
            raise ConfigurationError(f"{SECRETS_VARIABLE} needs a secret of at least {SHORTEST_SECRET} characters")
        # The library has the newest key last.
        self._serializer = URLSafeSerializer(list(reversed(secrets)), salt=_SALT)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Tokens:
        """The secrets of ``OPENCODE_SSE_ACL_SECRETS``."""
        text = (os.environ if environ is None else environ).get(SECRETS_VARIABLE, "")
        return cls([secret for part in text.split(",") if (secret := part.strip())])

    def sign(
        self,
        caller: str,
        *,
        expires_at: float,
        directories: Collection[str] | None = None,
        workspaces: Collection[str] | None = None,
        sessions: Collection[str] | None = None,
        everything: bool = False,
        may_publish: bool = False,
    ) -> str:
        """A token.

        :param caller: a name for logs and status. :param expires_at: seconds since 1970.
        :param directories, workspaces: whose sessions it opens, those to come as well.
        :param sessions: opens these only; beside directories or workspaces, these where they are there.
        :param everything: in place of the three, opens all. :param may_publish: for hosts that use :func:`authorize`.
        :raises ValueError: if it would open nothing, or both everything and something.
        """
        opened = {"directories": directories, "workspaces": workspaces, "sessions": sessions}
        named = {name: sorted(values) for name, values in opened.items() if values is not None}
        if everything == bool(named):
            raise ValueError("say what the token opens: directories, workspaces and sessions, or everything")
        claims: dict[str, Any] = {"caller": caller, "expires": expires_at, **named}
        _grant(claims)  # What cannot be read again must not be handed out.
        if may_publish:
            claims["publish"] = True
        token = self._serializer.dumps(claims)
        return token if isinstance(token, str) else token.decode("ascii")

    def grant(self, token: str, now: float | None = None) -> Grant:
        """What a token grants. :raises Reject: 401 if it is not ours, was changed, or has expired."""
        try:
            grant = _grant(self._serializer.loads(token))
        except (BadData, InvalidFilter, KeyError, TypeError, ValueError) as error:
            raise _refused("the token is not valid") from error
        assert grant.expires_at is not None
        if grant.expires_at <= (time.time() if now is None else now):
            raise _refused("the token has expired")
        return grant


def _grant(claims: object) -> Grant:
    if not isinstance(claims, dict):
        raise TypeError("a token is an object")
    sessions, directories, workspaces = (_names(claims, name) for name in ("sessions", "directories", "workspaces"))
    # An event that says no directory may be anybody's, and so nobody's whose token names directories.
    places = {"directory": directories, "workspace": workspaces}
    placed = frozenset(name for name, values in places.items() if values is not None)
    caller, expires = claims["caller"], float(claims["expires"])
    if not isinstance(caller, str) or not math.isfinite(expires):
        raise TypeError("a token has a caller and the time it expires at")
    filter = Filter(sessions=sessions, directories=directories, workspaces=workspaces, placed=placed)
    return Grant(caller, filter, may_publish=claims.get("publish") is True, expires_at=expires)


def _names(claims: Mapping[str, Any], name: str) -> frozenset[str] | None:
    """What a token opens under a name; ``None`` if it says nothing of it, which is not the same as an empty list."""
    values = claims.get(name)
    if values is None:
        return None
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list")
    Filter.of(session=values)  # refuses what no event can have
    return frozenset(values)


def _refused(detail: str) -> Reject:
    return Reject(401, detail, {"WWW-Authenticate": 'Bearer error="invalid_token"'})


def token_of(request: Request) -> str:
    """The token of a request: ``?access_token=``, ``Authorization: Bearer``, or as the password of ``Basic`` and
    ``?auth_token=``, which is what opencode's own clients can send. :raises Reject: 401 if there is none."""
    query = request.query_params
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if token := query.get("access_token") or (value.strip() if scheme.lower() == "bearer" else ""):
        return token
    pair = value if scheme.lower() == "basic" else query.get("auth_token", "")
    try:
        _, _, password = base64.b64decode(pair, validate=True).decode("utf-8").partition(":")
    except (binascii.Error, ValueError):
        password = ""
    if not password:
        raise Reject(401, "a token is needed", {"WWW-Authenticate": "Bearer"})
    return password


def authorize(request: Request) -> Grant:
    """For ``install(app, authorize=authorize)``: the token then covers status and publishing too."""
    return Tokens.from_environment().grant(token_of(request))


@hookimpl
def sse_startup() -> None:
    """Without a secret nobody could be let in, and that is better known now."""
    Tokens.from_environment()


@hookimpl
def sse_subscriber_attach(subscriber: Subscriber, request: Request | None) -> None:
    """Narrow a stream to its token, until that expires. The host's own code, which has no request, sees all."""
    if request is None:
        return
    given, host = authorize(request), subscriber.grant
    subscriber.narrow(given.filter)
    ends = [end for end in (given.expires_at, host.expires_at) if end is not None]
    subscriber.grant = replace(host, caller=given.caller, filter=host.filter & given.filter, expires_at=min(ends))


def main(arguments: Sequence[str] | None = None) -> int:
    """``opencode-sse-token``: print a token signed with the first of the secrets."""
    parser = argparse.ArgumentParser(prog="opencode-sse-token", description=main.__doc__)
    parser.add_argument("caller", help="who it is for; shown in logs and status")
    for name, help in (
        ("directory", "open its sessions, those to come as well"),
        ("workspace", "open its sessions, those to come as well"),
        ("session", "open this session only"),
    ):
        parser.add_argument(f"--{name}", action="append", help=f"{help}; may be repeated")
    parser.add_argument("--everything", action="store_true", help="open all sessions")
    parser.add_argument("--publish", action="store_true", help="allow POST /event, where the host uses authorize")
    parser.add_argument("--hours", type=float, default=12.0, help="until it expires (12)")
    options = parser.parse_args(arguments)
    try:
        token = Tokens.from_environment().sign(
            options.caller,
            expires_at=time.time() + options.hours * 3600,
            directories=options.directory,
            workspaces=options.workspace,
            sessions=options.session,
            everything=options.everything,
            may_publish=options.publish,
        )
    except ValueError as error:
        parser.error(str(error))
    print(token)
    return 0
