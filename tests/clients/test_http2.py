"""A real browser over HTTP/2, which hypercorn speaks by default where it has a certificate."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypercorn.asyncio import serve
from hypercorn.config import Config

from opencode_sse_plugin import Settings
from opencode_sse_plugin.stores.memory import MemoryEventStore

from .harness import Client, Host
from .host import Recorder, bound, make_app
from .programs import browser


class HostWithTls(Host):
    """A host on hypercorn, for browsers with TLS and for the test without."""

    def __init__(self, certificate: Path, **settings: Any) -> None:
        sockets = {"bind": bound(), "insecure_bind": bound()}
        config = Config.from_mapping(
            {name: f"fd://{sock.dup().detach()}" for name, sock in sockets.items()},
            certfile=str(certificate),
            keyfile=str(certificate),
            errorlog=None,
        )
        ports = {name: port_of(sock) for name, sock in sockets.items()}
        self.secure_url = f"https://127.0.0.1:{ports['bind']}"
        self._stopped: asyncio.Event
        self._thread = threading.Thread(target=self._run, args=(config, Settings(**settings)), name="host")
        for sock in sockets.values():
            sock.listen()
            sock.close()
        self._began = threading.Event()
        self._thread.start()
        self._began.wait()
        super().__init__(ports["insecure_bind"])

    def _run(self, config: Config, settings: Settings) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._stopped = asyncio.Event()
            self._began.set()
            app: Any = make_app(settings, MemoryEventStore(), Recorder())
            runner.run(serve(app, config, shutdown_trigger=self._stopped.wait, mode="asgi"))

    def close(self) -> None:
        super().close()
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the host did not end"


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """One with its key, of an authority that nobody knows."""
    path = tmp_path / "certificate.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


def test_a_browser_comes_back_after_an_overflow(
    certificate: Path, opened: Callable[[Any], Any], start_client: Callable[..., Client]
) -> None:
    if browser.find() is None:
        pytest.skip("NOT TESTED IN A REAL BROWSER: apt-get install -y chromium")
    host = opened(HostWithTls(certificate, queue_max=50, write_timeout=600, retry=50))
    client = start_client("chromium.py", host.secure_url)
    client.until_connected()
    client.until_number(host.publish(20))
    host.overrun(client)
    client.until_number(host.published)
    client.until_number(host.publish(20))

    assert client.numbers == list(range(1, host.published + 1))
    assert host.status()["counters"]["overflows"] > 0
    # A browser forgets what its page has not taken when a stream breaks off, and then is given it again.
    assert {lagged["action"] for lagged in client.control("server.stream.lagged")} <= {"reconnect"}
    first, *later = [request["last_event_id"] for request in host.requests()]
    assert first is None
    assert later
    assert all(later)
