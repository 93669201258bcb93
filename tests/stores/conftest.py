"""What the tests of stores in servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def started() -> Iterator[list[Callable[[], None]]]:
    """What is to be ended, last first."""
    ends: list[Callable[[], None]] = []
    yield ends
    for end in reversed(ends):
        end()
