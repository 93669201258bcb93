"""A healthy subscriber beside whatever goes wrong: it must get every event that was stored, and no other frame."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from opencode_sse_plugin import EventBus, event_app
from opencode_sse_plugin.testing import Frame, stream

END = "witness.end"


def check(frames: Sequence[Frame], first: int, head: int) -> None:
    """Compare what it read, from ``server.connected`` to the end, with the log."""
    connected, *events = frames
    assert connected.type == "server.connected"
    strange = [frame.raw for frame in events if frame.type.startswith("server.")]
    assert not strange, f"the witness got {strange}"
    assert [frame.cursor.seq for frame in events if frame.cursor] == list(range(first, head + 1))


@asynccontextmanager
async def witnessed(bus: EventBus) -> AsyncIterator[None]:
    """Attach one for the length of a block, in memory."""
    frames: list[Frame] = []

    async def read() -> None:
        async with stream(event_app(bus, authorize=None), "/global/event") as response:
            frames.append(await response.next(timeout=600))
            attached.set()
            while frames[-1].type != END:
                frames.append(await response.next(timeout=600))

    attached = anyio.Event()
    first = bus.head + 1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await attached.wait()
        yield
        await bus.publish(END)
    check(frames, first, bus.head)
