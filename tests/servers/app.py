"""The host that every server serves: a Starlette app with the stream installed; settings come from the environment."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from opencode_sse_plugin import EventBus, install
from opencode_sse_plugin.plugins import Plugins

app = Starlette()
install(app, EventBus(plugins=Plugins(discover=False)), authorize=None, publish=True)


async def hidden(scope: Scope, receive: Receive, send: Send) -> None:
    """The same behind something that puts forwarded addresses into the scope."""
    await app({**scope, "client": ("10.1.2.3", 0)} if scope["type"] == "http" else scope, receive, send)
