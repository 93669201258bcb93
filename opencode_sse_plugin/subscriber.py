"""Who reads: the description of one connection that hooks, policies and status look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from .events import Cursor, Event, StoredEvent, check_event
from .filters import Filter
from .overflow import Limits, Outcome, OverflowPolicy, is_policy

__all__ = ["Grant", "Mode", "Outcome", "Snapshot", "Start", "Subscriber"]

#: ``live`` has no cursor; ``resume`` begins with a heartbeat; ``follow`` replays, then goes live; ``terminal`` ends.
Mode = Literal["live", "resume", "follow", "terminal"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a caller may do.

    :param caller: a name for logs and status; never a secret.
    :param filter: the events it may see, live and in replay alike.
    :param may_publish: whether ``POST /event`` is open to it.
    :param expires_at: seconds since 1970 at which its streams are aborted; ``None`` is never.
    """

    caller: str = ""
    filter: Filter = Filter()
    may_publish: bool = False
    expires_at: float | None = None

    @classmethod
    def everything(cls, caller: str = "") -> Grant:
        """See all, publish, for ever."""
        return cls(caller, may_publish=True) if caller else _EVERYTHING


_EVERYTHING: Final = Grant(may_publish=True)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stream begins.

    :param cursor: ``None`` for the head; a cursor that cannot be served is told inside the stream.
    :param classes: up to the head only events of these delivery classes are given; the rest is reported by
        ``server.stream.lagged``. ``None`` gives all.
    :param requested: the text the client sent, where it is malformed.
    """

    cursor: Cursor | None = None
    classes: frozenset[str] | None = None
    requested: str | None = None


#: The start of whoever has no cursor.
AT_HEAD: Final = Start()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state as events.

    :param events: given without ``id:``, whatever the subscriber's filter; those of scope ``global`` on
        ``/global/event`` only.
    :param at: the last sequence number the state includes; ``None`` takes the head at the time of the call.
    """

    events: Sequence[Event]
    at: int | None = None

    def check(self, oldest: int, latest: int) -> None:
        """:raises TypeError, ValueError: if it cannot be given by a log that holds these events."""
        if not isinstance(self.events, Sequence) or not all(isinstance(event, Event) for event in self.events):
            raise TypeError("a snapshot is a sequence of events")
        for index, event in enumerate(self.events):
            check_event(event, index)
            StoredEvent.encode(event)
        if self.at is not None and not (isinstance(self.at, int) and oldest - 1 <= self.at <= latest):
            # From one before that the log could not go on, and the snapshot would be asked for for ever.
            raise ValueError(f"at must be a sequence number from {oldest - 1} to {latest}, not {self.at!r}")


@dataclass(slots=True, eq=False)
class Subscriber:
    """One connection. While it attaches, hooks may set ``limits``, ``start`` and ``grant`` and call :meth:`narrow`.

    With ``mode`` ``follow``, a stream that has a ``start`` begins with ``server.connected``, as one without does.
    ``position`` is set when it leaves: up to here, everything was given to the server or reported.
    """

    id: str
    route: str
    filter: Filter
    limits: Limits
    grant: Grant = field(default_factory=Grant.everything)
    mode: Mode = "live"
    start: Start = AT_HEAD
    snapshot: bool = False
    sees_abort: bool = True
    since: float = 0.0
    policy: OverflowPolicy | None = None
    position: Cursor | None = None

    @property
    def caller(self) -> str:
        """The caller's name from its grant."""
        return self.grant.caller

    def narrow(self, filter: Filter) -> None:
        """Let it see only what also passes this filter; for live and replay alike."""
        self.filter = self.filter & filter

    def check(self) -> None:
        """:raises TypeError: naming the attribute that a hook made nonsense of."""
        limits, start = self.limits, self.start
        is_cursor = isinstance(start, Start) and (start.cursor is None or isinstance(start.cursor, Cursor))
        is_limits = isinstance(limits, Limits) and all(isinstance(limit, int) and limit > 0 for limit in limits)
        for name, is_good, takes in (
            ("filter", isinstance(self.filter, Filter), "a Filter"),
            ("limits", is_limits, "Limits of at least one event and one byte"),
            ("grant", isinstance(self.grant, Grant), "a Grant"),
            ("mode", self.mode in get_args(Mode), f"one of {', '.join(get_args(Mode))}"),
            ("start", is_cursor, "a Start with a Cursor, or with none"),
            ("policy", self.policy is None or is_policy(self.policy), "a policy, which is a callable with a name"),
        ):
            if not is_good:
                raise TypeError(f"subscriber.{name} cannot be {getattr(self, name)!r}; it takes {takes}")

    def instance_directory(self) -> str | None:
        """The one directory it is filtered to, if it is exactly one."""
        directories = tuple(self.filter.directories or ())
        return directories[0] if len(directories) == 1 else None
