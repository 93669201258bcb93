"""Events to bytes: pure functions, and the only place that knows what a frame looks like.

Every block carries one ``data:`` line and ends in one blank line, LF only: CRLF and blocks without ``data:`` break
SDKs in use (measured: ``@opencode-ai/sdk`` v1 splits on LF LF, ``opencode-ai`` for Python parses every block as JSON).
``id:`` comes last: ``@microsoft/fetch-event-source`` takes it over as soon as its line is read, so that a connection
cut before a ``data:`` behind it lost that event (measured, 2.0.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from .encoding import encode
from .events import Event, StoredEvent

Chunk_co = TypeVar("Chunk_co", covariant=True)

HEADERS: Final = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
)

CONNECTED: Final = "server.connected"
HEARTBEAT: Final = "server.heartbeat"
EXPIRED: Final = "server.stream.expired"
LAGGED: Final = "server.stream.lagged"
DRAINING: Final = "server.stream.draining"


class Envelope(Protocol[Chunk_co]):
    """How one route wraps events into what its reader is given (bytes, or objects in-process)."""

    @property
    def name(self) -> str: ...

    def sees(self, event: Event | StoredEvent) -> bool:
        """Whether the route shows this event at all."""

    def batch(self, events: Sequence[StoredEvent], epoch: str) -> Chunk_co:
        """Wrap neighbouring events into one chunk."""

    def control(self, event: Event, cursor: str | None, retry: int | None) -> Chunk_co:
        """Wrap one control frame or snapshot event; ``cursor`` becomes ``id:``, ``retry`` (ms) ``retry:``."""


def frame(data: bytes, cursor: str | None = None, retry: int | None = None) -> bytes:
    """One SSE block. ``data`` is one line of JSON, where CR, LF and NUL are always escaped."""
    head = b"" if retry is None else b"retry: %d\n" % retry
    tail = b"" if cursor is None else b"id: %b\n" % cursor.encode("ascii")
    return b"%bdata: %b\n%b\n" % (head, data, tail)


class _EventEnvelope:
    """``/event``: the payload itself."""

    name = "event"

    def sees(self, event: Event | StoredEvent) -> bool:
        return event.scope != "global"

    def batch(self, events: Sequence[StoredEvent], epoch: str) -> bytes:
        id = b"\nid: %b:" % epoch.encode("ascii")
        return b"".join([b"data: %b%b%d\n\n" % (event.payload, id, event.seq) for event in events])

    def control(self, event: Event, cursor: str | None, retry: int | None) -> bytes:
        return frame(encode(event.payload()), cursor, retry)


class _GlobalEnvelope:
    """``/global/event``: the payload beside where it comes from; unknown places are left out."""

    name = "global"

    def sees(self, event: Event | StoredEvent) -> bool:
        return True

    def batch(self, events: Sequence[StoredEvent], epoch: str) -> bytes:
        id = b"\nid: %b:" % epoch.encode("ascii")
        return b"".join(
            [
                b'data: {%b"payload":%b}%b%d\n\n'
                % (_place(event.directory, event.project, event.workspace), event.payload, id, event.seq)
                for event in events
            ]
        )

    def control(self, event: Event, cursor: str | None, retry: int | None) -> bytes:
        place = _place(event.directory, event.project, event.workspace)
        return frame(b'{%b"payload":%b}' % (place, encode(event.payload())), cursor, retry)


def _place(directory: str | None, project: str | None, workspace: str | None) -> bytes:
    if directory is None and project is None and workspace is None:
        return b""
    named = {"directory": directory, "project": project, "workspace": workspace}
    return encode({name: value for name, value in named.items() if value is not None})[1:-1] + b","


@dataclass(frozen=True, slots=True)
class Delivery:
    """What an in-process subscriber gets: an event, or a control frame as an event.

    :param event: its type is ``server.…`` for a control frame.
    :param seq: sequence number; ``None`` for control frames and snapshot events.
    :param cursor: what an HTTP client would have got as ``id:``.
    """

    event: Event
    seq: int | None = None
    cursor: str | None = None


class _ObjectEnvelope:
    """In-process subscribers: objects instead of bytes, of every scope."""

    name = "object"

    def sees(self, event: Event | StoredEvent) -> bool:
        return True

    def batch(self, events: Sequence[StoredEvent], epoch: str) -> tuple[Delivery, ...]:
        return tuple(Delivery(event.event, event.seq, f"{epoch}:{event.seq}") for event in events)

    def control(self, event: Event, cursor: str | None, retry: int | None) -> tuple[Delivery, ...]:
        return (Delivery(event, None, cursor),)


EVENT: Final[Envelope[bytes]] = _EventEnvelope()
GLOBAL: Final[Envelope[bytes]] = _GlobalEnvelope()
OBJECT: Final[Envelope[tuple[Delivery, ...]]] = _ObjectEnvelope()


def expired(*, next: int, oldest: int, latest: int, reason: str, requested: str, epoch: str) -> dict[str, Any]:
    """Properties of ``server.stream.expired``; ``requested`` is cut to 256 bytes of UTF-8."""
    return {
        "next": next,
        "oldest": oldest,
        "latest": latest,
        "reason": reason,
        "requested": requested.encode("utf-8", "replace")[:256].decode("utf-8", "ignore"),
        "epoch": epoch,
    }


def parse(stream: bytes) -> Iterable[tuple[str | None, bytes]]:
    """Split complete frames of ours back into ``(id, data)``: for tests and tools, not a general SSE parser."""
    for block in stream.split(b"\n\n")[:-1]:
        fields = dict(line.split(b": ", 1) for line in block.split(b"\n"))
        cursor = fields.get(b"id")
        yield (cursor.decode("ascii") if cursor is not None else None), fields[b"data"]
