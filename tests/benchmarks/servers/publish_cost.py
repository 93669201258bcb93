"""What a publish costs its host when nobody listens: microseconds, beside those of its JSON alone. In one process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import orjson
from common import TYPE, payload, pin, properties, say

from opencode_sse_plugin import EventBus, Settings

EVENTS = 20_000


def microseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    for _ in range(EVENTS):
        call()
    return (time.perf_counter() - begun) / EVENTS * 1e6


async def main(rounds: int) -> None:
    async with EventBus(Settings()) as bus:
        body, whole = properties(), payload()

        async def awaited() -> float:
            begun = time.perf_counter()
            for _ in range(EVENTS):
                await bus.publish(TYPE, body)
            return (time.perf_counter() - begun) / EVENTS * 1e6

        encode, nowait, publish = [], [], []
        for _ in range(rounds + 1):  # The first fills the log up to what it retains.
            encode.append(microseconds(lambda: orjson.dumps(whole)))
            nowait.append(microseconds(lambda: bus.publish_nowait(TYPE, body)))
            publish.append(await awaited())
            await asyncio.sleep(0)
        say(encode=encode[1:], publish_nowait=nowait[1:], publish=publish[1:])


pin()
asyncio.run(main(int(sys.argv[1])))
