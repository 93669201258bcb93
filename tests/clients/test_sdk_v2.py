"""``@opencode-ai/sdk`` v2, unchanged: cut by an overflow, a drain and a killed connection, it resumes by itself and
ends with exactly the published events."""

from __future__ import annotations

from collections.abc import Callable

from .harness import Client, Host, HostInThread, HostProcess
from .proxy import Proxy

SDK = "sdk_v2.mjs"


def check_exactly_once(client: Client, host: Host) -> None:
    """Every published event, in order, with an id of its own, and no reason to reload anything."""
    assert client.numbers == list(range(1, host.published + 1))
    assert len({event.id for event in client.events}) == host.published
    assert len(client.control("server.connected")) == 1
    assert client.control("server.stream.expired") == []
    assert not client.ended


def check_resumed(host: Host, times: int | None = None) -> None:
    """The first request had no cursor, and each later one brought one."""
    first, *later = [request["last_event_id"] for request in host.requests()]
    assert first is None
    assert later
    assert all(later)
    assert times is None or len(later) == times


def test_resumes_by_itself_after_an_overflow(
    start_host: Callable[..., HostInThread], start_client: Callable[..., Client]
) -> None:
    host = start_host(queue_max=50)
    client = start_client(SDK, host.url)
    client.until_connected()
    client.until_number(host.publish(20))
    client.until_number(host.overrun(client))
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    check_resumed(host, times=1)
    assert host.status()["counters"]["overflows"] == 1
    (lagged,) = client.control("server.stream.lagged")
    assert lagged["exceeded"] == "events"
    assert lagged["action"] == "reconnect"
    assert lagged["queued"] == lagged["dropped"] > 50


def test_resumes_by_itself_after_a_drain(
    start_host_process: Callable[..., HostProcess], start_client: Callable[..., Client]
) -> None:
    host = start_host_process()
    client = start_client(SDK, host.url)
    client.until_connected()
    client.until_number(host.publish(20))
    host.publish(300, 1000)  # on its way when the signal comes
    host.drain()
    host.publish(300, 1000)  # before the client is back
    client.until_number(host.published)
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    check_resumed(host)
    (draining,) = client.control("server.stream.draining")
    assert 50 <= draining["retry"] <= 100


def test_resumes_by_itself_after_a_killed_connection(
    start_host: Callable[..., HostInThread],
    start_proxy: Callable[[int], Proxy],
    start_client: Callable[..., Client],
) -> None:
    host = start_host()
    proxy = start_proxy(host.port)
    client = start_client(SDK, f"http://127.0.0.1:{proxy.port}")
    client.until_connected()
    client.until_number(host.publish(20))
    for times in (1, 2):
        host.publish(500, 4096)  # on its way when the connection dies
        assert proxy.cut(reset=True) == 1
        host.publish(100)
        client.until_number(host.published)
        check_resumed(host, times)
    client.until_number(host.publish(20))

    check_exactly_once(client, host)
    assert client.control("server.stream.draining") == []
