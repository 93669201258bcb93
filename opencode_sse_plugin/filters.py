"""Which events a subscriber sees. A filter is a value (sets and globs), never a callable, so that it can be
indexed, compared, shown in status, and applied to replay exactly as to live delivery."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from .errors import InvalidFilter

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAX_VALUE = 4096
#: Of all globs of one filter: compiling them takes up to 15 µs a character, while everybody else waits.
_MAX_GLOBS = 4096


class Filterable(Protocol):
    """What a filter looks at; both ``Event`` and ``StoredEvent`` have it."""

    @property
    def type(self) -> str: ...
    @property
    def session(self) -> str | None: ...
    @property
    def directory(self) -> str | None: ...
    @property
    def workspace(self) -> str | None: ...


@lru_cache(maxsize=1024)
def _glob(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile globs: ``*`` any run, ``?`` one character, all else literal.

    The standard library's translation matches in linear time, which matters: globs come from clients.
    """
    return re.compile("|".join(fnmatch.translate(pattern.replace("[", "[[]")) for pattern in patterns))


@dataclass(frozen=True, slots=True)
class Filter:
    """OR within a name, AND between names; ``None`` means any, an empty set means nothing.

    Build one with :meth:`of`; combine two with ``&``.

    :param sessions: an event without a session does not pass.
    :param types: groups of globs; an event passes if every group has a glob that matches its type.
    :param directories, workspaces: an event without one passes.
    :param placed: ``directory`` or ``workspace`` or both: an event without that one does not pass either. For grants,
        since such an event may be anybody's.
    """

    sessions: frozenset[str] | None = None
    types: tuple[tuple[str, ...], ...] = ()
    directories: frozenset[str] | None = None
    workspaces: frozenset[str] | None = None
    placed: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        *,
        session: str | Iterable[str] = (),
        type: str | Iterable[str] = (),
        directory: str | Iterable[str] = (),
        workspace: str | Iterable[str] = (),
        placed: bool = False,
    ) -> Filter:
        """Build a filter from values or iterables of values; an empty iterable leaves the name open.

        :param placed: whether an event has to say its directory or workspace where the filter asks for one.
        :raises InvalidFilter: for an empty value, one with control characters, or one over 4096 characters, which is
            the limit for all types together.
        """
        types = tuple(sorted(_values("type", type) or ()))
        if sum(map(len, types)) > _MAX_GLOBS:
            raise InvalidFilter(f"type must be at most {_MAX_GLOBS} characters in all", parameter="type")
        places = {"directory": _values("directory", directory), "workspace": _values("workspace", workspace)}
        return cls(
            sessions=_values("session", session),
            types=(types,) if types else (),
            directories=places["directory"],
            workspaces=places["workspace"],
            placed=frozenset(name for name in places if placed and places[name]),
        )

    def matches(self, event: Filterable) -> bool:
        """Whether an event passes."""
        if self.sessions is not None and event.session not in self.sessions:
            return False
        for group in self.types:
            if event.type not in group and _glob(group).fullmatch(event.type) is None:
                return False
        if self.directories is not None and event.directory is not None and event.directory not in self.directories:
            return False
        if self.workspaces is not None and event.workspace is not None and event.workspace not in self.workspaces:
            return False
        return not (self.placed and self._misses_a_place(event))

    def _misses_a_place(self, event: Filterable) -> bool:
        return ("directory" in self.placed and event.directory is None) or (
            "workspace" in self.placed and event.workspace is None
        )

    def __and__(self, other: Filter) -> Filter:
        return Filter(
            sessions=_both(self.sessions, other.sessions),
            types=tuple(sorted({*self.types, *other.types})),
            directories=_both(self.directories, other.directories),
            workspaces=_both(self.workspaces, other.workspaces),
            placed=self.placed | other.placed,
        )

    @property
    def everything(self) -> bool:
        """Whether every event passes."""
        return self == _EVERYTHING

    def to_dict(self) -> dict[str, list[str] | list[list[str]]]:
        """The filter as JSON, for status; names left open are left out."""
        shown: dict[str, list[str] | list[list[str]]] = {}
        for name, values in (
            ("session", self.sessions),
            ("directory", self.directories),
            ("workspace", self.workspaces),
        ):
            if values is not None:
                shown[name] = sorted(values)
        if len(self.types) == 1:
            shown["type"] = list(self.types[0])
        elif self.types:
            shown["type"] = [list(group) for group in self.types]
        if self.placed:
            shown["placed"] = sorted(self.placed)
        return shown


_EVERYTHING = Filter()


def _both(a: frozenset[str] | None, b: frozenset[str] | None) -> frozenset[str] | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _values(parameter: str, values: str | Iterable[str]) -> frozenset[str] | None:
    found = frozenset((values,) if isinstance(values, str) else values)
    for value in found:
        if not isinstance(value, str) or not value or len(value) > _MAX_VALUE or _CONTROL.search(value):
            raise InvalidFilter(
                f"{parameter} must be 1 to {_MAX_VALUE} characters without control characters", parameter=parameter
            )
    return found or None
