"""``opencode-sse bench``: attach many subscribers to an event stream, and say what they get.

Works against any endpoint that speaks Server-Sent Events. With ``--publish`` it also posts events (to the same path, as
``POST /event`` takes them) and says how long they take to reach the subscribers. It reads as fast as one Python process
can: where it is at its limit, ``busy`` says so, and the server may be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..encoding import encode
from ..errors import ConfigurationError
from .reading import Blocks, Body, CannotRead, Endpoint, open_stream, read_head

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

#: So many connections are looked at event by event; of the others, events are counted.
_PARSED: Final = 50
_CONNECTING: Final = 100
_POSTS_A_SECOND: Final = 50
_TYPE: Final = "bench.tick"
_RETRY: Final = 1.0
_DATA: Final = re.compile(rb"^data:", re.MULTILINE)
_ID: Final = re.compile(rb"^id: ?(.*?)\r?$", re.MULTILINE)
_OURS: Final = re.compile(rb'"type": ?"server\.(connected|heartbeat|stream\.[a-z]+)"')


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser(
        "bench", help="measure an event stream as its subscribers see it", description=__doc__
    )
    command.add_argument("url", metavar="URL", help="of the stream; /event if it has no path")
    command.add_argument("--subscribers", type=int, default=100, metavar="N", help="how many attach (%(default)s)")
    command.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="how long, once attached (%(default)s)"
    )
    command.add_argument("--publish", type=float, metavar="RATE", help="post so many events a second meanwhile")
    command.add_argument("--size", type=int, default=300, metavar="BYTES", help="of such an event (%(default)s)")
    command.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="send this too")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure; 1 if the stream cannot be read.

    :raises ConfigurationError: for a command line that makes no sense. :raises CannotRead: if there is no stream.
    """
    if options.subscribers < 1 or options.seconds <= 0:
        raise ConfigurationError("--subscribers must be at least 1, --seconds more than 0")
    if options.publish is not None and options.publish <= 0:
        raise ConfigurationError("--publish must be more than 0")
    headers = dict(_header(text) for text in options.header)
    user, password = (os.environ.get(f"OPENCODE_SERVER_{name}", "") for name in ("USERNAME", "PASSWORD"))
    endpoint = Endpoint.parse(options.url, headers, user or "opencode", password)
    _raise_file_limit(options.subscribers + 50)
    bench = Bench(endpoint, options.subscribers, options.seconds, options.publish, options.size)
    try:
        anyio.run(bench.run)
    except BaseExceptionGroup as group:
        found = [error for error in _flat(group) if isinstance(error, CannotRead | KeyboardInterrupt)]
        raise (found[0] if found else group) from None
    finally:
        _progress("")
    result = bench.result()
    print(json.dumps(result) if options.json else _text(result))
    return 0


