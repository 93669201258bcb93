"""``@opencode-ai/sdk`` v2 under each overflow policy: it stops reading in the middle of a captured session, wakes up,
and has the state of what was published, or lost exactly what it was told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from opencode_sse_plugin.cli.demo import one_round, read_trace
from opencode_sse_plugin.testing import fold

from .harness import Client, Host, HostInThread

SDK = "sdk_v2.mjs"
CAPTURE = Path(__file__).parents[1] / "data/event.jsonl.xz"
#: So that what `coalesce` and `shed` leave of any part of what it sleeps through is less than half.
LIMIT = 700
#: It reads as far as the first, sleeps until the second was published, and then reads to the end.
SLEEPS, WAKES = 400, 4400

StartHost = Callable[..., HostInThread]
StartClient = Callable[..., Client]


@cache
def captured() -> list[dict[str, Any]]:
    """The session, each event with its sequence number as its id."""
    events = (event for _, event in one_round(read_trace(CAPTURE)))
    return [{"type": e.type, "properties": e.properties, "id": f"evt_{n}"} for n, e in enumerate(events, 1)]


class Run(NamedTuple):
    """What a run left behind."""

    client: Client
    status: dict[str, Any]
    requests: int

    @property
    def received(self) -> list[int]:
        """Sequence numbers."""
        return [int((event.id or "").removeprefix("evt_")) for event in self.client.events]

    @property
    def lagged(self) -> list[dict[str, Any]]:
        return self.client.control("server.stream.lagged")

    def check_the_state(self) -> None:
        """What it was given says what was published says."""
        given = ({"type": event.type, "properties": event.properties} for event in self.client.events)
        assert fold(given) == fold(captured())
        assert self.received == sorted(set(self.received))

    def check_the_losses(self) -> Counter[str]:
        """What is missing was told, where it is missing and by type; the types of what is missing."""
        types = {n: event["type"] for n, event in enumerate(captured(), 1)}
        missing = types.keys() - set(self.received)
        told: Counter[str] = Counter()
        for loss in self.lagged:
            gone = Counter(types[n] for n in range(loss["first"], loss["last"] + 1) if n in missing)
            assert Counter(loss["byType"]) <= gone
            assert sum(loss["byType"].values()) == loss["dropped"] > 0
            assert {loss["first"], loss["last"]} <= missing
            told.update(loss["byType"])
        (subscriber,) = self.status["subscribers"]
        assert told.total() + subscriber["merged"] == len(missing)
        assert subscriber["dropped"] == told.total()
        assert self.received == sorted(set(self.received))
        return Counter(types[n] for n in missing)


@contextmanager
def published(host: Host, events: list[dict[str, Any]]) -> Iterator[threading.Thread]:
    """By another thread, which may have to wait."""

    def publish() -> None:
        for first in range(0, len(events), 100):
            host.publish_these(events[first : first + 100], numbered=False)

    thread = threading.Thread(target=publish, name="publisher")
    thread.start()
    try:
        yield thread
    finally:
        thread.join(60)
        assert not thread.is_alive()


def run(policy: str, start_host: StartHost, start_client: StartClient, *, waits: bool = False) -> Run:
    """One sleep in the middle of the session; under ``waits`` the publishers are kept by it."""
    events = captured()
    host = start_host(queue_max=LIMIT, overflow=policy)
    client = start_client(SDK, host.url)
    client.until_connected()
    with published(host, events[:SLEEPS]):
        client.until(has(SLEEPS), "what came before it slept")
    with published(host, events[SLEEPS:WAKES]) as publisher, client.stopped():
        if waits:
            host.until(is_full, "a full backlog and a publisher that waits")
            assert publisher.is_alive()
        else:
            publisher.join(60)
            host.until(is_overrun, "a lag over the limit")
    host.until(is_level, "the end of the lag")
    with published(host, events[WAKES:-1]):
        pass
    host.until(is_level, "the end of the lag")
    with published(host, events[-1:]):
        client.until(has(len(events)), "the end")
    return Run(client, host.status(), len(host.requests()))


def has(number: int) -> Callable[[Client], bool]:
    return lambda client: any(event.id == f"evt_{number}" for event in client.received[-20:])


def is_overrun(status: dict[str, Any]) -> bool:
    """More than its limit waits for it, or did, until what the kernel took for it let the policy act."""
    return status["counters"]["overflows"] > 0 or status["subscribers"][0]["lag"]["events"] > LIMIT


def is_level(status: dict[str, Any]) -> bool:
    """It is there, again if need be, and nothing waits for it."""
    return [subscriber["lag"]["events"] for subscriber in status["subscribers"]] == [0]


def is_full(status: dict[str, Any]) -> bool:
    """It cannot be written to, and one batch more would be more than its limit."""
    (subscriber,) = status["subscribers"]
    return bool(subscriber["lag"]["blocked"] > 0.2 and LIMIT - 200 < subscriber["lag"]["events"] <= LIMIT)


def test_coalesce_gives_the_state_in_fewer_frames(start_host: StartHost, start_client: StartClient) -> None:
    done = run("coalesce", start_host, start_client)
    done.check_the_state()
    (subscriber,) = done.status["subscribers"]
    assert len(done.received) + subscriber["merged"] == len(captured())
    assert subscriber["merged"] > LIMIT // 2
    assert (done.lagged, done.requests) == ([], 1)


def test_catch_up_gives_everything(start_host: StartHost, start_client: StartClient) -> None:
    done = run("catch-up", start_host, start_client)
    assert done.received == list(range(1, len(captured()) + 1))
    done.check_the_state()
    assert (done.lagged, done.requests) == ([], 1)
    assert done.status["counters"]["overflows"] >= 1


def test_block_lets_publishers_wait_for_it(start_host: StartHost, start_client: StartClient) -> None:
    done = run("block?timeout=50s", start_host, start_client, waits=True)
    assert done.received == list(range(1, len(captured()) + 1))
    done.check_the_state()
    assert (done.lagged, done.requests) == ([], 1)
    assert done.status["counters"]["overflows"] == 0


@pytest.mark.parametrize("then", ["disconnect", "coalesce", "catch-up"])
def test_block_goes_over_to_what_comes_then(then: str, start_host: StartHost, start_client: StartClient) -> None:
    done = run(f"block?timeout=50ms&then={then}", start_host, start_client)
    done.check_the_state()
    assert {loss["action"] for loss in done.lagged} == ({"reconnect"} if then == "disconnect" else set())
    assert done.status["counters"]["overflows"] >= 1


def test_disconnect_lets_it_resume(start_host: StartHost, start_client: StartClient) -> None:
    done = run("disconnect", start_host, start_client)
    assert done.received == list(range(1, len(captured()) + 1))
    done.check_the_state()
    assert {loss["action"] for loss in done.lagged} == {"reconnect"}
    assert done.requests == 1 + len(done.lagged)


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_what_is_dropped_is_told(policy: str, start_host: StartHost, start_client: StartClient) -> None:
    done = run(policy, start_host, start_client)
    missing = done.check_the_losses()
    assert missing.total() == sum(loss["dropped"] for loss in done.lagged) > LIMIT // 2
    assert {(loss["action"], loss["policy"]) for loss in done.lagged} == {("continue", policy)}
    assert done.requests == 1


def test_shed_loses_nothing_that_is_required(start_host: StartHost, start_client: StartClient) -> None:
    done = run("shed", start_host, start_client)
    missing = done.check_the_losses()
    assert missing.total() > LIMIT // 2
    told = Counter[str]()
    for loss in done.lagged:
        told.update(loss["byType"])
    assert set(told) == {"message.part.delta"}
    assert {type for type in missing if type.endswith((".created", ".deleted", ".error", ".idle"))} == set()
    assert done.requests == 1
