"""``POST /event``: a body to events, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from .bus import EventBus
from .encoding import decode
from .errors import BusClosed, InvalidEvent, Reject, StoreUnavailable
from .events import Event

_OWN_KEYS = frozenset({"type", "properties", "id", "directory", "project", "workspace", "scope"})


async def post_events(bus: EventBus, request: Request) -> Response:
    """Publish what a request carries.

    :raises Reject: 413, 415, 400 where the body is no JSON; the response says what and where otherwise.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", "application/x-ndjson"):
        raise Reject(415, "the content type must be application/json or application/x-ndjson")
    body = await _body(request, bus.settings.max_request_bytes)
    try:
        events = _events(body, lines=media_type == "application/x-ndjson")
        seqs, duplicates = await bus.publish_batch_counting(events)
    except InvalidEvent as error:
        return JSONResponse({"error": str(error), "index": error.index}, 413 if error.too_large else 400)
    except (StoreUnavailable, BusClosed) as error:
        raise Reject(503, str(error), {"Retry-After": "1"}) from error
    return JSONResponse(_answer(bus.epoch, seqs, duplicates))


def _answer(epoch: str, seqs: list[int | None], duplicates: int) -> dict[str, Any]:
    numbers = [seq for seq in seqs if seq is not None]
    answer: dict[str, Any] = {
        "epoch": epoch,
        "first": min(numbers, default=None),
        "last": max(numbers, default=None),
        "duplicates": duplicates,
    }
    if not numbers or seqs != list(range(numbers[0], numbers[0] + len(seqs))):
        answer["seqs"] = seqs
    return answer


async def _body(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    try:
        async with aclosing(request.stream()) as body:
            async for chunk in body:
                size += len(chunk)
                if size > limit:
                    raise Reject(413, f"the body is larger than max_request_bytes ({limit})")
                chunks.append(chunk)
    except ClientDisconnect:
        raise Reject(400, "the body ended early") from None
    return b"".join(chunks)


def _events(body: bytes, *, lines: bool) -> list[Event]:
    if lines:
        found = [_parsed(line, index) for index, line in enumerate(line for line in body.split(b"\n") if line.strip())]
    else:
        value = _parsed(body, 0)
        found = value if isinstance(value, list) else [value]
    if not found:
        raise InvalidEvent("the body holds no event")
    return [_event(value, index) for index, value in enumerate(found)]


def _parsed(text: bytes, index: int) -> Any:
    try:
        return decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"not JSON: {error}", index=index) from error


def _event(value: Any, index: int) -> Event:
    if not isinstance(value, Mapping):
        raise InvalidEvent("an event must be an object", index=index)
    if not isinstance(value.get("type"), str):
        raise InvalidEvent("an event needs a type, a string", index=index)
    scope = value.get("scope", "instance")
    return Event(
        type=value["type"],
        # opencode's `sync` twins, of scope global, have no properties; any other event's are an object.
        properties=value.get("properties", None if scope == "global" else {}),
        id=value.get("id", ""),
        directory=value.get("directory"),
        project=value.get("project"),
        workspace=value.get("workspace"),
        scope=scope,
        extra={key: item for key, item in value.items() if key not in _OWN_KEYS},
    )
