"""Ending connections that a server keeps to itself. On the servers themselves: tests/servers."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from starlette.types import Message

from opencode_sse_plugin import direct, transport
from opencode_sse_plugin.peers import Peers


async def send(message: Message) -> None:
    """A server's own, behind which nothing can be seen."""


@contextmanager
def connection(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, socket.socket, dict[str, Any]]]:
    """The client's side, the server's, and the scope of a request over it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2], 5) as client,
    ):
        server, address = listener.accept()
        with server:
            ends = {"client": address[:2], "server": server.getsockname()[:2]}
            yield client, server, {"type": "http", "http_version": "1.1", **ends}


def fill(sock: socket.socket) -> None:
    """Write until it takes no more."""
    sock.setblocking(False)
    while True:
        sock.send(b"x" * 65536)


def drain(sock: socket.socket) -> None:
    """Read to the end."""
    while sock.recv(65536):
        pass


async def drain_async(reader: asyncio.StreamReader) -> None:
    """Read to the end."""
    while await reader.read(65536):
        pass


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_is_found_by_its_ends_as_a_duplicate(host: str) -> None:
    with connection(host) as (_, server, scope), connection(host):
        before = open_files()
        found = Peers().find(scope)
        assert found is not None
        with closing(found):
            assert (inode(found), found.fileno() == server.fileno()) == (inode(server), False)
        assert open_files() == before


def test_an_address_of_ipv4_by_its_other_name_and_numbers_as_text() -> None:
    with connection() as (_, _, scope):
        host, port = scope["client"]
        found = Peers().find({**scope, "client": (f"::ffff:{host}", str(port)), "server": (host, scope["server"][1])})
        assert found is not None
        found.close()


@pytest.mark.parametrize(
    "other",
    [
        {"client": None},
        {"server": None},
        {"server": ("/run/app.sock", None)},
        {"client": ("10.1.2.3", 0)},  # what a proxy's headers say
        {"client": ("127.0.0.1", 1)},
        {"server": ("127.0.0.1", 1)},
        {"http_version": "2"},  # it carries others
        {"http_version": ""},
    ],
)
def test_what_cannot_be_told_apart_is_left_alone(other: dict[str, Any]) -> None:
    with connection() as (client, server, scope):
        before = open_files()
        if "http_version" not in other:
            assert Peers().find({**scope, **other}) is None
        assert transport.abort({**scope, **other}, send) is False
        assert open_files() == before
        server.sendall(b"still here")
        assert client.recv(100) == b"still here"
        status = transport.server_status({**scope, **other}, send)
        assert status["aborts_stalled"] is False
        assert "docs/servers.md" in status["advice"]


def test_what_has_the_number_now_is_not_taken_for_what_had_it() -> None:
    peers = Peers()
    with connection() as (_, server, scope):
        found = peers.find(scope)
        assert found is not None
        found.close()
        number = server.fileno()
    with connection() as (_, other, new):
        free = not os.path.exists(f"/proc/self/fd/{number}")
        if free:
            os.dup2(other.fileno(), number)
        assert peers.find(scope) is None
        found = peers.find(new, newest=True)
        assert found is not None
        with closing(found):
            assert inode(found) == inode(other)
        if free:
            os.close(number)


def test_what_nobody_takes_is_forgotten_and_both_sides_notice() -> None:
    with connection() as (client, server, scope):
        with pytest.raises(BlockingIOError):
            fill(server)
        assert transport.server_status(scope, send) == {"aborts_stalled": True, "advice": None}
        assert transport.abort(scope, send) is True
        with pytest.raises(BrokenPipeError):
            server.send(b"x")
        server.close()  # as every server does then
        with pytest.raises(ConnectionResetError):
            drain(client)


class Protocol(asyncio.Protocol):
    """A server's, whose ``send`` leads to the transport as uvicorn's does."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.made = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.made.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    async def send(self, message: Message) -> None: ...


@pytest.mark.parametrize("closing_already", [False, True])
def test_a_transport_is_reset_with_what_it_holds_even_while_it_closes(closing_already: bool) -> None:
    async def live() -> None:
        loop, held = asyncio.get_running_loop(), Protocol()
        server = await loop.create_server(lambda: held, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await held.made.wait()
        while not held.transport.get_write_buffer_size():
            held.transport.write(b"x" * 100_000)
        if closing_already:
            held.transport.close()
        transport.abort_after(0, {}, held.send)
        for _ in range(3):
            await asyncio.sleep(0.01)
        assert transport.is_closed(held.send)
        assert held.transport.get_write_buffer_size() == 0
        assert transport.abort({}, held.send) is True  # once more does nothing
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        with pytest.raises(ConnectionResetError):
            await drain_async(reader)
        writer.close()
        server.close()

    asyncio.run(live())


def test_a_transport_that_has_written_everything_is_left_to_its_server() -> None:
    async def live() -> None:
        loop, held = asyncio.get_running_loop(), Protocol()
        server = await loop.create_server(lambda: held, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        await held.made.wait()
        transport.abort_after(0, {}, held.send)
        await asyncio.sleep(0.01)
        assert not held.transport.is_closing()
        held.transport.abort()
        writer.close()
        server.close()
        await asyncio.sleep(0.01)

    asyncio.run(live())


def test_one_of_tls_does_not_wait_for_a_goodbye_and_is_asked_nothing_once_it_is_closed(tmp_path: Path) -> None:
    pem = tmp_path / "with-key.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)

    async def live() -> None:
        loop, held = asyncio.get_running_loop(), Protocol()
        server = await loop.create_server(lambda: held, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        unverified = ssl._create_unverified_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=unverified)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await held.made.wait()
        held.transport.close()
        transport.abort_after(0, {"scheme": "https"}, held.send)
        await asyncio.wait_for(held.lost.wait(), 10)

        held.transport.close()  # as uvicorn does; from now on it raises whatever it is asked
        with pytest.raises(AttributeError):
            held.transport.get_write_buffer_size()
        assert not direct.Writer(held.send).write(b"data: {}\n\n")
        assert transport.abort({"scheme": "https"}, held.send) is True
        transport.abort_after(0, {"scheme": "https"}, held.send)
        await asyncio.sleep(0)
        writer.transport.abort()
        server.close()

    asyncio.run(live())
