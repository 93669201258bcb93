"""What travels: events, stored events, cursors and ids. Values only; nothing here waits or sends."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Literal, NamedTuple

from .encoding import decode, encode
from .errors import InvalidEvent

Scope = Literal["instance", "global"]

#: Largest sequence number a client may name: the largest integer JavaScript holds exactly.
MAX_SEQ: Final = 2**53 - 1
_MAX_NAME: Final = 512
#: Deepest nesting of a payload. Parsers stop somewhere (Python's at its recursion limit, less the stack it runs in),
#: and what the publisher can still write, not every reader can read.
MAX_DEPTH: Final = 128
_NUMBER = re.compile(r"[0-9]{1,16}", re.ASCII)
_EPOCH = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
#: In so few bytes no payload is nested deeper: each level takes two, or five where it is an object.
_FLAT: Final = 2 * MAX_DEPTH
_FLAT_OBJECTS: Final = 5 * MAX_DEPTH
#: As a number it is looked for ten times as fast.
_BRACKET_CODE: Final = ord("[")
_BRACKET = re.compile(rb"[][{}]")
_RESERVED = re.compile(r"server\.(connected|heartbeat|stream\..*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Event:
    """One event as a publisher gives it.

    :param type: such as ``message.part.delta``.
    :param properties: JSON object; ``None`` leaves the key out (opencode's ``sync`` twins have none).
    :param id: ``evt_…``; empty lets the bus make one.
    :param directory, project, workspace: where it belongs; ``None`` means everywhere.
    :param scope: ``global`` events are seen on ``/global/event`` only.
    :param extra: payload keys beside id, type and properties; kept as they are.
    """

    type: str
    properties: Mapping[str, Any] | None = field(default_factory=dict)
    id: str = ""
    directory: str | None = None
    project: str | None = None
    workspace: str | None = None
    scope: Scope = "instance"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> str | None:
        """The session it belongs to, as a filter sees it."""
        return session_of(self.type, self.properties)

    def payload(self) -> dict[str, Any]:
        """The object behind ``data:`` on ``/event``."""
        body: dict[str, Any] = {"id": self.id, "type": self.type}
        if self.properties is not None:
            body["properties"] = self.properties
        body.update((key, value) for key, value in self.extra.items() if key not in body and key != "properties")
        return body


def session_of(type: str, properties: Mapping[str, Any] | None) -> str | None:
    """Find the session of an event.

    31 of opencode's 89 event types carry no ``properties.sessionID`` (measured, opencode 1.18), hence the order:
    ``sessionID``, the same inside ``info`` or ``part``, and ``info.id`` for ``session.*``.
    """
    if not properties:
        return None
    session = properties.get("sessionID")
    if isinstance(session, str):
        return session
    info = properties.get("info")
    for inner in (info, properties.get("part")):
        if isinstance(inner, Mapping):
            session = inner.get("sessionID")
            if isinstance(session, str):
                return session
    if type.startswith("session.") and isinstance(info, Mapping):
        named = info.get("id")
        if isinstance(named, str):
            return named
    return None


#: What a delivery class table found an event to describe: its key, and what must be equal for its text to be appended.
Described = tuple[str | None, bytes | None]
NOTHING: Final[Described] = (None, None)


class StoredEvent:
    """An event as the log holds it: encoded once, with what filters look at beside it.

    ``payload`` is the JSON of ``/event``; its length in bytes is what every byte limit counts. ``seq`` is 0 until the
    store gave one. ``event`` parses the payload again: for policies and plugins, never on the way of a delivery.
    ``unseen`` says that its id was made for this very publish, so that no store can know it.
    """

    __slots__ = (
        "described",
        "directory",
        "id",
        "payload",
        "project",
        "scope",
        "seq",
        "session",
        "type",
        "unseen",
        "workspace",
    )

    def __init__(
        self,
        seq: int,
        id: str,
        type: str,
        session: str | None,
        directory: str | None,
        project: str | None,
        workspace: str | None,
        scope: Scope,
        payload: bytes,
    ) -> None:
        self.seq = seq
        self.id = id
        self.type = type
        self.session = session
        self.directory = directory
        self.project = project
        self.workspace = workspace
        self.scope = scope
        self.payload = payload
        self.described: Described | None = None
        self.unseen = False

    @classmethod
    def encode(cls, event: Event, *, index: int = 0, encoder: Callable[[object], bytes] = encode) -> StoredEvent:
        """Encode a complete event (it has an id).

        :raises InvalidEvent: if the properties have no JSON form; ``index`` is passed on.
        """
        return cls(
            0,
            event.id,
            event.type,
            event.session,
            event.directory,
            event.project,
            event.workspace,
            event.scope,
            encode_body(event.payload(), index, encoder),
        )

    @property
    def size(self) -> int:
        """Bytes of the encoded payload."""
        return len(self.payload)

    @property
    def event(self) -> Event:
        """The event, parsed from its payload."""
        body = decode(self.payload)
        return Event(
            type=self.type,
            properties=body.get("properties"),
            id=self.id,
            directory=self.directory,
            project=self.project,
            workspace=self.workspace,
            scope=self.scope,
            extra={key: value for key, value in body.items() if key not in ("id", "type", "properties")},
        )

    def __repr__(self) -> str:
        return f"StoredEvent(seq={self.seq}, type={self.type!r}, id={self.id!r}, size={self.size})"


def encode_body(body: Mapping[str, Any], index: int = 0, encoder: Callable[[object], bytes] = encode) -> bytes:
    """Encode the object behind ``data:``.

    :raises InvalidEvent: if it has no JSON form that every reader can read; ``index`` is passed on.
    """
    try:
        payload = encoder(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"event {body['type']!r} cannot be written as JSON: {error}", index=index) from error
    # Counting takes longer than writing did.
    size = len(payload)
    if size > _FLAT and (size > _FLAT_OBJECTS or _BRACKET_CODE in payload) and _depth(payload) > MAX_DEPTH:
        raise InvalidEvent(f"event {body['type']!r} is nested deeper than {MAX_DEPTH} levels", index=index)
    return payload


def _depth(payload: bytes) -> int:
    """How deep JSON is nested, or a bound of that which is not too much."""
    if (most := payload.count(b"[") + payload.count(b"{")) <= MAX_DEPTH:
        return most
    brackets = _BRACKET.findall(_STRING.sub(b"", payload))
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets))


class Cursor(NamedTuple):
    """``EPOCH:SEQ``: up to ``seq``, everything has been given to me or I have been told that it is lost.

    ``epoch`` is ``None`` for a bare number (``after_seq`` without ``epoch``).
    """

    epoch: str | None
    seq: int

    def __str__(self) -> str:
        return str(self.seq) if self.epoch is None else f"{self.epoch}:{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Read ``EPOCH:SEQ``; ``None`` if it is malformed."""
        epoch, colon, number = text.rpartition(":")
        seq = parse_seq(number)
        return cls(epoch, seq) if colon and seq is not None and valid_epoch(epoch) else None


def parse_seq(text: str) -> int | None:
    """Read a sequence number: 1 to 16 ASCII digits, at most 2^53-1; ``None`` if it is malformed."""
    if _NUMBER.fullmatch(text) is None:
        return None
    seq = int(text)
    return seq if seq <= MAX_SEQ else None


def valid_epoch(text: str) -> bool:
    """Whether a text can be an epoch: 1 to 64 of ``A-Za-z0-9_-``."""
    return _EPOCH.fullmatch(text) is not None


def is_reserved(type: str) -> bool:
    """Whether a type is one of the stream's own control frames, which nobody may publish."""
    return _RESERVED.fullmatch(type) is not None


#: Types that were found good before: a host publishes few types, many times.
_GOOD_TYPES: Final[set[str]] = set()
_GOOD_TYPES_MAX: Final = 10_000


def check_event(event: Event, index: int = 0) -> None:
    """Refuse what no client could tell from something else.

    :raises InvalidEvent: naming the field and what would be right.
    """
    check_parts(
        event.type, event.properties, event.id, event.directory, event.project, event.workspace, event.scope, index
    )


def check_parts(
    type: str,
    properties: Mapping[str, Any] | None,
    id: str,
    directory: str | None,
    project: str | None,
    workspace: str | None,
    scope: Scope,
    index: int = 0,
) -> None:
    """As :func:`check_event`, for an event that is not made yet."""
    if type.__class__ is not str or type not in _GOOD_TYPES:
        _check_type(type, index)
    if id != "":
        _check_name("id", id, index)
    if properties.__class__ is not dict and properties is not None and not isinstance(properties, Mapping):
        raise InvalidEvent("properties must be an object", index=index)
    if directory is not None or project is not None or workspace is not None:
        for name, place in (("directory", directory), ("project", project), ("workspace", workspace)):
            if place is not None and not isinstance(place, str):
                raise InvalidEvent(f"{name} must be a string", index=index)
    if scope != "instance" and scope != "global":
        raise InvalidEvent("scope must be 'instance' or 'global'", index=index)


def _check_type(type: str, index: int) -> None:
    _check_name("type", type, index)
    if not type:
        raise InvalidEvent("type must not be empty", index=index)
    if is_reserved(type):
        raise InvalidEvent(
            f"type {type!r} is the stream's own; server.connected, server.heartbeat and server.stream.* "
            "cannot be published",
            index=index,
        )
    if len(_GOOD_TYPES) < _GOOD_TYPES_MAX:
        _GOOD_TYPES.add(type)


def _check_name(name: str, value: str, index: int) -> None:
    if not isinstance(value, str) or len(value) > _MAX_NAME or _UNFIT.search(value):
        raise InvalidEvent(
            f"{name} must be a string of at most {_MAX_NAME} characters without control characters or lone surrogates",
            index=index,
        )
