"""Shared fixtures; asynchronous tests say ``@pytest.mark.anyio`` and run on asyncio and trio."""

from __future__ import annotations

import os
import tempfile

import pytest

pytest_plugins = ["opencode_sse_plugin.testing.pytest_plugin"]


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loops; named here, so that a missing one fails instead of being left out."""
    backend: str = request.param
    return backend


def pytest_configure(config: pytest.Config) -> None:
    """No test writes into the home folder of whoever runs it."""
    state = tempfile.TemporaryDirectory(prefix="opencode-sse-state-", ignore_cleanup_errors=True)
    config.add_cleanup(state.cleanup)
    os.environ["XDG_STATE_HOME"] = state.name
