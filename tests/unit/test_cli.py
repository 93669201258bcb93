"""The command line: what it says, and its exit codes."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opencode_sse_plugin import ConfigurationError
from opencode_sse_plugin.cli import demo, main

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("OPENCODE_", "PYTEST"))}


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as left:
            main([option])
        assert left.value.code == 0
    assert "serve" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "OPENCODE_SERVER_PASSWORD"),
        (["--overflow", "nix"], "unknown overflow policy 'nix'; there are"),
        (["--store", "nix://x"], "no event store for 'nix'; there are"),
        (["--queue-max", "0"], "queue_max must be at least 1"),
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--demo-rate", "0"], "--demo-rate must be more than 0"),
        (["--demo-file", "/does/not/exist"], "/does/not/exist"),
        (["--host", "no.such.host.invalid"], ""),
    ],
)
def test_what_makes_no_sense_is_2_and_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENCODE_SERVER_PASSWORD", raising=False)
    assert main(["serve", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("opencode-sse: ")
    assert said in output.err
    assert output.out == ""


def test_a_taken_port_is_1_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_unknown_option_is_2() -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--nix"])
    assert left.value.code == 2


def test_plugins_says_that_there_are_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencode_sse_plugin.loading.entry_points", lambda group: [])
    assert main(["plugins"]) == 0
    assert "no plugin is installed" in capsys.readouterr().out
    assert main(["plugins", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


# The demo.


def test_the_shipped_trace_is_whole() -> None:
    trace = demo.read_trace(demo.shipped())
    assert len(trace) > 3000
    assert demo.shipped().stat().st_size < 150_000
    types = {event.type for _, event in demo.one_round(trace)}
    assert {"message.part.delta", "message.part.updated", "session.idle", "sync"} <= types


def test_every_round_has_fresh_ids_and_equal_ones_stay_equal() -> None:
    trace = demo.read_trace(demo.shipped())
    one, two = ([event for _, event in demo.one_round(trace)] for _ in range(2))
    assert not {event.id for event in one} & {event.id for event in two}
    assert len({(event.id, event.type) for event in one}) == len(one)
    assert len({event.session for event in one}) == len({event.session for event in two}) > 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_trace_of_ones_own(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"trace.jsonl{suffix}"
    text = b'{"t": 1, "data": {"type": "b"}}\n\n{"t": 0, "data": {"directory": "/d", "payload": {"type": "a"}}}\n'
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](text))
    events = [event for _, event in demo.one_round(demo.read_trace(path))]
    assert [(event.type, event.directory) for event in events] == [("a", "/d"), ("b", None)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"t": 1}',
        '{"t": -1, "data": {"type": "a"}}',
        '{"t": "1", "data": {"type": "a"}}',
        '{"t": 1, "data": {"type": ""}}',
        '{"t": 1, "data": {"type": "server.heartbeat"}}',
        '{"t": 1, "data": {}}',
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"t": 0, "data": {"type": "a"}}\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=f"{path}:2: "):
        demo.read_trace(path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.gz", b"no"), ("a.xz", b"no"), ("a.jsonl", b"\xff"), ("b.jsonl", b"")]
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=str(path)):
        demo.read_trace(path)


# Serving.


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """Start ``opencode-sse serve`` on a free port; its first line of output names the URL."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> tuple[str, subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "opencode_sse_plugin.cli", "serve", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**CLEAN, "XDG_STATE_HOME": str(tmp_path), **environment},
        )
        running.append(process)
        if "--json-logs" in arguments:
            assert process.stderr is not None
            return json.loads(process.stderr.readline())["url"], process, ""
        assert process.stdout is not None
        said = process.stdout.readline()
        while not said.endswith("stops it.\n"):
            said += process.stdout.readline()
        return said.split(" on ")[1].split()[0], process, said

    yield start
    for process in running:
        process.kill()
        process.communicate()


