"""llm as a host: models that its plugins bring, prompted by an agent that streams what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anyio.to_thread
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from opencode_sse_plugin import Event, EventBus, Settings, Subscriber, hookimpl, install, register_specs
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.testing import lifespan, request, stream

with pytest.MonkeyPatch.context() as environment:
    environment.setenv("LLM_LOAD_PLUGINS", "")  # Read at import; those of this machine are not ours.
    import llm
    import llm.plugins

pytestmark = pytest.mark.anyio


class Parrot(llm.Model):
    """Says a prompt again, word by word."""

    model_id = "parrot"
    can_stream = True

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Iterator[str]:
        for word in prompt.prompt.split():
            yield f"{word} "


class LLMPlugin:
    """A plugin of llm, with llm's marker: it brings a model, and knows our hooks as well."""

    def __init__(self) -> None:
        self.attached: list[str] = []

    @llm.hookimpl
    def register_models(self, register: Any) -> None:
        register(Parrot())

    @llm.hookimpl
    def sse_event_publish(self, event: Event) -> Event | bool | None:
        return False if "psst" in str(event.properties) else None

    @llm.hookimpl
    def sse_subscriber_attach(self, subscriber: Subscriber) -> None:
        self.attached.append(subscriber.route)

    @llm.hookimpl
    def sse_register_delivery_classes(self, register: Any) -> None:
        register("llm.word", "ephemeral", None)


class OurPlugin:
    """One of ours in the same host."""

    @hookimpl
    def sse_event_publish(self, event: Event) -> Event:
        return Event(event.type, {**(event.properties or {}), "ours": True})


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[LLMPlugin]:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    plugin = LLMPlugin()
    llm.plugins.pm.register(plugin, "parrot-house")
    yield plugin
    llm.plugins.pm.unregister(plugin)


def agent(buses: dict[str, EventBus]) -> Starlette:
    """An agent's server: ``POST /say`` prompts the model in a thread, where llm's models run."""

    async def say(request: Request) -> JSONResponse:
        bus = buses[request.query_params.get("path", "")]
        text = (await request.body()).decode()

        def prompt() -> str:
            said = llm.get_model("parrot").prompt(text)
            for word in said:
                bus.publish_from_thread("llm.word", {"word": word})
            bus.publish_from_thread("llm.said", {"text": said.text()})
            return str(said.text())

        return JSONResponse(await anyio.to_thread.run_sync(prompt))

    app = Starlette(routes=[Route("/say", say, methods=["POST"])])
    for path, bus in buses.items():
        install(app, bus, authorize=None, path=path, plugin_manager=llm.plugins.pm)
    return app


def bus_alone(*ours: object) -> EventBus:
    loaded = Plugins(discover=False)
    for one in ours:
        loaded.register(one)
    return EventBus(Settings(), plugins=loaded)


async def words(app: Starlette, bus: EventBus, path: str = "") -> list[Any]:
    async with stream(app, f"{path}/event") as response:
        await response.next()
        answer = await request(app, "POST", f"/say?path={path}", content=b"polly psst wants")
        assert answer.json() == "polly psst wants "
        await bus.publish("end")
        frames = await response.until("end")
        return [frame.properties for frame in frames[:-1]]


@pytest.mark.parametrize("marker", ["host", "both"])
async def test_an_llm_plugin_has_a_say_in_the_stream_under_llms_marker(plugin: LLMPlugin, marker: str) -> None:
    bus = bus_alone(*([OurPlugin()] if marker == "both" else []))
    app = agent({"": bus})
    more = {"ours": True} if marker == "both" else {}
    async with lifespan(app):
        assert await words(app, bus) == [{"word": "polly ", **more}, {"word": "wants ", **more}]
        assert bus.delivery.of(await first(bus, "llm.word")) == "ephemeral"
    assert plugin.attached == ["/event"]
    shown = {info.name: info for info in bus.plugins.info()}
    assert shown["parrot-house"].hooks == [
        "sse_register_delivery_classes",
        "sse_event_publish",
        "sse_subscriber_attach",
    ]
    assert shown["parrot-house"].distribution == "llm"


async def first(bus: EventBus, type: str) -> Any:
    page = await bus.store.read(0, 100, 1 << 20)
    return next(event for event in page.events if event.type == type)  # type: ignore[union-attr]


async def test_without_llms_manager_only_ours_are_asked(plugin: LLMPlugin) -> None:
    async with bus_alone(OurPlugin()) as bus, bus.subscribe() as events:
        await anext(events)
        await bus.publish("a", {"text": "psst"})
        assert (await anext(events)).event.properties == {"text": "psst", "ours": True}
    assert plugin.attached == []


async def test_two_buses_of_one_agent_share_llms_plugins(plugin: LLMPlugin) -> None:
    buses = {"": bus_alone(OurPlugin()), "/two": bus_alone()}
    app = agent(buses)
    async with lifespan(app):
        assert await words(app, buses[""]) == [{"word": "polly ", "ours": True}, {"word": "wants ", "ours": True}]
        assert await words(app, buses["/two"], "/two") == [{"word": "polly "}, {"word": "wants "}]
    assert plugin.attached == ["/event", "/two/event"]


def test_llm_goes_on_as_before(plugin: LLMPlugin) -> None:
    """Its own hooks and its commands do not mind ours."""
    for _ in range(2):
        register_specs(llm.plugins.pm)
    assert "parrot" in {model.model_id for model in llm.get_models()}
    described: list[Callable[..., Any]] = [
        caller for caller in llm.plugins.pm.get_hookcallers(plugin) or () if caller.name.startswith("register_")
    ]
    assert len(described) == 1
    assert llm.get_model("parrot").prompt("hello").text() == "hello "
