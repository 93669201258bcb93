"""The event store: the log behind every stream. This module is the protocol; each engine has a module of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, Self, runtime_checkable
from urllib.parse import urlsplit

from ..errors import ConfigurationError
from ..events import StoredEvent
from ..settings import Settings
from ..wakeup import new_bell


class Page(NamedTuple):
    """Neighbouring stored events.

    :param events: by sequence number, without holes. :param last: the position after this page; equal to the position
    asked for where nothing follows.
    """

    events: Sequence[StoredEvent]
    last: int


class Evicted(NamedTuple):
    """Something after the position asked for is no longer stored; ``oldest`` is the first number that is."""

    oldest: int


class EpochStart(NamedTuple):
    """One link of the epoch chain: every number greater than ``began`` belongs to this epoch or a later one."""

    epoch: str
    began: int


class Bounds(NamedTuple):
    """What a store holds. An empty log has ``oldest == latest + 1``.

    :param epochs: the chain, oldest first; the last one is current.
    """

    oldest: int
    latest: int
    epochs: tuple[EpochStart, ...]

    @property
    def epoch(self) -> str:
        """The current epoch."""
        return self.epochs[-1].epoch

    def end_of(self, epoch: str) -> int | None:
        """The last number at which this epoch's cursors mean what they meant.

        :return: ``latest`` for the current epoch; the smallest beginning of the later ones for an older one; ``None``
            for an epoch that is not of this history.
        """
        for index, link in enumerate(self.epochs):
            if link.epoch == epoch:
                return min((later.began for later in self.epochs[index + 1 :]), default=self.latest)
        return None


class Appended(NamedTuple):
    """What an append gave: a sequence number for each event, in order; a known event answers its old number."""

    seqs: list[int]
    duplicates: int


class Retention(NamedTuple):
    """What a store keeps at most; ``age`` in seconds, ``None`` for ever."""

    events: int
    bytes: int
    age: float | None = None


#: What a store keeps that outlives the process, where nothing else is said.
DURABLE_RETENTION: Final = Retention(1_000_000, 1 << 30, 7 * 24 * 3600.0)
#: How many (id, type) pairs every store knows at most.
KNOWN_MAX: Final = 100_000


def retention_of(settings: Settings, default: Retention) -> Retention:
    """What the settings say, and a store's own default where they say nothing."""
    age = default.age if settings.retain_age is None else settings.retain_age
    return Retention(
        settings.retain_events or default.events,
        settings.retain_bytes or default.bytes,
        None if age is None or math.isinf(age) else age,
    )


class StoreListener(Protocol):
    """Whom a store tells, on the event loop that opened it, in sequence order."""

    @property
    def waiting(self) -> int:
        """How many of the events told were not taken yet; a store that reads what others stored waits meanwhile."""

    def visible(self, events: Sequence[StoredEvent]) -> None:
        """These events follow those told before, without holes: own appends and other processes' alike."""

    def missed(self, oldest: int) -> None:
        """What others stored was evicted before it could be told here: what is told next begins at ``oldest``."""

    def epoch_changed(self, bounds: Bounds, end: int) -> None:
        """A new epoch began: numbers beyond ``end`` no longer mean what they meant."""


class EventStore(Protocol):
    """A log of encoded events. Everything runs on the event loop that called ``open``."""

    @property
    def kind(self) -> str:
        """The engine, as in the URL's scheme."""

    @property
    def retention(self) -> Retention:
        """What it keeps at most."""

    async def open(self, listener: StoreListener) -> Bounds:
        """Make it ready. Events up to ``latest`` are not told to the listener, all later ones are.

        :raises StoreUnavailable: if the engine cannot be reached.
        """

    async def close(self) -> None:
        """Give back what it holds; a second call does nothing."""

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        """Store all or none, give each its ``seq``, and return once as durable as the store promises.

        An event whose (id, type) is known is not stored again and answers its number. Known: still stored, at most the
        newest 100 000.

        :raises StoreUnavailable: if nothing was stored, or it cannot be known within the deadline.
        """

    async def read(self, after: int, limit: int, max_bytes: int) -> Page | Evicted:
        """Read what follows a position, checked for eviction in the same read.

        :param limit: events at most. :param max_bytes: payload bytes at most, but always at least one event.
        """

    async def bounds(self) -> Bounds:
        """Oldest and latest number and the epoch chain, as stored now."""


class ImmediateStore(EventStore, Protocol):
    """A store whose append never waits; the bus then skips the publish buffer."""

    def append_now(self, events: Sequence[StoredEvent]) -> Appended:
        """As ``append``, at once."""


