"""What a client makes of the stream: the state that opencode's own clients keep, as a pure fold over events.

Two streams say the same if they fold into equal states; that is what "lossless" means for a policy that takes events
away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..events import Event

#: id → the object.
Objects = dict[str, dict[str, Any]]

_ASKED = {
    "permission.asked": "permissions",
    "permission.v2.asked": "permissions",
    "question.asked": "questions",
    "question.v2.asked": "questions",
}
_ANSWERED = {
    "permission.replied": "permissions",
    "permission.v2.replied": "permissions",
    "question.replied": "questions",
    "question.rejected": "questions",
    "question.v2.replied": "questions",
    "question.v2.rejected": "questions",
}
#: Replaced as a whole: event type → attribute and the property that is kept, by session.
_WHOLE = {
    "session.status": ("statuses", "status"),
    "session.diff": ("diffs", "diff"),
    "todo.updated": ("todos", "todos"),
}


@dataclass
class State:
    """Sessions, messages and parts by id; status, todos and diff by session; open permissions and questions by id."""

    sessions: Objects = field(default_factory=dict)
    messages: Objects = field(default_factory=dict)
    parts: Objects = field(default_factory=dict)
    statuses: dict[str, Any] = field(default_factory=dict)
    todos: dict[str, Any] = field(default_factory=dict)
    diffs: dict[str, Any] = field(default_factory=dict)
    permissions: Objects = field(default_factory=dict)
    questions: Objects = field(default_factory=dict)

    def apply(self, event: Event | Mapping[str, Any]) -> None:
        """Take one event in: an :class:`Event`, or the object behind ``data:`` on ``/event``. Others are ignored."""
        if isinstance(event, Event):
            kind, properties = event.type, event.properties or {}
        else:
            kind, properties = event["type"], event.get("properties") or {}
        if kind == "message.part.delta":
            part = self.parts.get(properties["partID"])
            if part is not None:  # Nobody can add to a part that is not there.
                part[properties["field"]] = _text(part.get(properties["field"]) or "", properties["delta"])
        elif kind == "message.part.updated":
            self.parts[properties["part"]["id"]] = dict(properties["part"])
        elif kind == "message.part.removed":
            self.parts.pop(properties["partID"], None)
        elif kind == "message.updated":
            self.messages[properties["info"]["id"]] = dict(properties["info"])
        elif kind == "message.removed":
            self._remove_message(properties["messageID"])
        elif kind in ("session.created", "session.updated"):
            self.sessions[properties["info"]["id"]] = dict(properties["info"])
        elif kind == "session.deleted":
            self._remove_session(properties["info"]["id"])
        elif kind in _WHOLE:
            attribute, name = _WHOLE[kind]
            getattr(self, attribute)[properties["sessionID"]] = properties[name]
        elif kind in _ASKED:
            getattr(self, _ASKED[kind])[properties["id"]] = dict(properties)
        elif kind in _ANSWERED:
            getattr(self, _ANSWERED[kind]).pop(properties["requestID"], None)

    def _remove_message(self, id: str) -> None:
        self.messages.pop(id, None)
        for part in [name for name, part in self.parts.items() if part.get("messageID") == id]:
            del self.parts[part]

    def _remove_session(self, id: str) -> None:
        self.sessions.pop(id, None)
        for by_session in (self.statuses, self.todos, self.diffs):
            by_session.pop(id, None)
        for objects in (self.messages, self.parts, self.permissions, self.questions):
            for name in [name for name, one in objects.items() if one.get("sessionID") == id]:
                del objects[name]


def fold(events: Iterable[Event | Mapping[str, Any]], state: State | None = None) -> State:
    """Fold events into a state, a new one or one that goes on; control frames and unknown types are ignored."""
    state = state or State()
    for event in events:
        state.apply(event)
    return state


def _text(before: str, added: str) -> str:
    """Two texts as one. Halves of a surrogate pair become one character, as in JavaScript and in joined deltas."""
    return (before + added).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
