"""Who sees what, seen from outside: over sockets, through the command, and in what is logged. The pieces by themselves:
tests/unit/test_security.py."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.requests import Request

from opencode_sse_plugin import EventBus, Filter, Grant, Retention, Settings, event_app
from opencode_sse_plugin.cli import main
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import request, settle, stream

from .apps import new_bus
from .served import TIMEOUT, Reader, Served

Serve = Callable[..., Served]
Read = Callable[..., Reader]

# Scope comes from the grant, never from the cursor.

EPOCH = "same"
#: Whose event has which number.
LOG = ("ann", "bob", "bob", "ann", "bob", "ann", "bob", "bob")
_ID = re.compile(rb"evt_[0-9A-Za-z]{26}")


def ann_only(request: Request) -> Grant:
    return Grant("ann", Filter.of(session="ann"))


@asynccontextmanager
async def world(other: str, retain: int) -> AsyncIterator[EventBus]:
    """A bus whose log has the same numbers and sizes, whoever the other one is."""
    store = MemoryEventStore(Retention(retain, 2**20), epoch=EPOCH)
    bus = EventBus(Settings(heartbeat=600), store=store, plugins=Plugins(discover=False))
    async with bus:
        for n, who in enumerate(LOG):
            await bus.publish("a", {"sessionID": who if who == "ann" else other}, id=f"evt_{n}")
        yield bus


async def everything_said(bus: EventBus, path: str, headers: dict[str, str]) -> tuple[int, Any, bytes, str | None]:
    """Status, headers, body and ending of an answer; of a stream that stays open, all that comes by itself."""
    async with stream(event_app(bus, authorize=ann_only), path, headers=headers) as response:
        body = b""
        await settle()
        while response.unread:
            body += (await response.next()).raw
            await settle()
        # Control frames have ids of their own; events have those given above.
        return response.status, response.headers.raw, _ID.sub(b"evt_", body), response.ending


@pytest.mark.anyio
@pytest.mark.parametrize("retain", [100, 4])
@pytest.mark.parametrize(
    ("route", "filter"),
    [
        ("/event", ""),
        ("/event", "&session=bob"),
        ("/global/event", "&session=ann&session=bob"),
        ("/global/event", "&type=a"),
    ],
)
async def test_under_anothers_cursor_nothing_tells_whether_their_events_exist(
    retain: int, route: str, filter: str
) -> None:
    """The whole answer is the same, byte for byte, whether the events between ann's are bob's or those of somebody
    she never heard of."""
    numbers = [*range(len(LOG) + 2), 2**53 - 1]
    requests: list[tuple[str, dict[str, str]]] = [(f"{route}?after_seq=bad{filter}", {}), (f"{route}?{filter}", {})]
    for n in numbers:
        for more in ("", "&epoch=same", "&epoch=other", "&follow=true"):
            requests.append((f"{route}?after_seq={n}{more}{filter}", {}))
        for epoch in (EPOCH, "other"):
            requests.append((f"{route}?{filter}", {"last-event-id": f"{epoch}:{n}"}))
        for accept in ("text/event-stream", "*/*"):
            cursor = {"last-event-id": f"{EPOCH}:{n}", "accept": accept}
            requests.append((f"{route}?after_seq=0{filter}", cursor))
    statuses = set()
    async with world("bob", retain) as with_bob, world("eve", retain) as without:
        for path, headers in requests:
            answer, other = [await everything_said(bus, path, headers) for bus in (with_bob, without)]
            assert answer == other, (path, headers)
            assert b"bob" not in answer[2]
            statuses.add(answer[0])
    assert statuses == {200, 204}


@pytest.mark.anyio
async def test_anothers_flood_is_not_felt() -> None:
    """Neither as lag nor as loss, by a reader that does not even read."""
    bus = new_bus(queue_max=5, heartbeat=600)
    app = event_app(bus, authorize=ann_only)
    async with bus, stream(app, "/event", window=0) as ann:
        await ann.next()
        await bus.publish("a", {"sessionID": "ann", "n": 1})
        await ann.until_blocked()
        for _ in range(200):
            await bus.publish("a", {"sessionID": "bob"})
            await settle()
        await bus.publish("a", {"sessionID": "ann", "n": 2})
        frames = await ann.take(2)
        assert [frame.properties for frame in frames] == [{"sessionID": "ann", "n": n} for n in (1, 2)]
        status = (await request(app, "GET", "/event/status")).json()
        assert status["subscribers"][0]["dropped"] == 0


# Expiry.


@pytest.mark.parametrize("reads", [True, False])
def test_an_expired_grant_ends_the_stream_by_abort(serve: Serve, read: Read, reads: bool) -> None:
    """A reader is cut off, and one that does not read loses its connection."""
    granted: list[float] = []

    def for_a_while(request: Request) -> Grant:
        granted.append(time.time() + 2)
        return Grant("ann", expires_at=granted[-1])

    bus = new_bus(heartbeat=0.2, queue_max=20)
    host = serve(event_app(bus, authorize=for_a_while), bus)
    reader = read(f"{host.url}/event")
    reader.next()
    if not reads:
        host.overrun()
        host.until(lambda: not host.server.server_state.connections, "the end of the connection")
    assert {frame.type for frame in reader.rest()} <= {"server.heartbeat", "big"}
    assert reader.ending == "abort"
    assert time.time() >= granted[0]
    assert not host.call(bus.statistics)["subscribers"]


# The command.

PASSWORD, WRONG = "s3cret-Wörd/+", "wr0ng-Wörd"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENCODE_")}


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., tuple[str, Callable[[], str]]]]:
    """Start ``opencode-sse serve``; gives its URL, and what ends it and gives its whole output."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **environment: str) -> tuple[str, Callable[[], str]]:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "opencode_sse_plugin.cli", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**CLEAN, "XDG_STATE_HOME": str(tmp_path), **environment},
        )
        running.append(process)
        assert process.stdout is not None
        first = process.stdout.readline().decode()

        def end() -> str:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0
            return first + output.decode()

        found = re.search(r"http://[0-9.]+:\d+", first)
        assert found is not None, first
        return found[0], end

    yield start
    for process in running:
        process.kill()
        process.communicate()


