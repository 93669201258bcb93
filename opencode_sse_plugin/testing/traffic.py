"""Made-up opencode traffic: sessions that talk at the same time, in the event types that clients fold into state."""

from __future__ import annotations

from random import Random

from ..events import Event

_WORDS = ("so ", "the ", "tests ", "pass ", "né ", "日本 ", "\ud83d", "\ude00 ")


class Traffic:
    """An endless source of events, the same for the same ``random``.

    :param sessions: how many talk at once; they end and are replaced.
    """

    def __init__(self, random: Random, sessions: int = 3) -> None:
        self._random = random
        self._made = 0
        self._sessions = [self._name("ses") for _ in range(sessions)]
        #: part id → (session, message)
        self._parts: dict[str, tuple[str, str]] = {}
        self._asked: list[tuple[str, str]] = []
        #: Deltas come in runs, a word each, as a model speaks.
        self._speaking = ("", "text", 0)

    def take(self, count: int) -> list[Event]:
        """The next events."""
        return [self._next() for _ in range(count)]

    def _name(self, prefix: str) -> str:
        self._made += 1
        return f"{prefix}_{self._made:04d}"

    def _next(self) -> Event:
        random = self._random
        session = random.choice(self._sessions)
        dice = random.random()
        if dice < 0.9 and self._parts:
            return self._delta()
        dice = random.random() / 2 + 0.5
        if dice < 0.72:
            return self._part(session)
        if dice < 0.80:
            return self._event("session.status", session, status={"type": random.choice(("busy", "idle"))})
        if dice < 0.84:
            todos = [{"content": random.choice(_WORDS[:4]), "status": "pending"}] * random.randint(0, 2)
            return self._event("todo.updated", session, todos=todos)
        if dice < 0.88:
            return self._event("session.updated", session, info={"id": session, "title": random.choice(_WORDS)})
        if dice < 0.95:
            return self._question(session)
        if dice < 0.97 and self._parts:
            part = random.choice(list(self._parts))
            owner, message = self._parts.pop(part)
            if random.random() < 0.5:
                return self._event("message.removed", owner, messageID=message)
            return self._event("message.part.removed", owner, messageID=message, partID=part)
        if dice < 0.98:
            self._sessions.remove(session)
            self._sessions.append(self._name("ses"))
            return self._event("session.deleted", session, info={"id": session})
        return self._event("file.watcher.updated", None, file="a.py", event="change")

    def _delta(self) -> Event:
        random = self._random
        part, field, left = self._speaking
        if not left or part not in self._parts:
            part = random.choice(list(self._parts)[-4:])
            field, left = random.choice(("text", "text", "text", "reasoning")), random.randint(3, 40)
        self._speaking = (part, field, left - 1)
        owner, message = self._parts[part]
        return self._event(
            "message.part.delta", owner, messageID=message, partID=part, field=field, delta=random.choice(_WORDS)
        )

    def _part(self, session: str) -> Event:
        random = self._random
        known = [part for part, (owner, _) in self._parts.items() if owner == session]
        if known and random.random() < 0.6:
            part = random.choice(known)
        else:
            part = self._name("prt")
            self._parts[part] = (session, self._name("msg"))
        message = self._parts[part][1]
        if random.random() < 0.3:
            return self._event(
                "message.updated", session, info={"id": message, "sessionID": session, "cost": self._made}
            )
        body = {
            "id": part,
            "messageID": message,
            "sessionID": session,
            "type": "text",
            "text": random.choice(_WORDS[:6]),
        }
        return self._event("message.part.updated", session, part=body, time=self._made)

    def _question(self, session: str) -> Event:
        kind = self._random.choice(("permission", "question"))
        if self._asked and self._random.random() < 0.5:
            kind, request = self._asked.pop(0)
            return self._event(f"{kind}.replied", session, requestID=request, reply="once")
        request = self._name("per")
        self._asked.append((kind, request))
        return self._event(f"{kind}.asked", session, id=request, permission="bash")

    def _event(self, type: str, session: str | None, **properties: object) -> Event:
        if session is not None:
            properties["sessionID"] = session
        return Event(type, properties)
