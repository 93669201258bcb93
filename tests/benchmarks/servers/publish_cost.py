"""What a publish costs its host when nobody listens: microseconds, beside those of its JSON alone. In one process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

import orjson
from common import TYPE, payload, pin, properties, say

from opencode_sse_plugin import EventBus, Settings

EVENTS: Final = 20_000
#: Between two of these the event loop runs, and with it whatever the bus does behind a publish: that counts too.
BATCH: Final = 100


async def microseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(EVENTS // BATCH):
        for _ in range(BATCH):
            call()
        await asyncio.sleep(0)
    return (time.perf_counter() - begun) / EVENTS * 1e6


async def awaited(call: Callable[[], Awaitable[object]]) -> float:
    begun = time.perf_counter()
    for _ in range(EVENTS):
        await call()
    return (time.perf_counter() - begun) / EVENTS * 1e6


async def main(rounds: int) -> None:
    async with EventBus(Settings()) as bus:
        body, whole = properties(), payload()
        encode, nowait, publish = [], [], []
        for _ in range(rounds + 1):  # The first fills the log up to what it retains.
            encode.append(await microseconds(lambda: orjson.dumps(whole)))
            nowait.append(await microseconds(lambda: bus.publish_nowait(TYPE, body)))
            publish.append(await awaited(lambda: bus.publish(TYPE, body)))
        say(encode=encode[1:], publish_nowait=nowait[1:], publish=publish[1:])


pin()
asyncio.run(main(int(sys.argv[1])))
