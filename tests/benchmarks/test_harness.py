"""The harness is tested, so that it does not rot between two measurements: it must see everything, and see a gap."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="the load client needs a C compiler: apt-get install gcc libc6-dev"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our server and the bare loop, measured in small."""
    pytest.importorskip("uvloop", reason="the servers under test run on uvicorn[standard]")
    file = tmp_path_factory.mktemp("bench") / "results.json"
    small = ("--subscribers", "20", "--rate", "50", "--seconds", "1.5", "--rounds", "1")
    done = run(*small, "--servers", "ours,write() loop", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 subscribers x 50 events/s" in done.stdout
    assert "[1/2] 20 subscribers" in done.stderr
    assert "[2/2, about " in done.stderr
    assert "<svg" in file.with_suffix(".svg").read_text()
    results: dict[str, Any] = json.loads(file.read_text())
    assert results["took_seconds"]["own"] > 2 * 1.5
    return results


def test_all_that_we_publish_arrives_without_a_gap(measured: dict[str, Any]) -> None:
    (ours,) = measured["rows"]["own"]["ours"]
    assert ours["events"] == 20 * 75
    assert ours["delivered"] == 1
    assert ours["missing"] == ours["lagged"] == 0
    assert 0 < ours["p50_ms"] <= ours["p99_ms"] <= ours["max_ms"]


def test_the_bare_loop_publishes_the_same(measured: dict[str, Any]) -> None:
    (loop,) = measured["rows"]["own"]["write() loop"]
    assert loop["events"] == 20 * 75


def test_an_unknown_name_is_an_error_with_a_message() -> None:
    done = run("--servers", "nobody")
    assert done.returncode == 1
    assert "there is no nobody" in done.stderr


def test_rows_that_are_compared_with_each_other_alternate() -> None:
    code = "import rows, run; print(*[','.join(row.name for row in group) for group in run.groups(rows.ROWS)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    groups = [group.split(",") for group in done.stdout.split()]
    assert ["filtered-1k", "filtered-10k"] in groups
    assert next(group for group in groups if "stalled-none" in group)[-1] == "stalled-block"
    assert ["replay"] in groups


def frame(seq: int) -> bytes:
    return b'id: epoch:%d\ndata: {"properties":{"t":%d}}\n\n' % (seq, time.monotonic_ns())


def response(pieces: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def load(body: bytes, *options: str, step: int | None = None, connections: int = 1) -> dict[str, Any]:
    """What the load client says of a server that sends this to each connection, ``step`` bytes at a time."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, contextlib.suppress(ConnectionResetError):
            connection.recv(4096)
            for at in range(0, len(body), step or len(body)):
                connection.sendall(body[at : at + (step or len(body))])
            connection.recv(1)  # Until the client has left.

    servers = [threading.Thread(target=serve) for _ in range(connections)]
    for server in servers:
        server.start()
    try:
        command = [str(HERE / ".build/load"), "--port", str(listener.getsockname()[1]), "--seconds", "1.5"]
        command += ["--connections", str(connections), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    finally:
        for server in servers:
            server.join(10)
        listener.close()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.usefixtures("measured")
class TestLoadClient:
    @pytest.mark.parametrize("step", [None, 1, 7])
    def test_sees_gaps_and_repeats_however_the_bytes_are_cut(self, step: int | None) -> None:
        stream = b"".join(frame(seq) for seq in (1, 2, 4, 4, 5, 8))
        body = response([stream[:10], stream[10:57], stream[57:]])
        result = load(body, "--ids", "contiguous", step=step)
        assert (result["events"], result["missing"], result["repeated"]) == (6, 1 + 2, 1)

    def test_counts_control_frames_apart_and_takes_their_cursor(self) -> None:
        connected = b'retry: 1000\nid: epoch:3\ndata: {"type":"server.connected"}\n\n'
        lagged = b'data: {"type":"server.stream.lagged"}\n\n'
        result = load(response([connected, frame(4), lagged, frame(5)]), "--ids", "contiguous")
        assert (result["events"], result["blocks"], result["missing"], result["lagged"]) == (2, 4, 0, 1)

    @pytest.mark.parametrize("step", [None, 1])
    def test_counts_the_same_without_parsing(self, step: int | None) -> None:
        body = response([frame(1), frame(2) + frame(3)])
        result = load(body, "--sample", "2", step=step, connections=2)
        assert (result["events"], result["parsed"]) == (2 * 3, 3)
