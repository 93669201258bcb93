"""Four uvicorn workers over one SQLite file, or one Valkey: one stream, whoever is asked."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartBroker
from .publisher import publish
from .reader import Reader
from .test_crash_loop import CLEAN, until

_OPTIONS = ("--port", "0", "--workers", "4", "--timeout-graceful-shutdown", "1", "--no-access-log")


def start_workers(store: str, started: list[Callable[[], None]]) -> int:
    """Four of them; the port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), *_OPTIONS, "workers:app"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**CLEAN, "STORE": store},
    )

    def end() -> None:
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()

    started.append(end)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return int(found[1])
    raise AssertionError("uvicorn did not start")


def status(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/event/status")
    answer = connection.getresponse()
    said: dict[str, Any] = json.loads(answer.read())
    assert answer.getheader("x-pid") == str(said["pid"]), "a worker speaks for itself"
    connection.close()
    return said


@pytest.mark.parametrize("kind", ["sqlite", "valkey"])
def test_four_workers_are_one_stream(
    kind: str, start_broker: StartBroker, tmp_path: Path, started: list[Callable[[], None]]
) -> None:
    store = start_broker(kind).url if kind == "valkey" else f"sqlite:///{tmp_path / 'a.db'}"
    port = start_workers(store, started)
    readers: list[Reader] = []
    answers: list[dict[str, Any]] = []

    def read_from_all() -> bool:
        """Whoever is free takes a connection, so that it takes some to have all four."""
        readers.append(Reader(lambda: port))
        started.append(readers[-1].stop)
        until(lambda: bool(readers[-1].pids))
        return len(readers) >= 20 and len({pid for reader in readers for pid in reader.pids}) == 4

    until(read_from_all, 60)
    ended = threading.Event()

    def publish_on(name: str) -> None:
        number = 0
        while not ended.is_set():
            number += 1
            while True:
                with suppress(OSError, http.client.HTTPException):
                    answers.append(publish(port, f"evt_{name}_{number}"))
                    break

    publishers = [threading.Thread(target=publish_on, args=(name,)) for name in "abcd"]
    for publisher in publishers:
        publisher.start()
    try:
        until(lambda: len({answer["pid"] for answer in answers}) == 4 and len(answers) > 100)
        victim = int(readers[0].pids.copy().pop())
        os.kill(victim, signal.SIGKILL)  # The others go on, and its readers come to them.
        count = len(answers)
        until(lambda: len(answers) > count + 100 and len(readers[0].pids) > 1)
    finally:
        ended.set()
        for publisher in publishers:
            publisher.join(60)

    expected = sorted((answer["epoch"], answer["first"], answer["id"]) for answer in answers)
    assert [seq for _, seq, _ in expected] == list(range(1, len(expected) + 1)), "one sequence for all"
    for reader in readers:
        until(lambda reader=reader: reader.seq >= len(expected))  # type: ignore[misc]
        assert reader.complaints == []
        assert list(reader.events) == expected

    def known() -> bool:
        said = status(port)["store"]
        return (said["kind"], said["epoch"], said["oldest"], said["latest"]) == (
            store.partition(":")[0],
            *expected[0][:2],
            len(expected),
        )

    until(known)
