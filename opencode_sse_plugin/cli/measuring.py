"""Attaching to an event stream by the thousand, and counting what comes: events, latencies, gaps by cursor, ends."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import anyio

from ..encoding import encode
from .reading import Blocks, Body, CannotRead, Endpoint, open_stream, read_head

#: So many connections are looked at event by event; of the others, events are counted.
_PARSED: Final = 50
_CONNECTING: Final = 100
_POSTS_A_SECOND: Final = 50
_TYPE: Final = "bench.tick"
_RETRY: Final = 1.0
_DATA: Final = re.compile(rb"^data:", re.MULTILINE)
_ID: Final = re.compile(rb"^id: ?(.*?)\r?$", re.MULTILINE)
_OURS: Final = re.compile(rb'"type": ?"server\.(connected|heartbeat|stream\.[a-z]+)"')


class Bench:
    """One measurement and what it has found.

    :param rate: events to publish a second, each of ``size`` bytes; ``None`` publishes none. :param progress: is told
        how far it is.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        subscribers: int,
        seconds: float,
        rate: float | None,
        size: int,
        progress: Callable[[str], None],
    ) -> None:
        self._endpoint = endpoint
        self._subscribers = subscribers
        self._seconds = seconds
        self._rate = rate
        self._size = size
        self._progress = progress
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
                self._progress(f"{self._attached} of {self._subscribers} attached")
                with anyio.move_on_after(0.2):
                    await self._all_attached.wait()
            self._measuring = True
            begun, cpu = time.monotonic(), time.process_time()
            if self._rate is not None:
                tasks.start_soon(self._publish, self._rate)
            while (left := begun + self._seconds - time.monotonic()) > 0:
                self._progress(
                    f"{self.counts['events'] / max(self._seconds - left, 0.1):,.0f} events/s, {left:.0f} s left"
                )
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