def token(password: str) -> str:
    return base64.b64encode(f"opencode:{password}".encode()).decode()


@pytest.mark.parametrize("options", [(), ("--json-logs",)])
def test_nothing_secret_is_said(command: Any, options: tuple[str, ...]) -> None:
    url, end = command(*options, OPENCODE_SERVER_PASSWORD=PASSWORD, OPENCODE_SSE_HEARTBEAT="0.1")
    said = ""
    statuses: set[int] = set()
    paths = ("/event/status", "/event?after_seq=0", "/event?after_seq=bad", "/event?type=%00", "/nowhere")
    bodies = (b'{"type":"a"}', b"{", b'{"type":"server.heartbeat"}')
    with httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client:
        for password in (PASSWORD, WRONG):
            header = {"authorization": f"Basic {token(password)}", "content-type": "application/json"}
            query = f"auth_token={quote(token(password), safe='')}"
            requests = [client.build_request("GET", path, headers=header) for path in paths]
            requests += [client.build_request("GET", f"{path}{'&' if '?' in path else '?'}{query}") for path in paths]
            requests += [client.build_request("POST", "/event", headers=header, content=body) for body in bodies]
            for answer in map(client.send, requests):
                statuses.add(answer.status_code)
                said += f"{answer.headers} {answer.text}"
        # A stream that breaks off, and one that a drain ends: what makes servers talk.
        with client.stream("GET", f"/event?auth_token={token(PASSWORD)}") as response:
            next(response.iter_raw())
        with client.stream("GET", f"/event?auth_token={token(PASSWORD)}") as response:
            next(response.iter_raw())
            said += end()
    assert statuses == {200, 400, 401, 404}
    for secret in (PASSWORD, WRONG):
        for form in (secret, token(secret), quote(token(secret), safe=""), json.dumps(secret)[1:-1], secret[:6]):
            assert form not in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "localhost.example.com", "127.0.0.1.example.com"])
@pytest.mark.parametrize("password", [None, ""])
def test_without_a_password_only_this_machine_is_served(
    host: str, password: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENCODE_SERVER_PASSWORD", raising=False)
    if password is not None:
        monkeypatch.setenv("OPENCODE_SERVER_PASSWORD", password)
    assert main(["serve", "--host", host, "--port", "0"]) == 2
    assert "OPENCODE_SERVER_PASSWORD" in capsys.readouterr().err


@pytest.mark.parametrize("password", ["", "secret"])
def test_a_page_elsewhere_reaches_nothing(command: Any, password: str) -> None:
    """By DNS rebinding, by a form, by a script: without a password, which a browser may have remembered too."""
    url, _ = command("--allow-origin", "https://app.example", OPENCODE_SERVER_PASSWORD=password)
    own = url.removeprefix("http://")
    json_type, text = {"content-type": "application/json"}, {"content-type": "text/plain"}
    with httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT, auth=("opencode", "secret")) as client:
        for host in ("evil.example", f"evil.example:{own.partition(':')[2]}", "127.0.0.1.evil.example", "10.0.0.1", ""):
            for method, path in (
                ("GET", "/event"),
                ("POST", "/event"),
                ("GET", "/event/status"),
                ("OPTIONS", "/event"),
            ):
                headers = {"host": host, "origin": f"http://{host}", **json_type}
                assert client.request(method, path, headers=headers, content=b'{"type":"a"}').status_code == 403
        for origin in (
            "https://evil.example",
            "null",
            "http://127.0.0.1.evil.example",
            "https://app.example.evil.example",
        ):
            preflight = {"origin": origin, "access-control-request-method": "POST"}
            for headers in ({"origin": origin, **json_type}, {"origin": origin, **text}):
                answer = client.post("/event", headers=headers, content=b'{"type":"a"}')
                assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)
            answer = client.options("/event", headers=preflight)
            assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)
            assert client.head("/event", headers={"origin": origin}).status_code == 403
        # What a form can send, without an Origin as older browsers do.
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert client.post("/event", headers={"content-type": kind}, content=b'{"type":"a"}').status_code == 415
        assert client.get("/event/status").json()["store"]["latest"] == 0
        answer = client.post("/event", headers={"origin": "https://app.example", **json_type}, content=b'{"type":"a"}')
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")


def test_types_of_ours_cannot_be_forged(command: Any) -> None:
    url, _ = command()
    with httpx.Client(base_url=url, trust_env=False, timeout=TIMEOUT) as client:
        for type in ("server.connected", "server.heartbeat", "server.stream.lagged", "server.stream.expired"):
            answer = client.post("/event", json=[{"type": "good"}, {"type": type, "properties": {}}])
            assert (answer.status_code, answer.json()["index"]) == (400, 1)
        assert client.post("/event", json={"type": "server.instance.disposed"}).status_code == 200
        assert client.get("/event/status").json()["store"]["latest"] == 1
