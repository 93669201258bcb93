"""What every client program in Python prints, and the loop around clients that do not come back by themselves."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

ARGUMENTS: dict[str, Any] = json.loads(sys.argv[1])
BASE: str = ARGUMENTS["base"]
QUERY: dict[str, str] = ARGUMENTS["query"]
URL = BASE + ARGUMENTS["path"] + (f"?{urlencode(QUERY)}" if QUERY else "")

#: Opens the stream after a cursor; gives pairs of cursor (or nothing new) and event.
Reader = Callable[[str | None], Iterator[tuple[str | None, Any]]]


def report(event: Any) -> None:
    """Print one event, without the padding."""
    event = event.get("payload", event)
    properties = event.get("properties") or {}
    if "pad" in properties:
        properties = {**properties, "pad": len(properties["pad"])}
    printed = {"id": event.get("id"), "type": event["type"], "properties": properties}
    sys.stdout.write(json.dumps(printed) + "\n")
    sys.stdout.flush()


def ended() -> None:
    """Print that the stream is over for good."""
    print(json.dumps({"ended": True}), flush=True)


def read(reader: Reader, aborts: tuple[type[Exception], ...]) -> None:
    """Read until a clean end, coming back with the last cursor after anything else."""
    cursor: str | None = None
    while True:
        try:
            for new, event in reader(cursor):
                cursor = new or cursor
                report(event)
        except aborts:
            time.sleep(0.05)
        else:
            break
    ended()
