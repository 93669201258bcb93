"""The tests that every event store must pass, as a class to inherit from::

    class TestMyStore(EventStoreContract):
        @asynccontextmanager
        async def make_store(self, retention: Retention) -> AsyncIterator[EventStore]:
            yield MyStore(await self.fresh_database(), retention)

``make_store`` gives a store upon a log that is empty, not opened yet; the tests open and close it. What it needs from
fixtures, an ``autouse`` fixture of the class can put on ``self``. The tests run on every event loop that
``anyio_backend`` names (a fixture to override: ``return "asyncio"``).

What a store promises beyond the protocol is said by class attributes; the tests of promises it does not make are
skipped. Load ``opencode_sse_plugin.testing.pytest_plugin`` to see the values of a failed assertion.
"""

from __future__ import annotations

from .appending import Appending
from .life import Life
from .policies import LosslessPolicyContract, OverflowPolicyContract
from .reading import Reading
from .sharing import Sharing

__all__ = ["EventStoreContract", "OverflowPolicyContract", "LosslessPolicyContract"]


class EventStoreContract(Appending, Reading, Sharing, Life):
    """What the wire contract and the bus ask of a store; see this module's docstring."""
