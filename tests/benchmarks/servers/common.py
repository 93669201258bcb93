"""What the servers under test share: the event, the clock that publishes it, and the commands on stdin.

Every server publishes the same 300 bytes of JSON from inside its own process, at most ``WAKEUPS`` times a second, with
all events that are due at a wake-up: a faster rate means more events a wake-up, for all in the same way.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

SIZE: Final = 300
WAKEUPS: Final = 200
TYPE: Final = "message.part.delta"
_ID: Final = "evt_000000000000AAAAAAAAAAAAAA"


def properties(session: int | None = None) -> dict[str, Any]:
    """The properties of one event, published now: with type and id they are ``SIZE`` bytes of JSON."""
    name = "ses_bench" if session is None else f"ses_{session}"
    body = {"t": time.monotonic_ns(), "sessionID": name, "partID": "prt_bench", "field": "text", "delta": _PAD}
    body["delta"] = _PAD[: len(_PAD) - len(name)]
    return body


def _padding() -> str:
    empty = {"t": time.monotonic_ns(), "sessionID": "", "partID": "prt_bench", "field": "text", "delta": ""}
    body = json.dumps({"id": _ID, "type": TYPE, "properties": empty}, separators=(",", ":"))
    return "x" * (SIZE - len(body))


_PAD: Final = _padding()


def payload(session: int | None = None) -> dict[str, Any]:
    """The whole event, for servers without an envelope of their own."""
    return {"id": _ID, "type": TYPE, "properties": properties(session)}


def pin(variable: str = "BENCH_SERVER_CPU") -> None:
    """Stay on the core that the harness names, if it names one."""
    if cpu := os.environ.get(variable):
        os.sched_setaffinity(0, {int(cpu)})


def say(**fields: Any) -> None:
    """One line of JSON to the harness."""
    print(json.dumps(fields), flush=True)


class Schedule:
    """Which events are due: an open loop, so that a server which falls behind does not slow its publisher down.

    :param rate: events a second. :param seconds: when to stop, whatever is still due.
    """

    def __init__(self, rate: float, seconds: float) -> None:
        self.rate = rate
        self.due = round(rate * seconds)
        self.published = self.wakeups = 0
        self._begun = time.monotonic()
        self._seconds = seconds
        self._step = 1 / min(rate, WAKEUPS)
        self._tick = 0

    def next_wakeup(self) -> float:
        """When to wake up, by ``time.monotonic``; ticks that have passed are not made up for."""
        elapsed = time.monotonic() - self._begun
        self._tick = max(self._tick + 1, int(elapsed / self._step))
        return self._begun + self._tick * self._step

    def take(self) -> int:
        """How many events to publish now."""
        elapsed = min(time.monotonic() - self._begun, self._seconds)
        batch = min(self.due, int(elapsed * self.rate + 0.5)) - self.published
        if batch > 0:
            self.published += batch
            self.wakeups += 1
        return batch

    @property
    def over(self) -> bool:
        """Whether all is published, or the time is up."""
        return self.published >= self.due or time.monotonic() - self._begun >= self._seconds + self._step

    def report(self) -> dict[str, int]:
        """What was published, and what should have been."""
        return {"published": self.published, "due": self.due, "wakeups": self.wakeups}


Publish = Callable[[int | None], None]


async def publish_all(schedule: Schedule, sessions: int, publish: Publish) -> None:
    """Publish what is due; in turn to so many sessions, or to all with 0."""
    turn = 0
    while not schedule.over:
        await asyncio.sleep(max(0.0, schedule.next_wakeup() - time.monotonic()))
        for _ in range(schedule.take()):
            if sessions:
                publish(turn % sessions)
                turn += 1
            else:
                publish(None)


#: What a server can do besides publishing, by the word that asks for it; what it gives is said to the harness.
Commands = Mapping[str, Callable[..., Awaitable[Mapping[str, Any]]]]


async def _obey(publish: Publish, commands: Commands) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        word, *parameters = line.decode().split()
        if word in commands:
            say(**await commands[word](*parameters))
        elif word == "settle":
            say(unreachable=gc.collect())
        elif word == "publish":
            rate, seconds, sessions = parameters
            schedule = Schedule(float(rate), float(seconds))
            await publish_all(schedule, int(sessions), publish)
            say(**schedule.report())


def serve(app: Any, publish: Publish, about: str, commands: Commands | None = None) -> None:
    """Run an ASGI app on uvicorn with uvloop and httptools, obeying the harness, until stdin ends."""
    import uvicorn

    async def start(listener: socket.socket) -> asyncio.Task[None]:
        config = uvicorn.Config(app, http="httptools", ws="none", access_log=False, log_level="error", backlog=4096)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        return serving

    run(start, publish, about, commands)


def run(
    start: Callable[[socket.socket], Awaitable[object]], publish: Publish, about: str, commands: Commands | None = None
) -> None:
    """Start a server on uvloop, whatever it is, and obey the harness until stdin ends."""
    import uvloop

    pin()

    async def obey() -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        _serving = await start(listener)  # Nobody else keeps it.
        say(ready=True, port=listener.getsockname()[1], pids=[os.getpid()], about=about, settles=True)
        await _obey(publish, commands or {})
        # Not a matter of measuring how thousands of streams end.
        os._exit(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(obey())
