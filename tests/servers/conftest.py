"""Fixtures that start servers and readers, and end them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import pytest

from .programs import ONLY_IN_CHAOS, SERVERS, Server

Closable = TypeVar("Closable")


@pytest.fixture
def opened() -> Iterator[Callable[[Any], Any]]:
    """Closes what a test opened, last first."""
    with ExitStack() as stack:
        yield lambda thing: stack.enter_context(closing(thing))


def _param(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.chaos) if name in ONLY_IN_CHAOS else name


@pytest.fixture(params=map(_param, SERVERS))
def name(request: pytest.FixtureRequest) -> str:
    """Each of the servers."""
    name: str = request.param
    return name


@pytest.fixture
def start(name: str, opened: Callable[[Server], Server]) -> Callable[..., Server]:
    """Start it; takes settings."""
    return lambda **settings: opened(Server(name, **{"heartbeat": 600, **settings}))
