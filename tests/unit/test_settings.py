"""Where settings come from, and what is said about bad ones."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from opencode_sse_plugin import ConfigurationError, Settings
from opencode_sse_plugin.settings import PREFIX, SEED_QUEUE_MAX


def test_each_layer_wins_over_the_one_below() -> None:
    def plugin(settings: Settings) -> Settings:
        return replace(settings, queue_max=2, retry=2, heartbeat=2.0)

    environ = {PREFIX + "QUEUE_MAX": "3", PREFIX + "RETRY": "3"}
    settings = Settings.load({"queue_max": 4, "overflow": None}, environ, plugin)
    assert (settings.queue_max, settings.retry, settings.heartbeat) == (4, 3, 2.0)
    assert settings.overflow == "disconnect"


def test_the_proposals_variable_is_honoured() -> None:
    assert Settings.load(environ={SEED_QUEUE_MAX: "7"}).queue_max == 7
    assert Settings.load(environ={SEED_QUEUE_MAX: "7", PREFIX + "QUEUE_MAX": "8"}).queue_max == 8


def test_every_field_is_read_from_the_environment() -> None:
    texts = {"int": "5", "float": "0.5", "bool": "no", "tuple": "a, b", "str": "x", "Literal": "keep"}
    for field in fields(Settings):
        text = next(text for kind, text in texts.items() if str(field.type).startswith(kind))
        loaded = Settings.load(environ={PREFIX + field.name.upper(): text})
        assert getattr(loaded, field.name) != field.default, field.name


def test_an_empty_variable_is_no_variable() -> None:
    assert Settings.load(environ={PREFIX + "QUEUE_MAX": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("QUEUE_MAX", "many"),
        ("QUEUE_MAX", "0"),
        ("HEARTBEAT", "nan"),
        ("LOOP_SHARE", "1.5"),
        ("REPLAY", "maybe"),
        ("PUBLISH_ERRORS", "x"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{PREFIX}{name}='{text}'"):
        Settings.load(environ={PREFIX + name: text})


def test_an_unknown_argument_lists_what_exists() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting 'queue'; there are .*queue_max"):
        Settings.load({"queue": 1})


def test_one_event_always_fits() -> None:
    assert Settings(queue_max_bytes=100).max_event_bytes == 100


def test_defaults_of_a_host_stand_below_everything_else() -> None:
    defaults = Settings(store="sqlite:///a.db", retry=5)
    assert Settings.load(environ={}, defaults=defaults).store == "sqlite:///a.db"
    loaded = Settings.load(
        environ={"OPENCODE_SSE_RETRY": "6"}, plugin=lambda base: replace(base, store="memory://"), defaults=defaults
    )
    assert (loaded.store, loaded.retry) == ("memory://", 6)
