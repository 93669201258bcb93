"""Anything, for a while: no 500, no traceback, and a healthy subscriber that gets every event and nothing else.

In memory over query strings, headers and bodies; over a socket of ``opencode-sse serve`` with raw bytes. A failure
prints what to replay it with.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import anyio
import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Scope

from opencode_sse_plugin import Filter, Grant, event_app
from opencode_sse_plugin.security import LoopbackGuard
from opencode_sse_plugin.testing import parse_frames, settle

from .apps import new_bus
from .served import TIMEOUT, Watcher
from .witness import END, witnessed

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENCODE_")}


def examples(count: int) -> settings:
    """So many of them; a failing one is shrunk and printed."""
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# What clients say: mostly what we know, sometimes anything.

ODD = [b"", b"\0", b"\r\n", b"%", b"%00", b"\xff", b"\xed\xa0\x80", "ä😀".encode(), b"[", b"*" * 99, b"("]
KNOWN = (
    b"0 1 2 99 9007199254740991 9007199254740992 -1 1.5 1e3 true false session.* * ? s1 good other /x [a] good".split()
)
WORDS, ODD_BYTES = st.sampled_from(KNOWN), st.sampled_from(ODD)
CURSORS = st.builds(b"%b:%b".__mod__, st.tuples(st.sampled_from([b"EPOCH", b"EPOCH", b"other", b""]), WORDS))
VALUES = st.one_of(WORDS, WORDS, CURSORS, ODD_BYTES, st.binary(max_size=20))
NAMES = st.sampled_from(
    b"after_seq last_event_id epoch follow snapshot session type directory workspace auth_token x".split()
)
PAIRS = st.lists(st.tuples(NAMES, VALUES), max_size=4)
QUERIES = PAIRS.map(lambda pairs: b"&".join(b"%b=%b" % (name, quote_from_bytes(v).encode()) for name, v in pairs))
ODD_QUERIES = st.one_of(PAIRS.map(lambda pairs: b"&".join(map(b"=".join, pairs))), st.binary(max_size=40))

METHODS = st.sampled_from([b"GET", b"GET", b"GET", b"POST", b"POST", b"POST", b"HEAD"])
ODD_METHODS = st.sampled_from([b"OPTIONS", b"PUT", b"get", b"", b"GET /event"])
PATHS = st.sampled_from([b"/event", b"/event", b"/event", b"/event", b"/global/event", b"/event/status"])
ODD_PATHS = st.sampled_from([b"/event/", b"/", b"", b"*", b"/eventx", b"//event", b"http://x/event"])

MEDIA = st.sampled_from([b"application/json", b"application/json", b"application/x-ndjson", b"text/plain"])
HEADERS = st.fixed_dictionaries(
    {
        b"host": st.sampled_from([b"localhost", b"localhost", b"localhost", b"evil.example", b"[::1"]),
        b"content-type": MEDIA,
    },
    optional={
        b"cookie": WORDS,
        b"last-event-id": st.one_of(CURSORS, VALUES),
        b"accept": st.sampled_from([b"text/event-stream", b"*/*"]),
        b"origin": st.sampled_from([b"https://x", b"http://localhost", b"https://evil.example", b"null"]),
        b"x-opencode-directory": VALUES,
        b"authorization": st.sampled_from([b"Basic", b"Basic !", b"Bearer x"]),
        b"access-control-request-method": st.sampled_from([b"GET", b"PUT"]),
    },
)

SCALARS = [None, True, 0, -1, 2**70, 1e999, 1.5, "", "s1", "\0", "\ud800", "\r\n", [], {}, [[1]], {"sessionID": "s1"}]
VALUE = st.one_of(st.sampled_from(SCALARS), st.text(max_size=5), st.floats(), st.integers())
OBJECTS = st.one_of(
    st.just({"sessionID": "s1"}), st.dictionaries(st.text(max_size=3), VALUE, max_size=3), st.sampled_from(SCALARS)
)
EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["good", "good", "session.updated", "server.heartbeat", "", "\n", "\ud800", 7])},
    optional={
        "properties": OBJECTS,
        "id": st.sampled_from(["", "evt_1", "evt_2", "\0", None, "x" * 600]),
        "directory": st.sampled_from(["/x", "", "\ud800", None, 7]),
        "scope": st.sampled_from(["instance", "global", "other", None]),
        "extra": OBJECTS,
    },
)
BATCHES = st.lists(EVENTS, min_size=1, max_size=3)
DOCUMENTS = st.one_of(EVENTS, BATCHES, OBJECTS).map(lambda value: json.dumps(value).encode())
LINES = BATCHES.map(lambda events: b"\n".join(json.dumps(event).encode() for event in events))


def cut(text: bytes, at: int, junk: bytes) -> bytes:
    """Put something else in one place."""
    at %= len(text) + 1
    return text[:at] + junk + text[at + len(junk) :]


BODIES = st.one_of(DOCUMENTS, DOCUMENTS, LINES)
ODD_BODIES = st.one_of(st.builds(cut, BODIES, st.integers(0, 300), ODD_BYTES), st.binary(max_size=60))


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The odd one now and then; ``one_of`` would give both alike."""
    return st.integers(0, 9).flatmap(lambda which: odd if which == 9 else good)


