"""The clients under test, and the table of what they were seen to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from .programs import browser

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "clients.md"

SITUATIONS: Final = {
    "reads": "Reads",
    "abort": "Body cut off",
    "drain": "Drain",
    "kill": "Connection reset",
    "disconnect": "Overflow, `disconnect`",
    "drop-oldest": "Overflow, `drop-oldest`",
    "drop-newest": "Overflow, `drop-newest`",
    "coalesce": "Overflow, `coalesce`",
    "shed": "Overflow, `shed`",
    "catch-up": "Overflow, `catch-up`",
    "block": "Overflow, `block`",
    "after_seq": "`after_seq`",
    "unknown": "Unknown frames",
}


@dataclass(frozen=True)
class Kind:
    """A client and how it is used.

    :param name: its row. :param program: in programs/. :param package: what its version is looked up by.
    :param by_itself: whether it comes back after an abort without being told; else its program brings the last id.
    :param event_source: whether it also comes back after a clean end, unless answered 204.
    """

    name: str
    program: str
    package: str
    path: Literal["/event", "/global/event"] = "/event"
    by_itself: bool = True
    event_source: bool = False

    def __str__(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def version(self) -> str:
        """Of an npm or Python package, or of the browser; nothing for programs of the system."""
        if self.program == "chromium.py":
            return browser.version()
        pinned: dict[str, str] = json.loads((HERE / "package.json").read_text())["dependencies"]
        if self.package in pinned:
            return pinned[self.package]
        return metadata.version(self.package) if self.program.endswith(".py") and self.package else ""


CLIENTS: Final = (
    Kind("`@opencode-ai/sdk` v2", "sdk_v2.mjs", "@opencode-ai/sdk"),
    Kind("`@opencode-ai/sdk` v1", "sdk_v1.mjs", "@opencode-ai/sdk"),
    Kind("`@opencode-ai/sdk` v2, `/global/event`", "sdk_v2.mjs", "@opencode-ai/sdk", "/global/event"),
    Kind("`@opencode-ai/sdk` v1, `/global/event`", "sdk_v1.mjs", "@opencode-ai/sdk", "/global/event"),
    Kind("`opencode-ai` (Python)", "python_sdk.py", "opencode-ai", by_itself=False),
    Kind("npm `eventsource`", "eventsource.mjs", "eventsource", event_source=True),
    Kind("`@microsoft/fetch-event-source`", "fetch_event_source.mjs", "@microsoft/fetch-event-source"),
    Kind("EventSource in Chromium", "chromium.py", "", event_source=True),
    Kind("`httpx-sse`", "httpx_sse_reader.py", "httpx-sse", by_itself=False),
    Kind("`httpx2`", "httpx2_reader.py", "httpx2", by_itself=False),
    Kind("`curl`", "curl.py", "", by_itself=False),
)

_HEAD = """\
# Clients

Unchanged clients, each in its own process, against the stream on uvicorn over real sockets. This page is written by the
tests (`pytest tests/clients --write-table`): a cell says what was seen, and every run checks it.

- *by itself*: it came back without being told, with `Last-Event-ID`, and ended with exactly the published events: no
  gap, no duplicate. *by hand*: the same, but the client only raises an error (curl: exits), and the program around it
  opens the stream again with the last `id:` it was given (`opencode-ai` for Python hides it: it is
  `stream._decoder._last_event_id`).
- *told*: it stayed connected and was told by `server.stream.lagged` which events it lost; all others came, in order.
  Under `shed` these were deltas, and every question that was asked among them came.
- *latest*: it stayed connected and got fewer events that say the same: of many updates of one thing the last.
- *all*: it stayed connected and got every event, late (`catch-up`), or while the publisher waited (`block`).
- *ends*, *204*: the replay of `after_seq=0` was served once. An EventSource comes back after a clean end as well, and
  is stopped by `204 No Content`.
- Unknown frames: event types it does not know, unknown keys beside the known ones, an event without properties,
  heartbeats and `server.stream.*` frames.

Whoever uses an EventSource should know: by the standard it never comes back after an answer other than 200 (503 while
the server drains or is full), while all others here try again.

"""


def table(cells: Mapping[tuple[str, str], str]) -> str:
    """The document; ``cells`` by client and situation."""
    rows = [["Client", "Version", *SITUATIONS.values()], ["---"] * (2 + len(SITUATIONS))]
    for kind in CLIENTS:
        rows.append([kind.name, kind.version, *(cells.get((str(kind), name), "not run") for name in SITUATIONS)])
    return _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shape(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Columns and rows of the table in a document."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in lines if line.startswith("|")]
    return rows[0], [row[0] for row in rows[2:]]
