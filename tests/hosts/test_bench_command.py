"""``opencode-sse bench`` against our own server and against sse-starlette's, over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from opencode_sse_plugin import BasicPassword, EventBus, event_app
from opencode_sse_plugin.cli import main, measuring
from opencode_sse_plugin.cli.reading import Blocks

from .served import Served

Serve = Callable[..., Served]


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run the command with ``--json``; what it found."""

    def run(url: str, *options: str) -> dict[str, Any]:
        code = main(["bench", url, "--json", *options])
        said = capsys.readouterr()
        assert code == 0, said.err
        found: dict[str, Any] = json.loads(said.out)
        return found

    return run


def test_what_it_publishes_reaches_every_subscriber_in_time_and_without_a_gap(
    serve: Serve, measure: Callable[..., dict[str, Any]]
) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=None, publish=True), bus)
    found = measure(served.url, "--subscribers", "5", "--seconds", "1", "--publish", "100")
    # On a busy machine fewer are posted, and what was posted last may still be on its way, or its answer.
    assert found["published"] >= 10
    assert found["events"] / 5 >= found["published"] / 2
    assert found["cursors"] == found["events"]
    assert found["gaps"] == found["repeated"] == found["reconnects"] == 0
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"] < 60_000


def test_it_says_what_it_found_in_words(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=None, publish=True), bus)
    assert main(["bench", f"{served.url}/event", "--subscribers", "2", "--seconds", "0.3", "--publish", "50"]) == 0
    said = capsys.readouterr().out
    assert "2 subscribers" in said
    assert "latency in ms: p50" in said
    assert "0 gaps" in said


def numbered(numbers: Callable[[], AsyncIterator[int]]) -> Starlette:
    """sse-starlette, with its default of CRLF, giving numbered events."""

    async def events(request: Request) -> EventSourceResponse:
        async def frames() -> AsyncIterator[dict[str, str]]:
            async for number in numbers():
                yield {"id": str(number), "data": json.dumps({"number": number})}

        return EventSourceResponse(frames())

    return Starlette(routes=[Route("/event", events)])


def test_gaps_of_another_server_are_found(serve: Serve, measure: Callable[..., dict[str, Any]]) -> None:
    async def odd() -> AsyncIterator[int]:
        for number in range(1, 1_000_000, 2):
            yield number
            await anyio.sleep(0.005)

    served = serve(numbered(odd), EventBus())
    found = measure(f"{served.url}/event", "--subscribers", "3", "--seconds", "0.5")
    assert found["events"] == found["cursors"] > 3
    assert found["events"] - 3 <= found["gaps"] == found["missing"] <= found["events"]
    assert found["latency_ms"] is None


def test_it_comes_back_after_an_end(
    serve: Serve, measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_RETRY", 0.02)

    async def three() -> AsyncIterator[int]:
        for number in (1, 2, 3):
            yield number
            await anyio.sleep(0.01)

    served = serve(numbered(three), EventBus())
    found = measure(f"{served.url}/event", "--subscribers", "2", "--seconds", "3")
    assert found["reconnects"] == found["clean_ends"] > 2
    assert found["repeated"] > 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["http://127.0.0.1:1/event"], 1, "cannot connect to 127.0.0.1:1"),
        (["{url}/text"], 1, "/text is not an event stream: its Content-Type is text/plain"),
        (["{url}/event"], 1, "401 Unauthorized: give user and password"),
        (["{url}/nothing"], 1, "/nothing answers 404"),
        (["ftp://x/event"], 2, "is not a URL of an event stream"),
        (["http://127.0.0.1:x/"], 2, "Port"),
        (["{url}/event", "--subscribers", "0"], 2, "--subscribers must be at least 1"),
        (["{url}/event", "--publish", "0"], 2, "--publish must be more than 0"),
        (["{url}/event", "--header", "nonsense"], 2, "--header takes 'NAME: VALUE', not 'nonsense'"),
    ],
)
def test_what_cannot_be_measured_is_said(
    serve: Serve, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    bus = EventBus()
    app = Starlette(routes=[Route("/text", lambda request: PlainTextResponse("x"))])
    app.mount("", event_app(bus, authorize=BasicPassword("secret")))
    served = serve(app, bus)
    assert main(["bench", *[argument.format(url=served.url) for argument in arguments]]) == code
    assert said in capsys.readouterr().err


def test_a_password_and_a_stream_that_takes_no_events(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    bus = EventBus()
    served = serve(event_app(bus, authorize=BasicPassword("secret")), bus)
    url = served.url.replace("//", "//opencode:secret@")
    assert main(["bench", url, "--subscribers", "1", "--seconds", "0.1"]) == 0
    assert main(["bench", url, "--subscribers", "1", "--seconds", "0.5", "--publish", "10"]) == 1
    assert "POST /event answers 405" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_blocks_however_their_lines_end_and_their_bytes_are_cut(ending: bytes, step: int) -> None:
    stream = b"".join(b"id: %d" % n + ending + b"data: x" + ending * 2 for n in range(3)) + b"data:"
    blocks = Blocks()
    found = [block for at in range(0, len(stream), step) for block in blocks.feed(stream[at : at + step])]
    assert [block.splitlines() for block in found] == [[b"id: %d" % n, b"data: x"] for n in range(3)]
