"""Delivery classes: opencode's table against its schema, the page that shows it, and registration."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opencode_sse_plugin import ConfigurationError, Event, EventBus, StoredEvent, hookimpl
from opencode_sse_plugin.delivery import DeliveryClasses
from opencode_sse_plugin.delivery_table import OPENCODE, Row, builtin_delivery_classes
from opencode_sse_plugin.plugins import Plugins

ROOT = Path(__file__).parents[2]
#: Of opencode 1.18: each event type and its properties, optional ones with a question mark.
SCHEMA = {
    type: properties
    for type, *properties in map(str.split, (ROOT / "tests/data/event-types.txt").read_text("utf-8").splitlines())
}
_REQUIRED = re.compile(r".*\.(asked|replied|rejected|error|idle|created|removed|deleted|failed)|server\..*|global\..*")
_LATEST = re.compile(r"(session|message|message\.part|pty|project)\.updated|.*\.status|todo\.updated|session\.diff")


def test_every_event_type_of_opencode_is_in_the_table_once() -> None:
    assert len(SCHEMA) == 89
    assert Counter(row.type for row in OPENCODE) == Counter(SCHEMA.keys())


@pytest.mark.parametrize("row", OPENCODE, ids=lambda row: row.type)
def test_a_row_is_what_its_type_says(row: Row) -> None:
    expected = "ephemeral" if row.type.endswith(".delta") else None
    expected = "required" if _REQUIRED.fullmatch(row.type) else expected
    expected = "latest" if _LATEST.fullmatch(row.type) else expected
    assert expected in (None, row.delivery_class)
    if row.delivery_class == "ephemeral":
        assert row.append is not None, "what may go missing can at least be joined"


@pytest.mark.parametrize("row", OPENCODE, ids=lambda row: row.type)
def test_a_key_is_made_of_properties_that_the_type_always_has(row: Row) -> None:
    paths = [path for path in (row.key or "").split("/") if path]
    for name in [path.split(".")[0] for path in paths] + [row.append] * (row.append is not None):
        assert name in SCHEMA[row.type]


def test_the_page_shows_the_table() -> None:
    expected = ["| event type | class | key | settles, with the same key |", "| --- | --- | --- | --- |"]
    for row in OPENCODE:
        key = "" if row.key is None else f"`{row.key}`" if row.key else "the instance"
        settled = [row.type] if row.delivery_class == "latest" else []
        if row.family is not None and row.delivery_class != "ephemeral":
            others = [other for other in OPENCODE if other.family == row.family and other.type != row.type]
            settled += [other.type for other in others if other.delivery_class != "required"]
        cells = [f"`{row.type}`", row.delivery_class, key, ", ".join(f"`{type}`" for type in settled)]
        expected.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    page = (ROOT / "docs/delivery-classes.md").read_text("utf-8").splitlines()
    assert [line for line in page if line.startswith("|")] == expected


# Registration.


def stored(type: str, properties: dict[str, Any], **place: Any) -> StoredEvent:
    return StoredEvent.encode(Event(type, properties, id="evt_1", **place))


@pytest.fixture
def classes() -> DeliveryClasses:
    classes = DeliveryClasses()
    builtin_delivery_classes(classes.register)
    return classes


def test_an_unknown_type_is_required_and_describes_nothing(classes: DeliveryClasses) -> None:
    event = stored("never.heard.of", {"sessionID": "ses_1"})
    assert (classes.of(event), classes.key(event)) == ("required", None)


def test_what_is_in_two_places_is_two_things(classes: DeliveryClasses) -> None:
    todo = {"sessionID": "ses_1", "todos": []}
    keys = {
        classes.key(stored("todo.updated", todo, directory=directory, workspace=workspace))
        for directory in (None, "/a", "/b")
        for workspace in (None, "w")
    }
    assert len(keys) == 6


@pytest.mark.parametrize("properties", [{}, {"info": None}, {"info": {"id": 5}}, {"info": "x"}])
def test_what_does_not_look_like_its_type_describes_nothing(
    properties: dict[str, Any], classes: DeliveryClasses
) -> None:
    assert classes.key(stored("message.updated", properties)) is None


def test_a_plugin_adds_types_and_says_otherwise_about_ours() -> None:
    class Brings:
        @hookimpl
        def sse_register_delivery_classes(self, register: Any) -> None:
            register("mood.updated", "latest", lambda properties: properties["who"])
            register("file.edited", "required")

    plugins = Plugins(discover=False)
    plugins.register(Brings())
    delivery = EventBus({}, plugins=plugins).delivery
    assert delivery.of(stored("mood.updated", {"who": "ann"})) == "latest"
    assert delivery.of(stored("file.edited", {"file": "a"})) == "required"
    assert delivery.of(stored("file.watcher.updated", {"file": "a"})) == "latest"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a", "often"), "delivery class 'often'; there are ephemeral, latest, required"),
        (("a", "latest"), "event type 'a' is 'latest' and needs a key"),
    ],
)
def test_a_class_that_is_none_is_named(arguments: tuple[Any, ...], said: str, classes: DeliveryClasses) -> None:
    with pytest.raises(ConfigurationError, match=said):
        classes.register(*arguments)