class Submission:
    """A publish on its way into a store that groups by itself.

    :param events: to be stored, all or none.
    """

    __slots__ = ("appended", "error", "events")

    def __init__(self, events: Sequence[StoredEvent]) -> None:
        self.events = events
        #: What became of it; the store sets one of the two, from whatever thread, and then has it settled.
        self.appended: Appended | None = None
        self.error: Exception | None = None

    def settle(self) -> None:
        """Called on the event loop, once, when the events are as durable as the store promises; behind the telling of
        them, unless others' events before them have to be told first."""
        raise NotImplementedError

    @classmethod
    def settle_all(cls, submissions: Sequence[Self]) -> None:
        """The same for several of one kind."""
        for submission in submissions:
            submission.settle()


def settle(submissions: Sequence[Submission]) -> None:
    """Settle what was committed together: once for all, where they are of one kind."""
    if len({type(submission) for submission in submissions}) == 1:
        submissions[0].settle_all(submissions)
        return
    for submission in submissions:
        submission.settle()


class Awaited(Submission):
    """One that somebody waits for."""

    __slots__ = ("_done",)

    def __init__(self, events: Sequence[StoredEvent]) -> None:
        super().__init__(events)
        self._done = new_bell()

    def settle(self) -> None:
        self._done.wake()

    async def outcome(self) -> Appended:
        """Wait for it. :raises Exception: what became of it instead."""
        await self._done.woken()
        if self.appended is None:
            raise self.error or AssertionError("settled without an outcome")
        return self.appended


class GroupingStore(EventStore, Protocol):
    """A store that puts into one commit all that came while it was at the one before; the bus then hands it each
    publish by itself, and waits for none of them before the next. They are stored in the order of their submission."""

    def submit(self, submission: Submission) -> None:
        """As ``append``, in the order of the calls; what becomes of it is told to the submission.

        :raises StoreUnavailable: if it is not open; the submission is not settled then.
        """


# What a store may offer besides; ``opencode-sse store`` and status ask whether it does.


@runtime_checkable
class Readable(Protocol):
    """A store that can be read as it lies there: nothing is made, mended or begun, as ``open`` would."""

    async def open_to_read(self) -> Bounds:
        """Make ``read`` and ``bounds`` work, in place of ``open``; ``close`` ends it.

        :raises StoreUnavailable: if there is no log, or it cannot be read at all.
        """


@runtime_checkable
class Checkable(Protocol):
    """A store that knows more about its own soundness than reading tells."""

    async def damage(self) -> Sequence[str]:
        """What is wrong, a sentence each; asked before it is opened.

        :raises StoreUnavailable: if there is no log.
        """


@runtime_checkable
class Prunable(Protocol):
    """A store that evicts in the background."""

    async def prune(self) -> None:
        """Delete all that is beyond retention now."""


@runtime_checkable
class Replaceable(Protocol):
    """A store whose history can be replaced."""

    async def begin_epoch(self, end: int | None = None) -> None:
        """Lose all history beyond ``end``, by default none, and go on under a new epoch."""


@runtime_checkable
class Measured(Protocol):
    """A store that knows what it holds."""

    def statistics(self) -> dict[str, int]:
        """``events``, ``bytes`` and the like, as seen last."""


StoreFactory = Callable[[str, Settings], EventStore]


class StoreRegistry:
    """Event stores by URL scheme. ``register`` is what plugins get in ``sse_register_event_stores``."""

    def __init__(self) -> None:
        self._factories: dict[str, StoreFactory] = {}

    def register(self, scheme: str, factory: StoreFactory) -> None:
        """Make a store known.

        :param scheme: of its URLs, such as ``redis``. :param factory: called with URL and settings.
        :raises ConfigurationError: if the scheme is taken.
        """
        if scheme in self._factories:
            raise ConfigurationError(f"event store scheme {scheme!r} is registered already")
        self._factories[scheme] = factory

    def schemes(self) -> list[str]:
        """The known schemes, sorted."""
        return sorted(self._factories)

    def create(self, url: str, settings: Settings) -> EventStore:
        """Make the store of a URL; nothing is opened yet.

        :raises ConfigurationError: naming the schemes that exist.
        """
        scheme = urlsplit(url).scheme
        factory = self._factories.get(scheme)
        if factory is None:
            known = ", ".join(f"{name}://" for name in self.schemes())
            raise ConfigurationError(f"no event store for {scheme or url!r}; there are {known}")
        return factory(url, settings)
