"""Clients that never send a cursor, such as opencode's terminal client, get what they missed while they were cut off.

Where a stream ended is remembered per caller and client, and its next stream starts a little before. Nothing tells two
tabs of one client apart, so that each place is given to one stream only, and whoever comes first starts at the oldest:
it may be given again what it had, but misses nothing.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from starlette.requests import Request

from opencode_sse_plugin import (
    ConfigurationError,
    Cursor,
    EventBus,
    Evicted,
    Filter,
    Start,
    StoredEvent,
    Subscriber,
    hookimpl,
)

PREFIX: Final = "OPENCODE_SSE_STICKY_"
#: What a client is given that it may have missed; text that was streamed meanwhile comes whole, in later events.
CLASSES: Final = frozenset({"required", "latest"})
_PLACES_PER_CLIENT: Final = 32
_PAGE: Final = 100
_PAGE_BYTES: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Options:
    """From the environment: ``OPENCODE_SSE_STICKY_`` + the name in capitals.

    :param ttl: seconds for which a place is remembered.
    :param overlap: payload bytes before it that may have been on their way and never arrived.
    :param clients: how many clients are remembered; the one that was seen last is forgotten last.
    """

    ttl: float = 900.0
    overlap: int = 4 * 1024 * 1024
    clients: int = 10_000

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Options:
        """:raises ConfigurationError: naming the variable."""
        values: dict[str, int] = {}
        for name in cls.__dataclass_fields__:
            text = environ.get(PREFIX + name.upper(), "")
            if text and not text.isdecimal():
                raise ConfigurationError(f"{PREFIX}{name.upper()}={text!r}: it takes a whole number")
            if text:
                values[name] = int(text)
        return cls(**values)


class Client(NamedTuple):
    """Whose streams are taken for one another's."""

    caller: str
    address: str
    agent: str
    name: str
    route: str
    filter: Filter


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream ended, where it had begun, and when that was."""

    cursor: Cursor
    began: int
    at: float


class StickyResume:
    """The hooks of one bus."""

    def __init__(self, bus: EventBus, options: Options) -> None:
        self._bus = bus
        self._options = options
        self._left: OrderedDict[Client, list[Place]] = OrderedDict()
        self._open: OrderedDict[str, tuple[Client, int]] = OrderedDict()

    @hookimpl(trylast=True)
    async def sse_subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> None:
        """Last of all plugins: by now it is known what the stream may see."""
        # Browsers say what they are, and come back with a cursor by themselves; a page that is reloaded has no state.
        if request is None or subscriber.mode == "terminal" or "sec-fetch-mode" in request.headers:
            return
        client = _client(subscriber, request)
        cursor = subscriber.start.cursor
        if cursor is not None:
            # It knows cursors: the place that it left is nobody else's, and it needs none.
            self._forget(client, cursor.seq)
            return
        began = self._bus.head
        if subscriber.mode == "live" and not subscriber.snapshot and (place := self._take(client)) is not None:
            try:
                start = await self._before(place, subscriber)
            except BaseException:
                self._put(client, place)
                raise
            if start is not None:
                subscriber.start = Start(start, CLASSES)
                subscriber.mode = "follow"
                began = start.seq
        self._open[subscriber.id] = (client, began)
        if len(self._open) > self._bus.settings.max_subscribers:
            self._open.popitem(last=False)  # One that was turned away after all.

    @hookimpl
    def sse_subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
        """Remember where it was, unless it was told to stay away. One that closed looks like one that was cut off."""
        client, began = self._open.pop(subscriber.id, (None, 0))
        if client is not None and subscriber.position is not None and reason != "complete":
            self._put(client, Place(subscriber.position, began, self._bus.clock.now()))

    # Places.

    def _put(self, client: Client, place: Place) -> None:
        places = sorted([*self._fresh(client), place], key=lambda place: place.cursor.seq)
        self._keep(client, places[:_PLACES_PER_CLIENT])

    def _take(self, client: Client) -> Place | None:
        """The oldest place; the newest is given up for it, so that whoever comes next starts at the oldest too."""
        places = self._fresh(client)
        oldest = places[0] if places else None
        self._keep(client, places[:-1])
        return oldest

    def _forget(self, client: Client, seq: int) -> None:
        """Give up the place that a client with this cursor must have left."""
        places = self._fresh(client)
        if places:
            places.remove(min(places, key=lambda place: abs(place.cursor.seq - seq)))
        self._keep(client, places)

    def _fresh(self, client: Client) -> list[Place]:
        """Take out the places of a client, those that are not too old."""
        now = self._bus.clock.now()
        return [place for place in self._left.pop(client, ()) if now - place.at <= self._options.ttl]

    def _keep(self, client: Client, places: list[Place]) -> None:
        if places:
            self._left[client] = places
        if len(self._left) > self._options.clients:
            self._left.popitem(last=False)

    async def _before(self, place: Place, subscriber: Subscriber) -> Cursor | None:
        """A little before a place, within what is stored; never before the stream itself began, since nothing of that
        can have been on its way. ``None`` if the place is of a history that is not there any more."""
        store = self._bus.store
        bounds = await store.bounds()
        end = bounds.end_of(place.cursor.epoch or "")
        if end is None:
            return None
        at = max(min(place.cursor.seq, end), bounds.oldest - 1)
        least = min(at, max(place.began, bounds.oldest - 1))
        room = self._options.overlap
        while at > least:
            page = await store.read(max(least, at - _PAGE), min(_PAGE, at - least), _PAGE_BYTES)
            if isinstance(page, Evicted):
                break
            for event in reversed(page.events):
                room -= event.size if _given(subscriber, event) else 0
                if room < 0:
                    return Cursor(bounds.epoch, event.seq)
            at = max(least, at - _PAGE)
        return Cursor(bounds.epoch, at)


def _client(subscriber: Subscriber, request: Request) -> Client:
    """``?client=NAME`` tells apart what address and agent do not."""
    return Client(
        subscriber.caller,
        request.client.host if request.client is not None else "",
        request.headers.get("user-agent", ""),
        request.query_params.get("client", ""),
        subscriber.route,
        subscriber.filter,
    )


def _given(subscriber: Subscriber, event: StoredEvent) -> bool:
    on_its_route = event.scope != "global" or subscriber.route.endswith("/global/event")
    return on_its_route and subscriber.filter.matches(event)


@hookimpl
def sse_startup(bus: EventBus) -> None:
    """Places are those of one bus."""
    options = Options.from_environment(os.environ)
    if not bus.plugins.manager.has_plugin("sticky-places"):
        bus.plugins.register(StickyResume(bus, options), "sticky-places")
