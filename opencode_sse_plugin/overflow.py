"""What happens to a subscriber that fell too far behind.

A policy is a pure, synchronous function from a read-only :class:`Backlog` to one outcome of a closed set. Applying the
outcome, counting and telling are the subscription's business, so a policy cannot lose an event silently::

    class KeepQuestions:
        name = "keep-questions"

        def __call__(self, backlog: Backlog) -> Outcome:
            return Skip.of(i for i, event in enumerate(backlog.events) if not event.type.startswith("question."))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from urllib.parse import parse_qsl

from .errors import ConfigurationError
from .events import StoredEvent


class Lag(NamedTuple):
    """How far behind: matching events not yet handed to the server's ``send``, and their bytes."""

    events: int
    bytes: int


class Limits(NamedTuple):
    """How far behind a subscriber may be, in events and bytes of encoded payload."""

    events: int
    bytes: int

    def exceeded(self, lag: Lag) -> str | None:
        """``events`` or ``bytes`` if a lag is over the limit. A lag of one event never is."""
        if lag.events <= 1:
            return None
        return "events" if lag.events > self.events else "bytes" if lag.bytes > self.bytes else None

    def allow(self, lag: Lag) -> bool:
        """Whether a lag is within both; that of one event always is."""
        return self.exceeded(lag) is None

    @property
    def half(self) -> Limits:
        """What a policy has to come down to; a single event is always allowed."""
        return Limits(max(1, self.events // 2), self.bytes // 2)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a policy may look at.

    :param events: the events waiting, oldest first; already decided losses are not among them.
    :param lag: their number and bytes.
    :param limits: the subscriber's limits.
    :param blocked: seconds its last write has taken.
    :param delivery_class: event → ``ephemeral``, ``latest`` or ``required``.
    :param key: event → what it describes; a later ``latest`` or ``required`` event with an equal key supersedes it.
    :param adds_up: whether two neighbours can be given as one. :param join: neighbours that add up → one event.
    """

    events: Sequence[StoredEvent]
    lag: Lag
    limits: Limits
    blocked: float = 0.0
    delivery_class: Callable[[StoredEvent], str] = lambda event: "required"
    key: Callable[[StoredEvent], str | None] = lambda event: None
    adds_up: Callable[[StoredEvent, StoredEvent], bool] = lambda earlier, later: False
    join: Callable[[Sequence[StoredEvent]], StoredEvent] = lambda run: run[-1]

    def fits(self, events: Sequence[StoredEvent]) -> bool:
        """Whether a policy may leave these: at most half of the limits, or a single event."""
        return self.limits.half.allow(Lag(len(events), sum(event.size for event in events)))


@dataclass(frozen=True, slots=True)
class Skip:
    """Lose these events, given as half-open ranges of indexes into the backlog, sorted, not touching."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, indexes: Iterable[int]) -> Skip:
        """Build the ranges from single indexes in any order."""
        ranges: list[tuple[int, int]] = []
        for index in sorted(set(indexes)):
            if ranges and ranges[-1][1] == index:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
        return cls(tuple(ranges))


@dataclass(frozen=True, slots=True)
class Merge:
    """Fold events away without losing what they say.

    :param replace: index → the event given in its place (it keeps sequence number and id of that index).
    :param remove: indexes folded into a later one; counted as ``merged``, not as lost.
    :param skip: what is lost besides.
    """

    replace: Mapping[int, StoredEvent] = field(default_factory=dict)
    remove: frozenset[int] = frozenset()
    skip: Skip = Skip(())


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Drop the whole backlog, tell, abort; the client resumes from the log."""


@dataclass(frozen=True, slots=True)
class ReadFromStore:
    """Leave the live tail and read on from the store at the client's pace."""


@dataclass(frozen=True, slots=True)
class Block:
    """Let the publisher wait up to ``deadline`` seconds before the append; who misses it is on ``then``."""

    deadline: float
    then: str = "disconnect"


Outcome = Skip | Merge | Disconnect | ReadFromStore | Block


class OverflowPolicy(Protocol):
    """Asked when a subscriber over its limits can next be given something.

    One that may answer :class:`Block` has an attribute ``blocks = True``: it is asked before an append as well.
    """

    @property
    def name(self) -> str:
        """As shown in ``lagged`` and status."""

    def __call__(self, backlog: Backlog) -> Outcome: ...


PolicyFactory = Callable[..., OverflowPolicy]


def is_policy(value: object) -> bool:
    """Whether a value can be asked as a policy."""
    return callable(value) and not isinstance(value, type) and isinstance(getattr(value, "name", None), str)


class PolicyRegistry:
    """Overflow policies by name. ``register`` is what plugins get in ``sse_register_overflow_policies``."""

    def __init__(self) -> None:
        self._factories: dict[str, PolicyFactory] = {}

    def register(self, name: str, factory: PolicyFactory) -> None:
        """Make a policy known.

        :param name: as operators will write it; letters, digits, ``-``.
        :param factory: called with the parameters behind ``?`` as keyword strings, gives the policy.
        :raises ConfigurationError: if the name is taken or malformed.
        """
        if not name or not name.replace("-", "").isalnum() or not name.isascii():
            raise ConfigurationError(f"overflow policy name {name!r}: letters, digits and - only")
        if name in self._factories:
            raise ConfigurationError(f"overflow policy {name!r} is registered already")
        self._factories[name] = factory

    def names(self) -> list[str]:
        """The known names, sorted."""
        return sorted(self._factories)

    def of(self, policy: OverflowPolicy | str) -> OverflowPolicy:
        """The policy itself, or the one of a name.

        :raises ConfigurationError: if it is neither.
        """
        if isinstance(policy, str):
            return self.create(policy)
        if not is_policy(policy):
            there_are = ", ".join(self.names())
            raise ConfigurationError(
                f"{policy!r} is not an overflow policy: a callable with a name, or one of {there_are}"
            )
        return policy

    def create(self, spec: str) -> OverflowPolicy:
        """Make a policy from ``name`` or ``name?parameter=value&…``.

        :raises ConfigurationError: naming what exists, or the parameter that does not fit.
        """
        name, _, query = spec.partition("?")
        factory = self._factories.get(name)
        if factory is None:
            raise ConfigurationError(f"unknown overflow policy {name!r}; there are {', '.join(self.names())}")
        try:
            given = dict(parse_qsl(query, strict_parsing=True)) if query else {}
            known = inspect.signature(factory).parameters
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
                for parameter in given.keys() - known.keys():
                    there_are = f"there are {', '.join(known)}" if known else "it takes none"
                    raise ValueError(f"no parameter {parameter!r}; {there_are}")
            policy = factory(**given)
            if not is_policy(policy):
                raise TypeError(f"its factory gave {policy!r}, which is not a policy")
            return policy
        except Exception as error:
            raise ConfigurationError(f"overflow policy {spec!r}: {error}") from error


def decide(policy: OverflowPolicy | None, backlog: Backlog, registry: PolicyRegistry) -> Outcome:
    """Ask a policy; one that blocks and was too late is asked through its ``then``.

    :raises TypeError: if it answers something else than an outcome.
    """
    outcome = Disconnect() if policy is None else policy(backlog)
    if isinstance(outcome, Block):
        outcome = registry.create(outcome.then)(backlog)
    if not isinstance(outcome, Skip | Merge | Disconnect | ReadFromStore):
        raise TypeError(f"it answered {outcome!r}, which is not an outcome")
    return outcome