# In memory.


class Fuzzed:
    """An open and a guarded app over one bus, on an event loop of its own."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self.bus = new_bus(heartbeat=600, retain_events=50, max_event_bytes=2000, max_request_bytes=5000)
        guarded: ASGIApp = event_app(self.bus, authorize=self._authorize, publish=True, origins=["https://x"])
        guarded = CORSMiddleware(guarded, allow_origins=["https://x"], allow_headers=["*"], allow_methods=["*"])
        self._apps = [event_app(self.bus, authorize=None, publish=True), LoopbackGuard(guarded, addresses=True)]

    @staticmethod
    def _authorize(request: Request) -> Grant | None:
        return Grant("fuzz", Filter.of(session="s1"), may_publish=True) if "cookie" in request.headers else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.bus, witnessed(self.bus):
            yield

    def ask(self, which: int, scope: Scope, body: list[bytes]) -> list[Message]:
        """What an app sends, up to where it waits; then the client leaves."""
        return self._portal.call(self._ask, self._apps[which], scope, body)

    async def _ask(self, app: ASGIApp, scope: Scope, body: list[bytes]) -> list[Message]:
        sent: list[Message] = []
        left = anyio.Event()
        parts = list(body)

        async def receive() -> Message:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, receive, send)
            await settle()
            left.set()
        return sent


@pytest.fixture(scope="module")
def app() -> Iterator[Fuzzed]:
    with start_blocking_portal("asyncio") as portal:
        fuzzed = Fuzzed(portal)
        with portal.wrap_async_context_manager(fuzzed.running()):
            yield fuzzed


def anything_in_memory(
    app: Fuzzed,
    caplog: pytest.LogCaptureFixture,
    which: int,
    method: bytes,
    path: bytes,
    query: bytes,
    headers: dict[bytes, bytes],
    body: list[bytes],
    version: str,
) -> None:
    epoch, before = app.bus.epoch.encode(), app.bus.head
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "method": method.decode(),
        "scheme": "http",
        "path": path.decode(),
        "raw_path": path,
        "query_string": query.replace(b"EPOCH", epoch),
        "root_path": "",
        "headers": [(name, value.replace(b"EPOCH", epoch)) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    start, *rest = app.ask(which, scope, body)
    status, said = start["status"], b"".join(message["body"] for message in rest)
    assert status < 500
    kind = dict(start["headers"]).get(b"content-type")
    if kind == b"text/event-stream":
        parse_frames(said)
    elif kind == b"application/json" and method != b"HEAD":
        answer = json.loads(said)
        assert "error" in answer or status == 200
    stored = app.bus.head - before
    if method == b"POST" and status == 200:
        numbers = answer.get("seqs") or range(answer["first"], answer["last"] + 1)
        assert stored == len(numbers) - answer["duplicates"]
    else:
        assert stored == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


requests_in_memory = given(
    which=st.integers(0, 1),
    method=mostly(METHODS, ODD_METHODS),
    path=mostly(PATHS, ODD_PATHS),
    query=mostly(QUERIES, ODD_QUERIES),
    headers=HEADERS,
    body=mostly(BODIES.map(lambda body: [body]), st.lists(ODD_BODIES, min_size=1, max_size=2)),
    version=st.sampled_from(["1.0", "1.1", "2"]),
)
test_anything_in_memory = examples(1200)(requests_in_memory(anything_in_memory))
test_anything_in_memory_for_long = pytest.mark.chaos(examples(100_000)(requests_in_memory(anything_in_memory)))


# Over a socket.

PLAIN = HEADERS.map(lambda fields: {name: v for name, v in fields.items() if v.isascii() and v.decode().isprintable()})
ODD_FIELDS = st.sampled_from(
    [
        {b"transfer-encoding": b"chunked"},
        {b"content-length": b"5", b"transfer-encoding": b"chunked"},
        {b"content-length": b"-1"},
        {b"expect": b"100-continue"},
        {b"connection": b"upgrade", b"upgrade": b"h2c", b"http2-settings": b"AAMAAABk"},
        {
            b"connection": b"upgrade",
            b"upgrade": b"websocket",
            b"sec-websocket-version": b"13",
            b"sec-websocket-key": b"dGhlIHNhbXBsZSBub25jZQ==",
        },
    ]
)


def raw_request(
    line: tuple[bytes, bytes, bytes, bytes], fields: dict[bytes, bytes], odd: dict[bytes, bytes], body: bytes
) -> bytes:
    lines = [b"%b %b?%b HTTP/%b" % line]
    lines += [b"%b: %b" % field for field in {b"content-length": b"%d" % len(body), **fields, **odd}.items()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


REQUESTS = st.builds(
    raw_request,
    st.tuples(METHODS, PATHS, QUERIES, st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0"])),
    PLAIN,
    mostly(st.just({}), ODD_FIELDS),
    BODIES,
)
ODD_REQUESTS = st.builds(
    raw_request,
    st.tuples(METHODS | ODD_METHODS, PATHS, QUERIES | ODD_QUERIES, st.sampled_from([b"1.1", b"1.1", b"2", b"9", b""])),
    HEADERS,
    ODD_FIELDS,
    ODD_BODIES,
)
BYTES = mostly(
    st.one_of(
        REQUESTS,
        st.lists(REQUESTS, min_size=2, max_size=3).map(b"".join),  # one after the other, not waiting for answers
        st.builds(cut, REQUESTS, st.integers(0, 1000), ODD_BYTES),
        ODD_REQUESTS,
    ),
    st.binary(max_size=200),
)


class Command:
    """``opencode-sse serve`` with a witness."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        # Not a pipe: one that nobody reads from would hold the command up.
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._said = folder / "said"
        environment = {
            "OPENCODE_SSE_HEARTBEAT": "2",
            "OPENCODE_SSE_MAX_EVENT_BYTES": "2000",
            "XDG_STATE_HOME": str(folder),
        }
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "opencode_sse_plugin.cli", "serve", "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**CLEAN, **environment},
            )
        assert self._process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)", self._process.stdout.readline())
        assert found is not None
        self.port = int(found[1])
        limits = httpx.Limits(keepalive_expiry=2)  # Less than the server's 5 s, or it closes it under a request.
        client = httpx.Client(base_url=found[0], trust_env=False, timeout=TIMEOUT, limits=limits)
        self._client = self._stack.enter_context(client)
        self._watcher = self._stack.enter_context(closing(Watcher(found[0])))

    def publish(self, type: str) -> int:
        last: int = self._client.post("/event", json={"type": type}).json()["last"]
        return last

    def _until_alone(self) -> None:
        """Everyone but the witness is gone; who sent more behind the request for a stream, after two heartbeats."""
        deadline = time.monotonic() + TIMEOUT
        while len(self._client.get("/event/status").json()["subscribers"]) > 1:
            assert time.monotonic() < deadline, "somebody stayed"
            self.publish("good")
            time.sleep(0.05)

    def close(self) -> None:
        """End it; the witness saw everything, and nobody had anything to say."""
        with self._stack:
            try:
                self._until_alone()
                head = self.publish(END)
                self._watcher.check(1, head, quiet=True)  # Other tests may have had their turn meanwhile.
            finally:
                self._process.send_signal(signal.SIGTERM)
                self._process.communicate(timeout=TIMEOUT)
            said = set(self._said.read_text().splitlines())
        assert self._process.returncode == 0
        assert said <= {
            "WARNING: Invalid HTTP request received.",
            "WARNING: Unsupported upgrade request.",
        }


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    with closing(Command()) as command:
        yield command


def anything_over_a_socket(command: Command, said: bytes, pieces: list[int]) -> None:
    places = sorted({0, len(said), *(at % (len(said) + 1) for at in pieces)})
    heard = b""
    with socket.create_connection(("127.0.0.1", command.port), 0.5) as sock:
        try:
            for begin, end in itertools.pairwise(places):
                sock.sendall(said[begin:end])
            sock.shutdown(socket.SHUT_WR)
            while received := sock.recv(65536):
                heard += received
        except OSError:
            pass  # It has heard enough. Or, behind a stream: uvicorn does not notice that nothing more will come.
    assert not re.match(rb"HTTP/1\.[01] 5", heard), heard
    command.publish("good")


bytes_over_a_socket = given(said=BYTES, pieces=st.lists(st.integers(0, 2000), max_size=3))
test_anything_over_a_socket = examples(800)(bytes_over_a_socket(anything_over_a_socket))
test_anything_over_a_socket_for_long = pytest.mark.chaos(examples(50_000)(bytes_over_a_socket(anything_over_a_socket)))
