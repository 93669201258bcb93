"""The in-memory client, against small hand-written apps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from opencode_sse_plugin.frames import frame as encode_frame
from opencode_sse_plugin.testing import (
    ManualClock,
    Pace,
    lifespan,
    parse_frame,
    parse_frames,
    request,
    settle,
    stream,
)

anyio_mark = pytest.mark.anyio


def block(number: int, size: int = 0) -> bytes:
    """A frame with a number; ``size`` bytes long where that is more than it needs."""
    bare = encode_frame(b'{"id":"evt_%d","type":"t","properties":{"n":%d,"pad":""}}' % (number, number), f"e:{number}")
    return bare.replace(b'"pad":""', b'"pad":"%b"' % (b"x" * (size - len(bare))))


class Sender:
    """An app that streams blocks, and says how far it has come."""

    def __init__(self, blocks: list[bytes], *, ending: str = "clean", error: Exception | None = None) -> None:
        self.blocks = blocks
        self.ending = ending
        self.error = error
        self.sent = 0
        self.scope: Scope = {}
        self.finished = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/x")]})
            for body in self.blocks:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                self.sent += 1
            if self.error is not None:
                raise self.error
            if self.ending == "clean":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif self.ending == "open":
                while (await receive())["type"] != "http.disconnect":
                    pass
        finally:
            self.finished = True


def numbers(frames: list[Any]) -> list[int]:
    return [frame.properties["n"] for frame in frames]


# Reading.


@anyio_mark
async def test_frames_come_one_by_one_while_the_app_goes_on() -> None:
    go = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": block(1), "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": block(2), "more_body": False})

    async with stream(app, "/event") as response:
        first = await response.next()
        assert (first.id, first.retry, first.type, first.properties["n"]) == ("e:1", None, "t", 1)
        assert first.raw == block(1)
        assert first.cursor == ("e", 1)
        assert response.ending is None
        go.set()
        assert numbers(await response.rest()) == [2]
        assert response.ending == "clean"


@anyio_mark
async def test_status_and_headers() -> None:
    async with stream(Sender([]), "/event") as response:
        assert response.status == 200
        assert response.headers["CONTENT-type"] == "text/x"


@anyio_mark
@pytest.mark.parametrize("ending", ["clean", "abort"])
async def test_a_clean_end_and_an_abort_are_told_apart(ending: str) -> None:
    async with stream(Sender([block(1), block(2)], ending=ending), "/event") as response:
        await settle()
        assert response.ending is None, "the client has not come to the end yet"
        assert numbers([frame async for frame in response.frames()]) == [1, 2]
        assert response.ending == ending
        with pytest.raises(anyio.EndOfStream):
            await response.next()
    assert response.ending == ending


@anyio_mark
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_frames_are_found_whatever_the_chunks(size: int) -> None:
    body = b"".join(block(number) for number in range(1, 6))
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    async with stream(Sender(chunks), "/event") as response:
        assert [frame.raw for frame in await response.rest()] == [block(number) for number in range(1, 6)]


@anyio_mark
async def test_take_and_until() -> None:
    last = encode_frame(b'{"payload":{"id":"evt_9","type":"last"}}', None, 1500)
    async with stream(Sender([block(1), block(2), block(3), last, block(4)]), "/event") as response:
        assert numbers(await response.take(2)) == [1, 2]
        third, found = await response.until("last")
        assert third.properties["n"] == 3
        assert (found.id, found.retry, found.type, found.properties) == (None, 1500, "last", {})
        assert numbers(await response.rest()) == [4]


@anyio_mark
async def test_what_does_not_come_is_a_timeout() -> None:
    async with stream(Sender([block(1)], ending="open"), "/event") as response:
        await response.next()
        with pytest.raises(TimeoutError, match=r"no frame came within 0\.01 s"):
            await response.next(0.01)
        with pytest.raises(TimeoutError, match="did not block"):
            await response.until_blocked(0.01)
        with pytest.raises(TimeoutError, match="did not return"):
            await response.until_returned(0.01)
        with pytest.raises(TimeoutError, match="body did not end"):
            await response.read(0.01)


@anyio_mark
async def test_a_stream_that_ends_within_a_frame_is_refused() -> None:
    async with stream(Sender([block(1) + b"data: {"]), "/event") as response:
        await response.next()
        with pytest.raises(AssertionError, match="ends within a block"):
            await response.next()


# Backpressure.


@anyio_mark
async def test_send_waits_while_the_pipe_is_full() -> None:
    app = Sender([block(number, 100) for number in range(10)])
    async with stream(app, "/event", window=250) as response:
        await response.until_blocked()
        assert (app.sent, response.unread) == (2, 300)
        await settle()
        assert (app.sent, response.unread) == (2, 300)
        await response.next()
        await settle()
        assert (app.sent, response.unread, response.blocked) == (3, 300, True)
        await response.take(8)
        await settle()
        assert (app.sent, response.blocked) == (10, False)
        assert numbers(await response.rest()) == [9]


@anyio_mark
async def test_without_a_window_everything_sent_was_taken() -> None:
    app = Sender([block(1), block(2) + block(3), block(4)])
    async with stream(app, "/event", window=0) as response:
        for taken, sent in enumerate([0, 1, 1, 2, 3]):
            await settle()
            assert app.sent == sent
            if taken < 4:
                await response.next()


@anyio_mark
async def test_a_chunk_larger_than_the_window_waits_for_its_reader() -> None:
    app = Sender([block(1, 10_000)], ending="abort")
    async with stream(app, "/event", window=1000) as response:
        await response.until_blocked()
        assert len((await response.next()).raw) == 10_000
        await response.until_returned()
        assert app.sent == 1


@anyio_mark
async def test_an_app_may_give_up_a_send_that_waits() -> None:
    """As a write deadline does: what is in the pipe stays readable, and the end is an abort."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with anyio.CancelScope() as scope_:
            cancel.append(scope_.cancel)
            await send({"type": "http.response.body", "body": block(1), "more_body": True})

    cancel: list[Callable[[], None]] = []
    async with stream(app, "/event", window=0) as response:
        await response.until_blocked()
        cancel[0]()
        await response.until_returned()
        assert not response.blocked
        assert numbers(await response.rest()) == [1]
        assert response.ending == "abort"


