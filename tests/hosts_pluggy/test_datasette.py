"""Datasette as a host: its plugin manager, its actors, its hooks, and its own server as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from datasette.app import Datasette
from datasette.plugins import pm

from opencode_sse_plugin import Event, EventBus, Limits, hookimpl
from opencode_sse_plugin.testing import lifespan, request, settle, stream

PLUGINS = Path(__file__).parent / "datasette_plugins"
SECRET = "only-for-tests"
CONFIG = {"permissions": {"create-table": {"id": "*"}, "insert-row": {"id": "*"}}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette's


def actor(name: str) -> dict[str, str]:
    """The cookie of somebody who is logged in."""
    made = Datasette(secret=SECRET)
    try:
        return {"cookie": f"ds_actor={made.client.actor_cookie({'id': name})}"}
    finally:
        made.close()


def row(table: str) -> dict[str, Any]:
    return {"table": table, "row": {"id": 1}}


# In process.


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], tuple[Datasette, EventBus]]]:
    """Make a Datasette with both plugins, and say its bus; the module-wide manager is as before afterwards."""
    before = set(pm.get_plugins())
    with ExitStack() as stack:

        def one() -> tuple[Datasette, EventBus]:
            path = tmp_path / f"demo{len(list(tmp_path.iterdir()))}.db"
            path.touch()
            made = Datasette([str(path)], plugins_dir=str(PLUGINS), secret=SECRET, config=CONFIG)
            stack.callback(made.close)
            (plugin,) = (plugin for plugin in pm.get_plugins() if getattr(plugin, "PATH", "") == "/-/stream")
            return made, plugin.bus_of(made)

        yield one
    for plugin in set(pm.get_plugins()) - before:
        pm.unregister(plugin)


async def create(datasette: Datasette, who: str, table: str) -> None:
    (database,) = (name for name in datasette.databases if name.startswith("demo"))
    answer = await request(datasette.app(), "POST", f"/{database}/-/create", json=row(table), headers=actor(who))
    assert answer.status == 201, answer.body


@pytest.mark.anyio
async def test_its_actors_read_what_they_did_and_its_plugins_have_a_say(make: Any) -> None:
    datasette, bus = make()
    app = datasette.app()
    async with lifespan(app):
        assert (await request(app, "GET", "/-/stream/event")).status == 401
        assert (await request(app, "GET", "/-/stream/event", headers=actor("mallory"))).status == 403
        assert (await request(app, "GET", "/-/versions.json")).status == 200
        async with stream(app, "/-/stream/event", headers=actor("ann")) as ann:
            await ann.next()
            for who, table in (("bob", "theirs"), ("ann", "secret"), ("ann", "mine")):
                await create(datasette, who, table)
            created, inserted = await ann.take(2)
            assert (created.type, inserted.type) == ("datasette.create-table", "datasette.insert-rows")
            assert (created.properties["table"], created.properties["host"]) == ("mine", "datasette")
        async with stream(app, "/-/stream/event?after_seq=0", headers=actor("root")) as root:
            tables = [frame.properties["table"] for frame in (await root.rest())[1:]]
            assert tables == ["theirs", "theirs", "mine", "mine"]
        status = (await request(app, "GET", "/-/stream/event/status", headers=actor("root"))).json()
        shown = {plugin["name"]: plugin for plugin in status["plugins"]}
        assert shown["guest.py"]["distribution"] == "datasette"
        assert "sse_event_publish" in shown["guest.py"]["hooks"]
    assert bus.state == "closed"


@pytest.mark.anyio
async def test_a_policy_under_datasettes_marker_acts(make: Any) -> None:
    _, bus = make()
    async with bus, bus.subscribe(limits=Limits(4, 10_000)) as events:
        await anext(events)
        for n in range(6):
            await bus.publish("a", {"n": n})
            await settle()
        lagged, newest = [await anext(events) for _ in range(2)]
        assert (lagged.event.properties or {})["policy"] == "latest-of-datasette"
        assert newest.event.properties == {"n": 5, "host": "datasette"}


@pytest.mark.anyio
async def test_plugins_of_ours_are_asked_beside_datasettes(make: Any) -> None:
    _, bus = make()

    class Ours:
        @hookimpl
        def sse_event_publish(self, event: Event) -> Event:
            assert "host" not in (event.properties or {})
            return Event(event.type, {"ours": True})

    bus.plugins.register(Ours())
    async with bus, bus.subscribe() as events:
        await anext(events)
        await bus.publish("a")
        assert (await anext(events)).event.properties == {"ours": True, "host": "datasette"}


@pytest.mark.anyio
async def test_two_datasettes_have_two_buses_over_one_manager(make: Any) -> None:
    (one, bus), (two, other) = make(), make()
    assert bus is not other
    async with lifespan(one.app()), lifespan(two.app()):
        await create(one, "ann", "first")
        await create(two, "ann", "second")
        for datasette, table in ((one, "first"), (two, "second")):
            async with stream(datasette.app(), "/-/stream/event?after_seq=0", headers=actor("ann")) as response:
                frames = (await response.rest())[1:]
                assert {frame.properties["table"] for frame in frames} == {table}
                assert len(frames) == 2


@pytest.mark.anyio
async def test_without_a_lifespan_the_first_request_starts_it(make: Any) -> None:
    datasette, bus = make()
    async with stream(datasette.app(), "/-/stream/event", headers=actor("ann")) as response:
        assert (await response.next()).type == "server.connected"
    await datasette.invoke_shutdown()
    assert bus.state == "closed"


# As a process.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``datasette serve`` on a free port: its URL, and the process."""
    config = tmp_path / "datasette.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "datasette", "serve", str(tmp_path / "demo.db"), "--create", "--port", "0"),
            *("--plugins-dir", str(PLUGINS), "--secret", SECRET, "--config", str(config)),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DATASETTE_LOAD_PLUGINS": ""},
    )
    assert process.stderr is not None
    try:
        while not (found := re.search(r"running on (http://\S+)", line := process.stderr.readline())):
            assert line, "it did not start"
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def test_its_own_server_streams_resumes_and_ends_well(served: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = served
    ann = actor("ann")
    with httpx.Client(base_url=url, headers=ann, timeout=60) as client, ExitStack() as stack:
        lines = stack.enter_context(client.stream("GET", "/-/stream/event")).iter_lines()
        assert "server.connected" in next(line for line in lines if line.startswith("data: "))
        for table in ("one", "secret", "two"):
            assert client.post("/demo/-/create", json=row(table)).status_code == 201
        cursors, seen = [], []
        while len(seen) < 4:
            line = next(lines)
            if line.startswith("id: "):
                cursors.append(line)
            elif line.startswith("data: "):
                seen.append(json.loads(line[6:])["properties"]["table"])
        assert seen == ["one", "one", "two", "two"]
        cursor = next(line for line in cursors if line.endswith(":2"))[4:]
        with client.stream("GET", "/-/stream/event", headers={"last-event-id": cursor}) as resumed:
            again = (json.loads(line[6:]) for line in resumed.iter_lines() if line.startswith("data: "))
            assert [next(again)["type"] for _ in range(2)] == ["server.heartbeat", "datasette.create-table"]
        process.send_signal(signal.SIGTERM)
        rest: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError):  # The end that makes clients come back.
            rest.extend(line for line in lines if line.startswith("data: "))
        assert "server.stream.draining" in rest[-1]
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
