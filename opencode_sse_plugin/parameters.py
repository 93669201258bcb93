"""What a request asks for: query and headers to filter, mode and start. Bad filters raise, bad cursors do not, since
those are told inside the stream."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from .errors import InvalidFilter
from .events import Cursor, parse_seq, valid_epoch
from .filters import Filter
from .subscriber import AT_HEAD, Mode, Start

DIRECTORY_HEADER = "x-opencode-directory"


class Reading(NamedTuple):
    """A request for a stream."""

    filter: Filter
    mode: Mode
    start: Start
    snapshot: bool
    #: Whether the client says that it is coming back (it has a ``Last-Event-ID``).
    returning: bool


def read_parameters(request: Request) -> Reading:
    """Read a ``GET`` request.

    :raises InvalidFilter: naming the parameter; answer 400.
    """
    query = request.query_params
    last_event_id = request.headers.get("last-event-id") or query.get("last_event_id") or ""
    after_seq = query.get("after_seq")
    follow = _flag(request, "follow")
    mode: Mode = "live"
    start = AT_HEAD
    if last_event_id:
        mode = "terminal" if after_seq is not None and not follow else "resume"
        start = Start(Cursor.parse(last_event_id), requested=last_event_id)
    elif after_seq is not None:
        mode = "follow" if follow else "terminal"
        start = Start(_bare_cursor(after_seq, query.get("epoch")), requested=after_seq)
    return Reading(_filter(request), mode, start, _flag(request, "snapshot"), bool(last_event_id))


def _bare_cursor(number: str, epoch: str | None) -> Cursor | None:
    seq = parse_seq(number)
    if seq is None or (epoch is not None and not valid_epoch(epoch)):
        return None
    return Cursor(epoch, seq)


def _filter(request: Request) -> Filter:
    query = request.query_params
    directories = query.getlist("directory")
    header = request.headers.get(DIRECTORY_HEADER)
    if header:
        try:
            directories.append(unquote_to_bytes(header).decode("utf-8"))
        except UnicodeDecodeError:
            raise InvalidFilter("it must be a URI-encoded UTF-8 path", parameter=DIRECTORY_HEADER) from None
    return Filter.of(
        session=query.getlist("session"),
        type=query.getlist("type"),
        directory=directories,
        workspace=query.getlist("workspace"),
    )


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidFilter(f"{name} must be true or false", parameter=name)
    return value == "true"