def get(url: str, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body of an answer, whatever its status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers, refused.read()


def test_a_newcomer_watches_cuts_and_gets_the_rest(serve: Any) -> None:
    url, process, said = serve("--demo", "--demo-rate", "5")
    curl = subprocess.Popen(["curl", "-sN", f"{url}/event"], stdout=subprocess.PIPE)
    assert curl.stdout is not None
    seen: list[str] = []
    while len(seen) < 50:
        line = curl.stdout.readline().decode()
        if line.startswith("id: "):
            seen.append(line[4:].strip())
    curl.kill()
    curl.communicate()
    again = subprocess.Popen(
        ["curl", "-sN", "-H", f"Last-Event-ID: {seen[-1]}", f"{url}/event"], stdout=subprocess.PIPE
    )
    assert again.stdout is not None
    more: list[str] = []
    while len(more) < 50:
        line = again.stdout.readline().decode()
        if line.startswith("id: "):
            more.append(line[4:].strip())
    again.kill()
    again.communicate()
    numbers = [int(cursor.split(":")[1]) for cursor in seen[1:] + more[1:]]
    # Twins of scope global are not on /event, so that its numbers have holes; none may come twice.
    assert numbers == sorted(set(numbers))
    status = json.loads(get(f"{url}/event/status")[2])
    assert status["counters"]["published"] > 50
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"curl -N {url}/event" in said
    assert f"{url}/event/status" in said
    assert errors == ""


def test_what_was_published_outlives_the_process_in_the_state_folder(serve: Any, tmp_path: Path) -> None:
    url, process, said = serve()
    file = tmp_path / "opencode-sse" / "events.db"
    assert f"sqlite store {file}," in said
    assert file.parent.stat().st_mode & 0o077 == 0
    body = b'[{"type":"a"},{"type":"b"}]'
    request = urllib.request.Request(f"{url}/event", data=body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        first = json.loads(answer.read())
    process.kill()
    process.wait()
    url, _, _ = serve()
    status = json.loads(get(f"{url}/event/status")[2])["store"]
    assert (status["kind"], status["epoch"], status["oldest"], status["latest"]) == ("sqlite", first["epoch"], 1, 2)
    assert get(f"{url}/event?after_seq=1&epoch={first['epoch']}")[2].count(b'"type":"b"') == 1


def test_the_store_is_what_the_environment_says(serve: Any, tmp_path: Path) -> None:
    url, _, said = serve(OPENCODE_SSE_STORE="memory://")
    assert "(memory store," in said
    assert json.loads(get(f"{url}/event/status")[2])["store"]["kind"] == "memory"
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_had_is_1_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "opencode-sse").write_text("in the way")
    assert main(["serve", "--port", "0"]) == 1
    assert str(tmp_path / "opencode-sse") in capsys.readouterr().err
    (tmp_path / "no.db").write_text("This is no database. " * 100)
    assert main(["serve", "--port", "0", "--store", f"sqlite:///{tmp_path / 'no.db'}"]) == 1
    assert f"{tmp_path / 'no.db'}: it is not an SQLite database" in capsys.readouterr().err


def test_json_logs_are_json(serve: Any) -> None:
    url, process, _ = serve("--json-logs")
    with urllib.request.urlopen(f"{url}/event", timeout=60) as response:
        response.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output == ""
    for line in errors.splitlines():
        assert set(json.loads(line)) >= {"time", "level", "logger", "message"}


def test_a_password_by_environment_and_not_in_the_output(serve: Any) -> None:
    url, process, _ = serve(OPENCODE_SERVER_PASSWORD="s3cret-word")
    assert get(f"{url}/event/status")[0] == 401
    token = base64.b64encode(b"opencode:s3cret-word").decode()
    assert get(f"{url}/event/status", Authorization=f"Basic {token}")[0] == 200
    assert get(f"{url}/event/status?auth_token={token}")[0] == 200
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert "s3cret" not in output + errors
    assert token not in output + errors


def test_a_page_of_another_host_is_kept_out(serve: Any) -> None:
    url, _, _ = serve()
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert get(f"{url}/event/status", **headers)[0] == 403
    status, headers, _ = get(f"{url}/event/status", Origin="http://localhost:3000")
    assert (status, headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