@anyio_mark
async def test_a_send_with_room_does_not_suspend() -> None:
    """Servers behave so, and a fast path may step `send` without a task."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": block(1), "more_body": False},
        ):
            with pytest.raises(StopIteration):
                send(message).send(None)  # type: ignore[attr-defined]

    async with stream(app, "/event") as response:
        assert numbers(await response.rest()) == [1]


@anyio_mark
async def test_a_pace_in_bytes() -> None:
    clock = ManualClock()
    app = Sender([block(number, 500) for number in range(4)])
    async with stream(app, "/event", window=0, pace=Pace(bytes_per_second=1000, clock=clock)) as response:
        got: list[float] = []
        async with anyio.create_task_group() as group:

            async def read() -> None:
                async for _ in response.frames():
                    got.append(clock.now())

            group.start_soon(read)
            await clock.advance(0.25)
            assert response.unread == 200, "the first portion at once, then 100 bytes each tenth of a second"
            await clock.advance(0.25)
            assert len(got) == 1
            await clock.advance(2)
        assert got == pytest.approx([0.4, 0.9, 1.4, 1.9])
        assert app.finished


@anyio_mark
async def test_a_pace_in_frames() -> None:
    clock = ManualClock()
    app = Sender([block(number) for number in range(4)], ending="abort")
    async with stream(app, "/event", window=0, pace=Pace(frames_per_second=2, clock=clock)) as response:
        got: list[float] = []
        async with anyio.create_task_group() as group:

            async def read() -> None:
                async for _ in response.frames():
                    got.append(clock.now())

            group.start_soon(read)
            await clock.advance(0.5)
            assert (len(got), app.sent) == (2, 2)
            await clock.advance(0.4)
            assert (len(got), app.sent) == (2, 2)
            await clock.advance(2)
        assert got == [0.0, 0.5, 1.0, 1.5]


@anyio_mark
async def test_a_stalled_reader_takes_nothing_until_it_resumes() -> None:
    app = Sender([block(number) for number in range(3)], ending="open")
    pace = Pace(stalled=True)
    async with stream(app, "/event", window=0, pace=pace) as response:
        with pytest.raises(TimeoutError):
            await response.next(0.01)
        assert (pace.stalled, response.blocked, app.sent) == (True, True, 0)
        response.pace.resume()
        assert numbers(await response.take(2)) == [0, 1]
        pace.stall()
        with pytest.raises(TimeoutError):
            await response.next(0.01)
        pace.resume()
        assert numbers(await response.take(1)) == [2]


def test_a_pace_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="stalled"):
        Pace(frames_per_second=0)


# Leaving.


@anyio_mark
async def test_a_cut_is_noticed() -> None:
    app = Sender([block(1)], ending="open")
    async with stream(app, "/event") as response:
        await settle()
        assert not app.finished
        await response.cut()
        await response.until_returned()
        assert app.finished
        assert response.ending is None, "it was the client who left"
        with pytest.raises(anyio.ClosedResourceError):
            await response.next()


@anyio_mark
async def test_a_cut_frees_a_send_that_waits() -> None:
    app = Sender([block(number) for number in range(5)], ending="open")
    async with stream(app, "/event", window=0) as response:
        await response.until_blocked()
        await response.cut()
        await response.until_returned()
        assert (app.sent, response.unread) == (5, 0), "what is sent to nobody does not wait"


@anyio_mark
@pytest.mark.parametrize("catch", [False, True])
async def test_a_send_to_nobody_can_raise(catch: bool) -> None:
    errors = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": block(1), "more_body": True})
        except OSError as error:
            errors.append(error)
            if not catch:
                raise

    async with stream(app, "/event", gone="raise", window=100) as response:
        await response.until_blocked()
        await response.cut()
        await response.until_returned()
    assert len(errors) == 1


def starlette_stream() -> tuple[ASGIApp, anyio.Event]:
    """An endless stream, and whether it was ended."""
    ended = anyio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                await anyio.sleep(0.001)
                yield block(1)
        finally:
            ended.set()

    return Starlette(routes=[Route("/", lambda _: StreamingResponse(endless()))]), ended


@anyio_mark
async def test_starlette_is_told_that_its_client_left() -> None:
    app, ended = starlette_stream()
    async with stream(app, "/") as response:
        await response.take(2)
        await response.cut()
        await response.until_returned()
        assert ended.is_set()


@anyio_mark
async def test_starlette_learns_it_from_send_where_send_raises() -> None:
    async def read_two_and_leave() -> None:
        async with stream(app, "/", gone="raise") as response:
            await response.take(2)

    app, _ = starlette_stream()
    with pytest.raises(ClientDisconnect):
        await read_two_and_leave()


@anyio_mark
async def test_leaving_the_block_leaves_no_task() -> None:
    app = Sender([block(number) for number in range(5)], ending="open")
    async with stream(app, "/event", window=0):
        await settle()
        assert not app.finished
    assert app.finished


@anyio_mark
async def test_an_app_that_ignores_its_client_leaving_is_an_error() -> None:
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(AssertionError, match=r"did not return within 0\.01 s after the client left"):
        async with stream(app, "/event", timeout=0.01):
            pass
    assert ended, "no task is left behind"


@anyio_mark
async def test_cancelling_the_test_ends_the_app() -> None:
    app = Sender([], ending="open")
    with anyio.move_on_after(0.01) as scope:
        async with stream(app, "/event"):
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert app.finished


# Errors.


@anyio_mark
async def test_what_the_app_raises_comes_after_what_it_sent() -> None:
    async with stream(Sender([block(1)], error=KeyError("app")), "/event") as response:
        await settle()
        assert numbers([await response.next()]) == [1]
        with pytest.raises(KeyError, match="app"):
            await response.next()
        assert response.ending == "abort"


@anyio_mark
async def test_what_the_app_raises_is_raised_on_leaving_too() -> None:
    with pytest.raises(KeyError, match="app"):
        async with stream(Sender([block(1)], error=KeyError("app")), "/event"):
            await settle()


@anyio_mark
async def test_an_error_before_the_response_is_raised_at_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("early")

    with pytest.raises(KeyError, match="early"):
        async with stream(app, "/event"):
            raise AssertionError("not reached")


@anyio_mark
async def test_no_response_is_an_error() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with pytest.raises(AssertionError, match="without a response"):
        await request(silent, "GET", "/")
    with pytest.raises(TimeoutError, match="did not start"):
        await request(waiting, "GET", "/", timeout=0.01)


async def fail_when_settled(error: Exception) -> None:
    await settle()
    raise error


@anyio_mark
async def test_an_error_of_the_test_comes_as_it_is() -> None:
    with pytest.raises(KeyError, match="test") as caught:
        async with stream(Sender([block(1)], error=ValueError("app")), "/event"):
            await fail_when_settled(KeyError("test"))
    assert caught.value.__notes__ == ["The app had failed with ValueError('app')"]
    with pytest.raises(pytest.fail.Exception, match="on purpose"):
        async with stream(Sender([block(1)]), "/event"):
            pytest.fail("on purpose")


@anyio_mark
@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"type": "http.response.body"}], "before the response was started"),
        ([{"type": "http.response.start", "status": 200}] * 2, "started twice"),
        (
            [{"type": "http.response.start", "status": 200}] + [{"type": "http.response.body"}] * 2,
            "after the final one",
        ),
        ([{"type": "http.response.pathsend"}], "knows no message"),
    ],
)
async def test_messages_out_of_order_are_refused(messages: list[Any], complaint: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    with pytest.raises(RuntimeError, match=complaint):
        await request(app, "GET", "/")


# Requests.


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(
        {
            "method": request.method,
            "path": [request.scope["path"], request.scope["raw_path"].decode()],
            "query": request.query_params.multi_items(),
            "headers": request.headers.items(),
            "body": (await request.body()).decode(),
            "version": request.scope["http_version"],
            "client": request.client and request.client.host,
            "state": request.state.name if hasattr(request.state, "name") else None,
        },
        status_code=201,
    )


ECHO = Starlette(routes=[Route("/{rest:path}", echo, methods=["GET", "POST"])])


@anyio_mark
async def test_a_request_says_what_it_was_told_to() -> None:
    answer = await request(
        ECHO,
        "post",
        "/a%20b?x=1",
        json={"type": "t"},
        headers={"X-Thing": "yes", "Host": "example"},
        params=[("type", "a*"), ("type", "b &c")],
        http_version="1.0",
        client="10.0.0.1",
        state={"name": "state"},
    )
    assert answer.status == 201
    assert answer.headers["content-type"] == "application/json"
    said = answer.json()
    headers = dict(said["headers"])
    assert (said["method"], said["path"], said["body"]) == ("POST", ["/a b", "/a%20b"], '{"type": "t"}')
    assert said["query"] == [["x", "1"], ["type", "a*"], ["type", "b &c"]]
    assert (said["version"], said["client"], said["state"]) == ("1.0", "10.0.0.1", "state")
    assert (headers["x-thing"], headers["host"]) == ("yes", "example")
    assert (headers["content-type"], headers["content-length"]) == ("application/json", "13")


@anyio_mark
async def test_a_body_can_come_in_chunks() -> None:
    said = (await request(ECHO, "POST", "/", content=[b"ab", b"", b"cd"])).json()
    headers = dict(said["headers"])
    assert said["body"] == "abcd"
    assert "content-length" not in headers
    assert headers["transfer-encoding"] == "chunked"


@anyio_mark
async def test_head_has_no_body() -> None:
    answer = await request(ECHO, "HEAD", "/")
    assert (answer.status, answer.body) == (201, b"")
    assert int(answer.headers["content-length"]) > 0


# Frames.


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'data: {"a":1}\r\n\r\n', "one blank line"),
        (b'data: {"a":1}\r\n\n', "CR"),
        (b'data: {"a":"\r"}\n\n', "CR"),
        (b'data: {"a":"\0"}\n\n', "NUL"),
        (b'\xef\xbb\xbfdata: {"a":1}\n\n', "byte order mark"),
        (b'data: {"a":"\xff"}\n\n', "UTF-8"),
        (b'data: {"a":"\xed\xa0\x80"}\n\n', "UTF-8"),
        (b"id: e:1\n\n", "must carry 'data:'"),
        (b"retry: 1\n\n", "must carry 'data:'"),
        (b": comment\n\n", "may begin a line"),
        (b': comment\ndata: {"a":1}\n\n', "may begin a line"),
        (b'event: x\ndata: {"a":1}\n\n', "may begin a line"),
        (b'data:{"a":1}\n\n', "may begin a line"),
        (b'\ndata: {"a":1}\n\n', "may begin a line"),
        (b"\n\n", "may begin a line"),
        (b'data: {"a":1}\ndata: {"b":1}\n\n', "one 'data:' line"),
        (b'id: e:1\nid: e:2\ndata: {"a":1}\n\n', "one 'id:' line"),
        (b'id: 17\ndata: {"a":1}\n\n', "EPOCH:SEQ"),
        (b'id: e:-1\ndata: {"a":1}\n\n', "EPOCH:SEQ"),
        (b'retry: 1.5\ndata: {"a":1}\n\n', "must be a number"),
        (b'data: {"a":NaN}\n\n', "must be JSON"),
        (b"data: [1]\n\n", "JSON object"),
        (b'data: {"a": 1}\n\n', "without spaces"),
        (b'data: {"a\\"":1, "b":"x"}\n\n', "without spaces"),
        (b'data: {"a":1}\n', "one blank line"),
    ],
)
def test_what_breaks_a_rule_of_the_wire_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        parse_frame(data)


@anyio_mark
async def test_the_stream_refuses_it_too() -> None:
    async with stream(Sender([block(1), b": ping\n\n"]), "/event") as response:
        await response.next()
        with pytest.raises(AssertionError, match="may begin a line"):
            await response.next()


def test_a_frame_in_full() -> None:
    data = '{"directory":"/ä b","payload":{"type":"x","properties":{"a\\" b":"\\ud800"}}}'
    frame = parse_frame(f"retry: 1000\nid: e_-9:42\ndata: {data}\n\n".encode())
    assert (frame.id, frame.retry, frame.type) == ("e_-9:42", 1000, "x")
    assert frame.data["directory"] == "/ä b"
    assert frame.properties == {'a" b': "\ud800"}


def test_a_body_in_full() -> None:
    assert [frame.raw for frame in parse_frames(block(1) + block(2))] == [block(1), block(2)]
    assert parse_frames(b"") == []
    with pytest.raises(AssertionError, match="ends within a block"):
        parse_frames(block(1) + b"data: {}\n")


# Lifespan.


def lively(log: list[str], *, startup: Exception | None = None, shutdown: Exception | None = None) -> ASGIApp:
    @asynccontextmanager
    async def span(app: Any) -> Any:
        log.append("up")
        if startup:
            raise startup
        yield {"name": "shared"}
        log.append("down")
        if shutdown:
            raise shutdown

    return Starlette(routes=ECHO.routes, lifespan=span)


@anyio_mark
async def test_an_app_is_started_and_stopped() -> None:
    log: list[str] = []
    app = lively(log)
    async with lifespan(app) as state:
        assert log == ["up"]
        assert (await request(app, "GET", "/", state=state)).json()["state"] == "shared"
    assert log == ["up", "down"]


@anyio_mark
async def test_a_test_that_fails_still_stops_its_app() -> None:
    log: list[str] = []
    with pytest.raises(KeyError, match="test"):
        async with lifespan(lively(log)):
            raise KeyError("test")
    assert log == ["up", "down"]


@anyio_mark
async def test_errors_of_start_and_stop_are_raised() -> None:
    with pytest.raises(ValueError, match="no start"):
        async with lifespan(lively([], startup=ValueError("no start"))):
            raise AssertionError("not reached")
    with pytest.raises(ValueError, match="no stop"):
        async with lifespan(lively([], shutdown=ValueError("no stop"))):
            pass


@anyio_mark
async def test_an_app_that_says_it_failed_or_says_nothing() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no disk"})

    async def returning(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
        await anyio.sleep_forever()

    for app, error, text in (
        (failing, AssertionError, "startup failed: no disk"),
        (returning, AssertionError, "returned before its lifespan"),
        (hanging, TimeoutError, "startup did not end"),
    ):
        with pytest.raises(error, match=text):
            async with lifespan(app, timeout=0.01):
                raise AssertionError("not reached")
