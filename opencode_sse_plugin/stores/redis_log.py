"""What a log in Redis holds, as Python sees it: its keys, its events, and what its scripts answer.

Three keys with one hash tag, so that they live on one node of a cluster: the stream of events, what is known of the
log as a whole, and the names of the newest events by number. The stream's entry of event N is ``N-T`` (T: stored at, in
milliseconds since 1970), so that a position is found by index; its one field is the event's name, with the body as its
value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

from ..events import Scope, StoredEvent
from . import Bounds, EpochStart

#: Between id and type of a name: a byte that is in no UTF-8.
_BETWEEN: Final = b"\xff"


class Keys(NamedTuple):
    """The keys of one log."""

    stream: str
    meta: str
    known: str


def keys_of(name: str) -> Keys:
    """The keys of the log of this name."""
    return Keys(*(f"{{{name}}}:{part}" for part in ("events", "log", "known")))


# Answers.


class Extent(NamedTuple):
    """What every answer says.

    :param chain: only where the epoch is another than the asker's.
    """

    epoch: str
    chain: tuple[EpochStart, ...]
    oldest: int
    head: int
    bytes: int

    @property
    def bounds(self) -> Bounds:
        """As the bus knows it, where the chain was given."""
        return Bounds(self.oldest, self.head, self.chain)


def extent_of(answer: Sequence[Any]) -> Extent:
    """What an answer says of the log."""
    epoch, chain, oldest, head, size = answer[:5]
    links = () if not chain else tuple(_link(link) for link in chain.decode().split(" "))
    return Extent(epoch.decode(), links, oldest, head, size)


def _link(text: str) -> EpochStart:
    epoch, _, began = text.rpartition(":")
    return EpochStart(epoch, int(began))


def seqs_of(text: bytes, count: int) -> tuple[list[int], set[int]]:
    """The number of each event of a batch, and the places of those that were known: first new one, then the known."""
    first, *olds = text.split()
    known = {int(place): int(seq) for place, _, seq in (old.partition(b":") for old in olds)}
    if not known:
        return list(range(int(first), int(first) + count)), set()
    seqs, following = [], int(first)
    for place in range(count):
        seq = known.get(place)
        if seq is None:
            seq, following = following, following + 1
        seqs.append(seq)
    return seqs, set(known)


# Events.


def name_of(event: StoredEvent) -> bytes:
    """By what an event is known: its id and type."""
    try:
        return b"%b\xff%b" % (event.id.encode(), event.type.encode())
    except UnicodeEncodeError:
        return _encoded(event.id) + _BETWEEN + _encoded(event.type)


def packed(name: bytes, event: StoredEvent) -> bytes:
    """Name and body as the protocol has them: an append is made of these, and of little else."""
    body = event.payload
    places = _places(event.session, event.directory, event.project, event.workspace, event.scope)
    if places:
        body = places + body
    return b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(body), body)


def unpacked(seq: int, name: bytes, body: bytes) -> StoredEvent:
    """An event as it was."""
    id, _, type = name.partition(_BETWEEN)
    places = _NOWHERE
    if body.startswith(b"["):
        line, _, body = body.partition(b"\n")
        places = _read_places(line)
    session, directory, project, workspace, scope = places
    return StoredEvent(seq, _decoded(id), _decoded(type), session, directory, project, workspace, scope, body)


_Places = tuple[str | None, str | None, str | None, str | None, Scope]
_NOWHERE: Final[_Places] = (None, None, None, None, "instance")


@lru_cache(4096)
def _places(*places: str | None) -> bytes:
    """A line that says where an event belongs; nothing where it belongs nowhere special."""
    return b"" if places == _NOWHERE else json.dumps(places, separators=(",", ":")).encode() + b"\n"


@lru_cache(4096)
def _read_places(line: bytes) -> _Places:
    return cast("_Places", tuple(json.loads(line)))


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
