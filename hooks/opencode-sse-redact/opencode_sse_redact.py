"""Masks secrets in what is published, before anything is stored; also those that come in pieces.

Agents stream text a few letters at a time, so that no single event holds a whole key. What could be the beginning of a
secret is therefore held back until the next piece of the same text shows what it is.
"""

from __future__ import annotations

import os
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple

import regex

from opencode_sse_plugin import ConfigurationError, Event, EventBus, hookimpl

#: More patterns, one a line; and more names whose values are masked whatever they are, separated by commas.
PATTERNS_VARIABLE: Final = "OPENCODE_SSE_REDACT_PATTERNS"
NAMES_VARIABLE: Final = "OPENCODE_SSE_REDACT_NAMES"

MASK: Final = "[redacted]"
#: Where a pattern has a group ``secret``, only that is masked.
PATTERNS: Final = (
    r"\bsk-[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic and those who imitate them
    r"\b(?:gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,}|glpat-[A-Za-z0-9_-]{20,})",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bAIza[A-Za-z0-9_-]{35}",
    r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    r"\b(?:npm|hf)_[A-Za-z0-9]{30,}",
    r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    r"(?i:\b(?:bearer|basic)) +(?P<secret>[A-Za-z0-9._~+/-]{16,}=*)",
    r"://[^\s/:@]+:(?P<secret>[^\s/@]+)@",
    r"(?:PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY)=(?P<secret>\S{6,})",
)
NAMES: Final = frozenset(
    {"password", "passwd", "secret", "apikey", "accesskey", "accesstoken", "refreshtoken", "clientsecret"}
    | {"privatekey", "authorization", "proxyauthorization", "cookie", "setcookie"}
)
#: A pattern that takes longer than this for one text fails, and so the event does not go out.
TIMEOUT: Final = 0.25
_HELD_MAX: Final = 8192
#: So many letters before what is held back are remembered, since patterns look back (a word's beginning, a prefix).
_CONTEXT: Final = 64
_TEXTS_MAX: Final = 1000
_SHORT: Final = 64
_SHORT_MAX: Final = 10_000
_PIECES: Final = ("delta", "text")

Key = tuple[str, ...]


class Found(NamedTuple):
    """A secret in a text; ``match`` is where its pattern begins, which may be before what is masked."""

    start: int
    end: int
    match: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a text, with what may be the beginning of a secret; ``shown`` letters of it have been given."""

    text: str = ""
    shown: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The last piece of a streamed text: which event it was, and the tail before and after it."""

    id: str
    before: Tail
    after: Tail


