"""Shared fixtures; asynchronous tests say ``@pytest.mark.anyio`` and run on asyncio and trio."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

# A machine that stands still for a moment has not found a counterexample.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

pytest_plugins = ["opencode_sse_plugin.testing.pytest_plugin"]


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loops; named here, so that a missing one fails instead of being left out."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that a test runs sets up logging, to a stream that ends with the test."""
    root, uvicorn = logging.getLogger(), [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    handlers, level, levels = root.handlers[:], root.level, [logger.level for logger in uvicorn]
    filters = [logger.filters[:] for logger in uvicorn]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, before, kept in zip(uvicorn, levels, filters, strict=True):
        logger.setLevel(before)
        logger.filters[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """No test writes into the home folder of whoever runs it."""
    state = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="opencode-sse-state-")
    atexit.register(shutil.rmtree, state, ignore_errors=True)  # Workers of xdist end without cleaning up otherwise.
