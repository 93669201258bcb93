"""Every client in every situation, unchanged and in its own process, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from .clients import CLIENTS, DOCUMENT, SITUATIONS, Kind, shape, table
from .harness import TIMEOUT, Client, Host, HostInThread, HostProcess
from .programs import browser
from .proxy import Proxy

StartHost = Callable[..., HostInThread]
StartClient = Callable[..., Client]
Seen = Callable[[str, str], None]


@pytest.fixture(params=CLIENTS, ids=str)
def kind(request: pytest.FixtureRequest, node_packages: None) -> Kind:
    """A client."""
    kind: Kind = request.param
    if kind.program == "chromium.py" and browser.find() is None:
        pytest.skip("NOT TESTED IN A REAL BROWSER: apt-get install -y chromium")
    return kind


@pytest.fixture
def seen(request: pytest.FixtureRequest, kind: Kind) -> Seen:
    """Writes a cell of the table, once everything else was found right."""
    return lambda situation, cell: request.node.user_properties.append(("cell", [str(kind), situation, cell]))


def connect(start_client: StartClient, kind: Kind, port: int) -> Client:
    """Start a client and wait until its stream begins."""
    client = start_client(kind.program, f"http://127.0.0.1:{port}", kind.path)
    client.until_connected()
    return client


def check_exactly_once(client: Client, host: Host) -> None:
    """Every published event in order, and no reason to reload anything."""
    assert client.numbers == list(range(1, host.published + 1))
    assert len({event.id for event in client.events}) == host.published
    assert len(client.control("server.connected")) == 1
    assert client.control("server.stream.expired") == []
    assert not client.ended


def check_came_back(kind: Kind, host: Host, seen: Seen, situation: str) -> None:
    """It began without a cursor and came back with one each time."""
    requests = host.requests()
    assert {request["path"] for request in requests} == {kind.path}
    first, *later = [request["last_event_id"] for request in requests]
    assert first is None
    assert later
    assert all(later)
    seen(situation, "by itself" if kind.by_itself else "by hand")


def test_reads(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host()
    client = connect(start_client, kind, host.port)
    awkward: list[dict[str, Any]] = [
        {"text": "ünïcödé 🙂 \u2028\u2029\ufeff"},
        {"text": "line\nline\r\nline\rdata: x\n\nid: 5\n\nevent: message\n\n\x00\x1f\x7f"},
        {"text": "\ud800 alone"},
        {"nested": {"list": [1, -1.5, True, None, "", {}, []]}},
        {"text": "long " * 50_000},
        {"": "", "data": "", "id": "", "retry": 1},
    ]
    events = [{"n": n, **properties} for n, properties in enumerate(awkward, host.published + 1)]
    host.publish_these([{"type": "message.updated", "properties": properties} for properties in events])
    client.until_number(host.publish(300, 300))

    assert [event.properties for event in client.events[: len(events)]] == events
    assert {event.properties["pad"] for event in client.events[len(events) :]} == {300}
    check_exactly_once(client, host)
    assert len(host.requests()) == 1
    seen("reads", "yes")


@pytest.mark.parametrize("situation", ["abort", "kill"])
def test_resumes_after_a_cut(
    kind: Kind,
    situation: str,
    start_host: StartHost,
    start_proxy: Callable[[int], Proxy],
    start_client: StartClient,
    seen: Seen,
) -> None:
    host = start_host()
    proxy = start_proxy(host.port)
    client = connect(start_client, kind, proxy.port)
    client.until_number(host.publish(20))
    host.publish(500, 4096)  # on its way when the connection ends
    assert proxy.cut(reset=situation == "kill") >= 1  # a browser keeps its page's connection as well
    host.publish(100)
    client.until_number(host.published)
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    check_came_back(kind, host, seen, situation)


def test_resumes_after_a_drain(
    kind: Kind, start_host_process: Callable[..., HostProcess], start_client: StartClient, seen: Seen
) -> None:
    # Longer than uvicorn takes to close its socket: an EventSource never returns after the 503 of a draining server.
    host = start_host_process(retry=300)
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))
    host.publish(300, 1000)
    host.drain()
    host.publish(100)
    client.until_number(host.published)
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    check_came_back(kind, host, seen, "drain")
    assert len(client.control("server.stream.draining")) == 1


def test_resumes_after_an_overflow(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host(queue_max=50)
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))
    client.until_number(host.overrun(client))
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    check_came_back(kind, host, seen, "disconnect")
    assert host.status()["counters"]["overflows"] >= 1
    assert {lagged["action"] for lagged in client.control("server.stream.lagged")} == {"reconnect"}


@pytest.mark.parametrize("policy", ["drop-oldest", "drop-newest"])
def test_is_told_what_an_overflow_took(
    kind: Kind, policy: str, start_host: StartHost, start_client: StartClient, seen: Seen
) -> None:
    host = start_host(queue_max=50, overflow=policy)
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))
    host.overrun(client)
    host.until(lambda status: status["subscribers"][0]["lag"]["events"] == 0, "the end of the lag")
    client.until_number(host.publish(20))

    losses = client.control("server.stream.lagged")
    lost = [number for loss in losses for number in range(loss["first"], loss["last"] + 1)]
    assert len(lost) > 50
    assert sorted(client.numbers + lost) == list(range(1, host.published + 1))
    assert client.numbers == sorted(client.numbers)
    assert {loss["action"] for loss in losses} == {"continue"}
    assert sum(loss["dropped"] for loss in losses) == len(lost)
    assert host.status()["counters"]["overflows"] >= 1
    assert len(host.requests()) == 1
    seen(policy, "told")


def check_stayed(client: Client, host: Host) -> None:
    """It read one stream from the beginning on, and fell too far behind in it."""
    assert len(host.requests()) == 1
    assert len(client.control("server.connected")) == 1
    assert client.numbers == sorted(set(client.numbers))
    assert host.status()["counters"]["overflows"] >= 1
    assert not client.ended


def test_is_given_the_latest_of_what_an_overflow_took(
    kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen
) -> None:
    host = start_host(queue_max=50, overflow="coalesce")
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))
    last = host.overrun(client, type="message.part.updated", properties={"part": {"id": "prt_1"}})
    client.until_number(last)
    client.until_number(host.publish(20))

    check_stayed(client, host)
    assert client.control("server.stream.lagged") == []
    assert set(range(1, 21)) | set(range(last, host.published + 1)) <= set(client.numbers)
    counters = host.status()["counters"]
    assert (counters["dropped"], counters["merged"]) == (0, host.published - len(client.numbers))
    assert counters["merged"] > 50
    seen("coalesce", "latest")


def test_is_told_which_deltas_an_overflow_shed(
    kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen
) -> None:
    host = start_host(queue_max=50, overflow="shed")
    client = connect(start_client, kind, host.port)
    delta = {"sessionID": "ses_1", "messageID": "msg_1", "partID": "prt_1", "field": "text", "delta": "x"}
    questions = []
    with client.stopped():
        for _ in range(10):
            host.publish(60, 4096, properties=delta, type="message.part.delta")
            questions.append(host.publish(1, type="question.asked"))
        host.until_over_the_limit()
    client.until_number(questions[-1])
    client.until_number(host.publish(20))

    check_stayed(client, host)
    assert [event.properties["n"] for event in client.events if event.type == "question.asked"] == questions
    losses = client.control("server.stream.lagged")
    assert {(loss["action"], *loss["byType"]) for loss in losses} == {("continue", "message.part.delta")}
    assert sum(loss["dropped"] for loss in losses) == host.published - len(client.numbers) > 50
    lost = {number for loss in losses for number in range(loss["first"], loss["last"] + 1)}
    assert lost | set(client.numbers) == set(range(1, host.published + 1))
    seen("shed", "told")


def test_catches_up_after_an_overflow(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host(queue_max=50, overflow="catch-up")
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))
    client.until_number(host.overrun(client))
    client.until_number(host.publish(20))

    check_stayed(client, host)
    check_exactly_once(client, host)
    assert client.control("server.stream.lagged") == []
    seen("catch-up", "all")


def test_is_waited_for(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host(queue_max=50, overflow="block?timeout=60s")
    client = connect(start_client, kind, host.port)
    client.until_number(host.publish(20))

    def publish_one_after_the_other() -> None:
        for _ in range(60):
            host.publish(10, 4096)

    publisher = threading.Thread(target=publish_one_after_the_other, name="publisher")
    with client.stopped():
        publisher.start()
        status = host.until_full()
        (subscriber,) = status["subscribers"]
        assert subscriber["lag"]["events"] <= 50
        assert status["store"]["latest"] < 620
        assert publisher.is_alive()
    publisher.join(TIMEOUT)
    assert not publisher.is_alive()
    client.until_number(620)
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    assert len(host.requests()) == 1
    assert client.control("server.stream.lagged") == []
    seen("block", "all")


def test_is_served_a_replay_once(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host()
    host.publish(50)
    client = start_client(kind.program, host.url, kind.path, {"after_seq": "0"})
    client.until(lambda client: client.ended, "the end")

    assert client.numbers == list(range(1, 51))
    assert host.status()["counters"]["attached"] == 1
    requests = host.requests()
    assert [request["query"] for request in requests] == ["after_seq=0"] * len(requests)
    assert len(requests) == (2 if kind.event_source else 1)
    seen("after_seq", "204" if kind.event_source else "ends")


def test_tolerates_unknown_frames(kind: Kind, start_host: StartHost, start_client: StartClient, seen: Seen) -> None:
    host = start_host(heartbeat=0.1, queue_max=50, overflow="drop-oldest")
    client = connect(start_client, kind, host.port)
    host.publish(5, unknown={"key": [1]}, directory="/somewhere", workspace="other")
    # A twin as opencode's: the same id under another type, no properties; of scope global, so only `/global/event`.
    host.publish_these([{"type": "sync", "id": "evt_twin", "scope": "global", "syncEvent": {}}], numbered=False)
    client.until(lambda client: len(client.control("server.heartbeat")) >= 2, "heartbeats")
    host.overrun(client)
    client.until(lambda client: client.control("server.stream.lagged"), "server.stream.lagged")
    host.publish_these([{"type": "x.never.heard.of", "properties": {"n": host.published + 1}}])
    client.until_number(host.published)

    twins = [event for event in client.events if event.type == "sync"]
    assert [twin.id for twin in twins] == (["evt_twin"] if kind.path == "/global/event" else [])
    assert client.events[-1].type == "x.never.heard.of"
    assert client.numbers[:5] == [1, 2, 3, 4, 5]
    assert len(host.requests()) == 1
    assert not client.ended
    seen("unknown", "passed on")


def test_the_table_has_every_client_and_situation(request: pytest.FixtureRequest) -> None:
    """Written by ``pytest tests/clients --write-table``."""
    if request.config.getoption("write_table", False):
        return  # it is about to be written
    assert shape(DOCUMENT.read_text().splitlines()) == shape(table({}).splitlines())
    assert "not run" not in DOCUMENT.read_text()
    assert len(SITUATIONS) == 13
