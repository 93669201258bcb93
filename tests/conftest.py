"""Shared fixtures; asynchronous tests say ``@pytest.mark.anyio`` and run on asyncio and trio."""

from __future__ import annotations

import pytest

pytest_plugins = ["opencode_sse_plugin.testing.pytest_plugin"]


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loops; named here, so that a missing one fails instead of being left out."""
    backend: str = request.param
    return backend
