"""What the tests of stores in servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .brokers import PROGRAMS, Broker, Persistence

StartBroker = Callable[..., Broker]


@pytest.fixture
def started() -> Iterator[list[Callable[[], None]]]:
    """What is to be ended, last first."""
    ends: list[Callable[[], None]] = []
    yield ends
    for end in reversed(ends):
        end()


@pytest.fixture(scope="session", params=list(PROGRAMS))
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A server of each kind, which nobody may harm."""
    one = Broker(request.param, tmp_path_factory.mktemp("broker")).start()
    yield one
    one.kill()


@pytest.fixture
def start_broker(tmp_path: Path, started: list[Callable[[], None]]) -> StartBroker:
    """Starts servers that may be harmed."""

    def start(program: str = "valkey", persistence: Persistence = "none", *options: str) -> Broker:
        one = Broker(program, tmp_path / f"broker-{len(started)}", persistence, *options).start()
        started.append(one.kill)
        return one

    return start
