"""Fixtures that serve hosts and read from them, and end both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from starlette.types import ASGIApp

from opencode_sse_plugin import EventBus, direct

from .served import Reader, Served


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opened, last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(opened: ExitStack) -> Callable[..., Served]:
    """Serve an app on a real socket; options as of ``uvicorn.Config``."""

    def start(app: ASGIApp, bus: EventBus, **options: Any) -> Served:
        return opened.enter_context(closing(Served(app, bus, **options)))

    return start


@pytest.fixture
def read(opened: ExitStack) -> Callable[..., Reader]:
    """Send a request; parameters as of ``Reader``."""
    return lambda url, **request: opened.enter_context(closing(Reader(url, **request)))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How often a chunk was written directly (True), or had to be left to the pump (False)."""
    outcomes: Counter[bool] = Counter()
    write = direct.Writer.write

    def counting(writer: direct.Writer, chunk: bytes) -> bool:
        done = write(writer, chunk)
        outcomes[done] += 1
        return done

    monkeypatch.setattr(direct.Writer, "write", counting)
    return outcomes
