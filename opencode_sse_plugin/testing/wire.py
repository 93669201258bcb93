"""What came over the wire, checked: a reader of frames that refuses whatever the wire contract does not allow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..encoding import decode
from ..events import Cursor

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SPACE = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Frame:
    """One block of an event stream.

    :param id: the cursor ``EPOCH:SEQ``, where the frame has one. :param retry: milliseconds, where it has one.
    :param data: the JSON object, in the envelope of its route. :param raw: the block as it came, blank line included.
    """

    id: str | None
    retry: int | None
    data: dict[str, Any]
    raw: bytes

    @property
    def payload(self) -> dict[str, Any]:
        """The event itself, whichever route it came from."""
        payload: dict[str, Any] = self.data if "type" in self.data else self.data["payload"]
        return payload

    @property
    def type(self) -> str:
        """The event's type."""
        kind: str = self.payload["type"]
        return kind

    @property
    def properties(self) -> dict[str, Any]:
        """The event's properties; empty where it has none."""
        properties: dict[str, Any] = self.payload.get("properties", {})
        return properties

    @property
    def cursor(self) -> Cursor | None:
        """``id`` in its two parts."""
        return None if self.id is None else Cursor.parse(self.id)


def parse_frame(block: bytes) -> Frame:
    """Read one block with its blank line.

    :raises AssertionError: if it breaks a rule of the wire: LF only, UTF-8, exactly one ``data:`` line with one JSON
        object without spaces, at most one ``id:`` (``EPOCH:SEQ``) and one ``retry:``, no other field, no comment.
    """
    if not block.endswith(b"\n\n"):
        raise _broken("a block must end in one blank line", block)
    if b"\r" in block or b"\0" in block or block.startswith(b"\xef\xbb\xbf"):
        raise _broken("CR, NUL and a byte order mark have no place in a stream", block)
    try:
        lines = block[:-2].decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise _broken("a block must be UTF-8", block) from None
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(": ")
        if not colon or name not in ("data", "id", "retry"):
            raise _broken(f"only 'data: ', 'id: ' and 'retry: ' may begin a line, not {line[:40]!r}", block)
        if name in fields:
            raise _broken(f"a block has one '{name}:' line", block)
        fields[name] = value
    if "data" not in fields:
        raise _broken("every block must carry 'data:'", block)
    cursor, retry = fields.get("id"), fields.get("retry")
    if cursor is not None and Cursor.parse(cursor) is None:
        raise _broken(f"'id:' must be EPOCH:SEQ, not {cursor!r}", block)
    if retry is not None and not (retry.isascii() and retry.isdigit()):
        raise _broken(f"'retry:' must be a number, not {retry!r}", block)
    return Frame(cursor, None if retry is None else int(retry), _json_object(fields["data"], block), block)


def parse_frames(body: bytes) -> list[Frame]:
    """Read a whole stream.

    :raises AssertionError: as :func:`parse_frame`, or if the last block is not complete.
    """
    blocks = body.split(b"\n\n")
    if blocks[-1]:
        raise _broken("the stream ends within a block", blocks[-1])
    return [parse_frame(block + b"\n\n") for block in blocks[:-1]]


def _json_object(text: str, block: bytes) -> dict[str, Any]:
    try:
        data = decode(text)
    except ValueError as error:
        raise _broken(f"'data:' must be JSON: {error}", block) from None
    if not isinstance(data, dict):
        raise _broken("'data:' must be a JSON object", block)
    if _SPACE.search(_STRING.sub("", text)):
        raise _broken("'data:' must be JSON without spaces", block)
    return data


def _broken(rule: str, block: bytes) -> AssertionError:
    shown = block if len(block) <= 200 else block[:200] + b"..."
    return AssertionError(f"{rule}: {shown!r}")