class Redactor:
    """The hook of one bus.

    :param patterns: regular expressions. :param names: keys whose values are masked, in any case, ``-`` and ``_``
        left out.
    :raises ConfigurationError: naming the pattern that does not compile or matches the empty text.
    """

    def __init__(self, patterns: Iterable[str], names: Iterable[str]) -> None:
        self._patterns = [_compiled(pattern) for pattern in patterns]
        self._names = frozenset(_plain(name) for name in names)
        self._texts: OrderedDict[Key, Piece] = OrderedDict()
        self._short = lru_cache(_SHORT_MAX)(self._without_secrets)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Redactor:
        """The built-in patterns and names, and those of the two variables."""
        patterns = (line.strip() for line in environ.get(PATTERNS_VARIABLE, "").splitlines())
        names = (name.strip() for name in environ.get(NAMES_VARIABLE, "").split(","))
        return cls([*PATTERNS, *filter(None, patterns)], [*NAMES, *filter(None, names)])

    @hookimpl(trylast=True)
    def sse_event_publish(self, event: Event) -> Event | None:
        """Last of all plugins, so that what the others put in is looked at too."""
        properties = self._masked(event.properties)
        if properties is not None and event.type.endswith(".delta"):
            properties.update(self._next_piece(event))
        elif properties is not None and event.type == "message.part.updated":
            self._restart(event)
        masked = replace(event, properties=properties, extra=self._masked(event.extra))
        return None if masked == event else masked

    # Whole values.

    def _masked(self, value: Any, secret: bool = False) -> Any:
        if isinstance(value, str):
            return MASK if secret and value else self._text(value)
        if value is None or isinstance(value, bool | int | float | uuid.UUID):
            return value
        if isinstance(value, Mapping):
            return {key: self._masked(item, secret or _plain(key) in self._names) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._masked(item, secret) for item in value]
        if isinstance(value, Enum):
            return self._masked(value.value, secret)
        raise TypeError(f"a {type(value).__name__} cannot be searched for secrets")

    def _text(self, text: str) -> str:
        # Ids and names come with every event; looking each up once saves most of the work.
        return self._short(text) if len(text) <= _SHORT else self._without_secrets(text)

    def _without_secrets(self, text: str) -> str:
        matches = (m for pattern in self._patterns for m in pattern.finditer(text, timeout=TIMEOUT))
        return _without(text, sorted(map(_found, matches)), 0)

    # Texts in pieces.

    def _next_piece(self, event: Event) -> dict[str, str]:
        """What takes the place of a delta's text."""
        properties = event.properties or {}
        field = next((name for name in _PIECES if isinstance(properties.get(name), str)), None)
        if field is None:
            return {}
        key = (event.type, *(v for k, v in sorted(properties.items()) if k != field and isinstance(v, str)))
        last = self._texts.get(key)
        # A publisher that tries an event again, since the store did not take it, goes on where it was before.
        again = last is not None and event.id != "" and last.id == event.id
        before = Tail() if last is None else last.before if again else last.after
        given, after = self._go_on(before, properties[field])
        self._keep(key, Piece(event.id, before, after))
        return {field: given}

    def _go_on(self, tail: Tail, piece: str) -> tuple[str, Tail]:
        """What of a piece can be given now, and the new tail."""
        text = tail.text + piece
        found, held = self._until_held(text)
        end = max(held, tail.shown)
        given = _without(text[:end], [secret for secret in found if secret.end <= end], tail.shown)
        if len(text) - held <= _HELD_MAX:
            return given, _tail(text[:held], text[held:], end - held)
        # Longer than any secret should be: mask it, and go on as if only its beginning had been there.
        return given + MASK, _tail(text[:held], text[held : held + _HELD_MAX // 2], _HELD_MAX // 2)

    def _until_held(self, text: str) -> tuple[list[Found], int]:
        """The secrets in a text that goes on, and from where on the rest may be one that has not ended."""
        found: list[Found] = []
        held = len(text)
        for pattern in self._patterns:
            for match in pattern.finditer(text, partial=True, timeout=TIMEOUT):
                if match.partial or match.end() == len(text):
                    held = min(held, match.start())
                else:
                    found.append(_found(match))
        # What is cut must not go through a secret, whose rest would not be known again.
        while cut := [secret.match for secret in found if secret.match < held < secret.end]:
            held = min(cut)
        return sorted(found), held

    def _restart(self, event: Event) -> None:
        """A part was given as a whole: its deltas go on from there."""
        part = (event.properties or {}).get("part")
        if not isinstance(part, Mapping):
            return
        for field in _PIECES[1:]:
            text = part.get(field)
            names = {"field": field, "messageID": part.get("messageID"), "partID": part.get("id")}
            names["sessionID"] = part.get("sessionID")
            key = ("message.part.delta", *(v for _, v in sorted(names.items()) if isinstance(v, str)))
            if isinstance(text, str):
                text = text[-_HELD_MAX:]
                _, held = self._until_held(text)
                tail = _tail(text[:held], text[held:], min(len(text) - held, _HELD_MAX))
                self._keep(key, Piece(event.id, tail, tail))

    def _keep(self, key: Key, piece: Piece) -> None:
        self._texts[key] = piece
        self._texts.move_to_end(key)
        if len(self._texts) > _TEXTS_MAX:
            self._texts.popitem(last=False)


def _found(match: regex.Match[str]) -> Found:
    start, end = match.span("secret") if "secret" in match.re.groupindex else (-1, -1)
    return Found(start, end, match.start()) if start >= 0 else Found(match.start(), match.end(), match.start())


def _tail(before: str, held: str, shown: int) -> Tail:
    """What is held back, behind as much of what was before as patterns look back."""
    context = before[-_CONTEXT:]
    return Tail(context + held[:_HELD_MAX], len(context) + shown)


def _without(text: str, secrets: list[Found], start: int) -> str:
    """The text from ``start`` on, with a mask in place of the secrets; those that overlap are one."""
    parts: list[str] = []
    for first, end, _ in secrets:
        if end <= start:
            continue
        if first >= start or not parts:
            parts += [text[start:first], MASK]
        start = end
    return "".join([*parts, text[start:]])


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ConfigurationError(f"{PATTERNS_VARIABLE}: {pattern!r} is no regular expression: {error}") from None
    if compiled.search(""):
        raise ConfigurationError(f"{PATTERNS_VARIABLE}: {pattern!r} matches the empty text")
    return compiled


def _plain(name: object) -> str:
    return str(name).lower().replace("-", "").replace("_", "")


@hookimpl(tryfirst=True)
def sse_startup(bus: EventBus) -> None:
    """A redactor of its own for each bus, before any other plugin can publish; a bad pattern stops the start."""
    redactor = Redactor.from_environment(os.environ)
    if not bus.plugins.manager.has_plugin("redactor"):
        bus.plugins.register(redactor, "redactor")
