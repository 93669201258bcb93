"""The server dies again and again: what it acknowledged comes to every client exactly once and in order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartBroker
from .reader import Reader

PUBLISHER = Path(__file__).with_name("publisher.py")
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("OPENCODE_", "PYTEST"))}


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Server:
    """``opencode-sse serve``, generation after generation."""

    def __init__(self, folder: Path, store: str) -> None:
        self.port = folder / "port"
        self._store = store
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        arguments = ["serve", "--port", "0", "--store", self._store, "--json-logs"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opencode_sse_plugin.cli", *arguments], stderr=subprocess.PIPE, text=True, env=CLEAN
        )
        assert self._process.stderr is not None
        said = json.loads(self._process.stderr.readline())
        assert said["message"] == "listening", said
        # At once, or a client would read a part of it.
        temporary = self.port.with_suffix(".new")
        temporary.write_text(said["url"].rpartition(":")[2])
        temporary.rename(self.port)

    def kill(self) -> None:
        """SIGKILL, wherever it is."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


class Publisher:
    """A process that publishes one event after another, and its list of acknowledgements."""

    def __init__(self, folder: Path, port: Path, name: str) -> None:
        self.list = folder / f"{name}.jsonl"
        self.list.touch()
        self._process = subprocess.Popen(
            [sys.executable, PUBLISHER, port, self.list, name], stdin=subprocess.PIPE, text=True
        )

    @property
    def acknowledged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.list.read_text().splitlines()]

    def finish(self) -> None:
        """Let it have its last acknowledgement."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("store", ["sqlite-full", "sqlite-normal", "valkey"])
def test_what_was_acknowledged_comes_exactly_once_and_in_order(
    started: list[Callable[[], None]], start_broker: StartBroker, tmp_path: Path, rounds: int, store: str
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    moment = random.Random(seed)
    kind, _, synchronous = store.partition("-")
    url = start_broker(kind).url if kind == "valkey" else f"sqlite:///{tmp_path / 'a.db'}?synchronous={synchronous}"
    server = Server(tmp_path, url)
    server.start()
    started.append(server.kill)
    readers, publishers = [], []
    for _ in range(5):
        readers.append(Reader(lambda: int(server.port.read_text())))
        started.append(readers[-1].stop)
    for name in ("a", "b", "c"):
        publishers.append(Publisher(tmp_path, server.port, name))
        started.append(publishers[-1].kill)

    def everyone_goes_on() -> None:
        before = [publisher.list.stat().st_size for publisher in publishers]
        until(lambda: all(one.list.stat().st_size > size for one, size in zip(publishers, before, strict=True)))

    for number in range(rounds):
        if number % 3:  # Sometimes it dies while it starts, or recovers what the one before it left.
            everyone_goes_on()
        time.sleep(moment.uniform(0.0, 0.3))
        server.kill()
        server.start()
    everyone_goes_on()
    for publisher in publishers:
        publisher.finish()

    acknowledged = [answer for publisher in publishers for answer in publisher.acknowledged]
    expected = sorted((answer["first"], answer["id"]) for answer in acknowledged)
    for reader in readers:
        until(lambda reader=reader: reader.seq >= len(expected))  # type: ignore[misc]
    for reader in readers:
        assert reader.complaints == []
        assert [(got.seq, got.id) for got in reader.events] == expected
        assert [got.seq for got in reader.events] == list(range(1, len(expected) + 1))
        assert reader.connections > 1
        if synchronous != "normal":
            assert len({got.epoch for got in reader.events}) == 1
    print(f"{len(expected)} events over {rounds} crashes")
