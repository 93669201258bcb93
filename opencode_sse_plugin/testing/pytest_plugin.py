"""Fixtures for tests of hosts and plugins. Nothing is loaded unasked, since an entry point would load in every test run
of whoever has this package installed; a top-level ``conftest.py`` says::

    pytest_plugins = ["opencode_sse_plugin.testing.pytest_plugin"]

``manual_clock`` is time that the test moves, ``sse_bus`` a started bus that lives by it and has the plugins of
``sse_plugins``, a fixture to override: none by default, whatever is installed. ``sse_bus`` needs an event loop, so its
tests are marked ``@pytest.mark.anyio``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from .clock import ManualClock

if TYPE_CHECKING:
    from ..bus import EventBus
    from ..plugins import Plugins

pytest.register_assert_rewrite("opencode_sse_plugin.testing.contracts")


@pytest.fixture
def manual_clock() -> ManualClock:
    """Time that stands still until ``await manual_clock.advance(seconds)``."""
    return ManualClock()


@pytest.fixture
def sse_plugins() -> Plugins:
    """The plugins of ``sse_bus``: none."""
    from ..plugins import Plugins

    return Plugins(discover=False)


@pytest.fixture
async def sse_bus(anyio_backend: object, manual_clock: ManualClock, sse_plugins: Plugins) -> AsyncIterator[EventBus]:
    """A started bus with default settings and a memory store, whatever the environment says."""
    from ..bus import EventBus
    from ..settings import Settings

    async with EventBus(Settings(), plugins=sse_plugins, clock=manual_clock) as bus:
        yield bus