def _flat(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_flat(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\r\n\0]", value):
        raise ConfigurationError(f"--header takes 'NAME: VALUE', not {text!r}")
    return name, value.strip()


def _raise_file_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigurationError(f"{needed} open files are needed and the limit is {hard}: ulimit -Hn {needed}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Bench:
    """One measurement and what it has found."""

    def __init__(self, endpoint: Endpoint, subscribers: int, seconds: float, rate: float | None, size: int) -> None:
        self._endpoint = endpoint
        self._subscribers = subscribers
        self._seconds = seconds
        self._rate = rate
        self._size = size
        self._mark = uuid.uuid4().hex[:12]
        self._stamp = re.compile(rb'"t": ?(\d+), ?"run": ?"%b"' % self._mark.encode())
        self._attached = 0
        self._all_attached = anyio.Event()
        self._measuring = False
        self._took = self._cpu = 0.0
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []

    async def run(self) -> None:
        """:raises CannotRead: if the stream is not there."""
        async with open_stream(self._endpoint):
            pass  # Once alone: what is wrong with one is wrong with all.
        limiter = anyio.Semaphore(_CONNECTING)
        async with anyio.create_task_group() as tasks:
            for number in range(self._subscribers):
                tasks.start_soon(self._subscribe, number < _PARSED, limiter)
            while not self._all_attached.is_set():
                _progress(f"{self._attached} of {self._subscribers} attached")
                with anyio.move_on_after(0.2):
                    await self._all_attached.wait()
            self._measuring = True
            begun, cpu = time.monotonic(), time.process_time()
            if self._rate is not None:
                tasks.start_soon(self._publish, self._rate)
            while (left := begun + self._seconds - time.monotonic()) > 0:
                _progress(f"{self.counts['events'] / max(self._seconds - left, 0.1):,.0f} events/s, {left:.0f} s left")
                await anyio.sleep(min(0.5, left))
            self._measuring = False
            self._took, self._cpu = time.monotonic() - begun, time.process_time() - cpu
            tasks.cancel_scope.cancel()

    async def _subscribe(self, parsed: bool, limiter: anyio.Semaphore) -> None:
        cursor, first = "", True
        while True:
            try:
                async with limiter:
                    opened = open_stream(self._endpoint, cursor)
                    body = await opened.__aenter__()
                try:
                    if first:
                        first = False
                        self._attached += 1
                        if self._attached == self._subscribers:
                            self._all_attached.set()
                    if body is None:
                        return
                    cursor = await self._read(body, parsed, cursor)
                    self.counts["clean_ends" if body.complete else "aborts"] += self._measuring
                finally:
                    await opened.__aexit__(None, None, None)
            except CannotRead:
                if first:
                    raise
                self.counts["refused"] += self._measuring
            self.counts["reconnects"] += self._measuring
            await anyio.sleep(_RETRY)

    async def _read(self, body: Body, parsed: bool, cursor: str) -> str:
        """Read to the end.

        :return: the last ``id:``.
        """
        blocks, counts = Blocks(), self.counts
        seen = _number(cursor)
        while data := await body.next():
            now = time.perf_counter_ns()
            complete = blocks.feed(data)
            if not self._measuring:
                counts["before"] += len(complete)
            if not parsed and complete and self._measuring:
                counts["bytes"] += len(data)
                counts["events"] += sum(
                    1 for block in complete if b"data:" in block and not _OURS.search(block, 0, 300)
                )
            for block in complete if parsed else complete[-1:]:
                if (found := _ID.search(block)) is not None:
                    cursor = found[1].decode("latin-1")
                if parsed:
                    seen = self._look_at(block, now, seen, cursor if found is not None else "")
            if parsed and self._measuring:
                counts["bytes"] += len(data)
        return cursor

    def _look_at(self, block: bytes, now: int, seen: tuple[str, int] | None, cursor: str) -> tuple[str, int] | None:
        if not self._measuring:
            return _number(cursor) or seen
        counts = self.counts
        ours = _OURS.search(block, 0, 300)
        if ours is not None:
            counts["control"] += 1
            if ours[1] in (b"stream.lagged", b"stream.expired", b"stream.draining"):
                counts[ours[1].decode().removeprefix("stream.")] += 1
        elif _DATA.search(block):
            counts["events"] += 1
            counts["looked_at"] += 1
            if (stamp := self._stamp.search(block)) is not None:
                self.latencies.append((now - int(stamp[1])) / 1e6)
        here = _number(cursor)
        if here is not None and ours is None:
            counts["cursors"] += 1
            if seen is not None and here[0] == seen[0]:
                counts["gaps"] += here[1] > seen[1] + 1
                counts["missing"] += max(0, here[1] - seen[1] - 1)
                counts["repeated"] += here[1] <= seen[1]
        return here or seen

    async def _publish(self, rate: float) -> None:
        endpoint = Endpoint(
            self._endpoint.host,
            self._endpoint.port,
            self._endpoint.tls,
            self._endpoint.target.partition("?")[0],
            self._endpoint.headers,
        )
        begun, done, turn = time.monotonic(), 0, 1 / min(rate, _POSTS_A_SECOND)
        async with await endpoint.connect() as stream:
            while self._measuring:
                due = int((time.monotonic() - begun) * rate) + 1 - done
                if due > 0:
                    body = encode([self._event() for _ in range(due)])
                    extra = {"Content-Type": "application/json", "Content-Length": str(len(body))}
                    await stream.send(endpoint.request("POST", extra, body))
                    answer = await read_head(stream)
                    if answer.status != 200:
                        raise CannotRead(
                            f"POST {endpoint.target} answers {answer.status} {answer.reason}: publishing has to be "
                            "allowed there (opencode-sse serve does, install() with publish=True)"
                        )
                    await _skip(stream, int(answer.headers.get("content-length", "0")) - len(answer.rest))
                    done += due
                    self.counts["published"] += due
                await anyio.sleep(turn)

    def _event(self) -> dict[str, Any]:
        properties = {"t": time.perf_counter_ns(), "run": self._mark, "pad": ""}
        event = {"type": _TYPE, "properties": properties}
        properties["pad"] = "x" * max(0, self._size - len(encode(event)) - 38)  # the id it will get
        return event

    def result(self) -> dict[str, Any]:
        """What was found, as ``--json`` prints it."""
        counts, took = self.counts, max(self._took, 1e-9)
        names = ("gaps", "missing", "repeated", "lagged", "expired", "reconnects", "clean_ends", "aborts", "refused")
        latencies = sorted(self.latencies)
        return {
            "subscribers": self._subscribers,
            "seconds": round(took, 3),
            "events": counts["events"],
            "events_per_second": round(counts["events"] / took, 1),
            "megabytes_per_second": round(counts["bytes"] / took / 1e6, 2),
            "published": counts["published"] if self._rate is not None else None,
            "latency_ms": {
                name: round(latencies[min(len(latencies) - 1, int(len(latencies) * share))], 3)
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
            }
            if latencies
            else None,
            "looked_at": min(self._subscribers, _PARSED),
            "cursors": counts["cursors"],
            **{name: counts[name] for name in names},
            "busy": round(self._cpu / took, 2),
        }


async def _skip(stream: anyio.abc.ByteStream, length: int) -> None:
    while length > 0:
        length -= len(await stream.receive(length))


def _number(cursor: str) -> tuple[str, int] | None:
    """``EPOCH:SEQ`` or a bare number; ``None`` for ids that do not count."""
    epoch, _, number = cursor.rpartition(":")
    return (epoch, int(number)) if number.isdecimal() and len(number) <= 16 else None


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['subscribers']} subscribers, {result['seconds']:g} s",
        f"  {result['events']:,} events, {result['events_per_second']:,.0f} a second, "
        f"{result['megabytes_per_second']:,.1f} MB a second",
    ]
    if result["published"] is not None:
        lines.append(f"  {result['published']:,} published")
    if result["latency_ms"] is not None:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in result["latency_ms"].items())
        lines.append(f"  latency in ms: {shown}")
    if result["cursors"]:
        lines.append(
            f"  by cursor, of {result['looked_at']}: {result['gaps']} gaps, {result['missing']} events missing, "
            f"{result['repeated']} repeated (a filter leaves gaps too); {result['lagged']} losses told"
        )
    else:
        lines.append("  no cursors: the stream has no numbered id:, so gaps cannot be seen")
    lines.append(
        f"  {result['reconnects']} reconnects ({result['clean_ends']} clean ends, {result['aborts']} aborts, "
        f"{result['refused']} refused)"
    )
    if result["busy"] > 0.9:
        lines.append(f"  this program was busy for {result['busy']:.0%} of the time: the server may be faster")
    return "\n".join(lines)
