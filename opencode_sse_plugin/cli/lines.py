"""Events as lines of text: the envelope of ``/global/event``, with the number and scope that a log keeps beside it."""

from __future__ import annotations

from typing import Any, Final

from ..encoding import decode, encode
from ..events import Event, StoredEvent

_PLACES: Final = ("directory", "project", "workspace")
_KNOWN: Final = frozenset(("seq", *_PLACES, "scope", "payload"))
SHAPE: Final = '{"payload": {"id": …, "type": …, "properties": …}, "directory"?, "project"?, "workspace"?, "scope"?}'


def event_of(envelope: dict[str, Any]) -> Event:
    """The event of an envelope, of either route; not checked yet.

    :raises ValueError: if there is none in it.
    """
    payload = envelope.get("payload", envelope)
    if not isinstance(payload, dict) or not isinstance(payload.get("type"), str):
        raise ValueError("an event needs a type, a string")
    place = envelope if "payload" in envelope else {}
    return Event(
        payload["type"],
        payload.get("properties"),
        payload.get("id", ""),
        place.get("directory"),
        place.get("project"),
        place.get("workspace"),
        # opencode's twins for its own synchronisation: seen on /global/event only.
        place.get("scope", "global" if payload["type"] == "sync" else "instance"),
        {key: value for key, value in payload.items() if key not in ("id", "type", "properties")},
    )


def line_of(event: StoredEvent) -> bytes:
    """One line; the payload is the one that clients get, byte for byte."""
    head: dict[str, object] = {"seq": event.seq}
    head.update((name, value) for name in _PLACES if (value := getattr(event, name)) is not None)
    head["scope"] = event.scope
    return b'%b,"payload":%b}\n' % (encode(head)[:-1], event.payload)


def read_line(line: bytes) -> Event:
    """The event of one line; its ``seq`` is not looked at, since a log gives its own.

    :raises ValueError: saying what would be right.
    """
    try:
        value = decode(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}); a line is {SHAPE}") from None
    if not isinstance(value, dict) or not isinstance(value.get("payload"), dict):
        raise ValueError(f"a line is {SHAPE}")
    if unknown := value.keys() - _KNOWN:
        raise ValueError(f"there is no {sorted(unknown)[0]!r} in a line; it is {SHAPE}")
    return event_of(value)
