"""Ours: ``install()`` into a Starlette app, with the settings a host gets by default."""

from __future__ import annotations

from importlib.metadata import version

from common import TYPE, properties, serve
from starlette.applications import Starlette

from opencode_sse_plugin import EventBus, Settings, install

bus = EventBus(Settings(max_subscribers=20_000))
app = Starlette()
install(app, bus, authorize=None)


def publish(session: int | None) -> None:
    bus.publish_nowait(TYPE, properties(session))


serve(
    app,
    publish,
    f"opencode-sse-plugin {version('opencode-sse-plugin')}, default settings, uvicorn {version('uvicorn')} with uvloop "
    f"and httptools, orjson {version('orjson')}",
)
