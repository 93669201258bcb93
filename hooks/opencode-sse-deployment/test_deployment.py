"""Files and what they come to; what makes no sense stops the start and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import opencode_sse_deployment
import pytest

from opencode_sse_plugin import ConfigurationError, EventBus, PluginError, Settings
from opencode_sse_plugin.cli import main
from opencode_sse_plugin.plugins import Plugins

FILE = """
overflow = "drop-oldest"
queue_max = 50
queue_max_bytes = "4 MiB"
retain_age = "1.5 h"
retry = "2 s"
heartbeat = 5
replay = false
disabled_plugins = ["noise"]

[profile.production]
overflow = "drop-newest"
retry = 750

[profile.laptop]
queue_max = 5
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sse.toml"
    path.write_text(FILE, encoding="utf-8")
    monkeypatch.setenv("OPENCODE_SSE_CONFIG", str(path))
    monkeypatch.delenv("OPENCODE_SSE_PROFILE", raising=False)
    return path


def settings(**arguments: Any) -> Settings:
    """What a bus comes to that has the plugin."""
    plugins = Plugins(discover=False)
    plugins.register(opencode_sse_deployment)
    return EventBus(arguments, plugins=plugins).settings


def test_the_file_is_laid_over_the_defaults() -> None:
    assert settings() == Settings(
        overflow="drop-oldest",
        queue_max=50,
        queue_max_bytes=4 * 1024 * 1024,
        retain_age=5400.0,
        retry=2000,
        heartbeat=5.0,
        replay=False,
        disabled_plugins=("noise",),
    )


def test_a_profile_is_laid_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_PROFILE", "production")
    got = settings()
    assert (got.overflow, got.retry, got.queue_max) == ("drop-newest", 750, 50)


def test_environment_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_SSE_QUEUE_MAX", "7")
    got = settings(heartbeat=8.0)
    assert (got.queue_max, got.heartbeat, got.overflow) == (7, 8.0, "drop-oldest")


def test_without_a_file_nothing_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENCODE_SSE_CONFIG")
    monkeypatch.setattr(opencode_sse_deployment, "SYSTEM_FILE", tmp_path / "none.toml")
    assert settings() == Settings()
    monkeypatch.setenv("OPENCODE_SSE_PROFILE", "production")
    with pytest.raises(ConfigurationError, match="OPENCODE_SSE_PROFILE=production, but there is no"):
        settings()


def test_the_systems_file_is_taken_if_it_is_there(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.delenv("OPENCODE_SSE_CONFIG")
    monkeypatch.setattr(opencode_sse_deployment, "SYSTEM_FILE", file)
    assert settings().queue_max == 50


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("queue_max = ", "Invalid value"),
        ("\udcff", "utf-8"),
        ("queue_maximum = 1", "unknown setting 'queue_maximum'; there are queue_max, queue_max_bytes"),
        ("queue_max = '1'", "queue_max = '1': it takes a whole number"),
        ("queue_max = true", "it takes a whole number"),
        ("queue_max = 0", "queue_max must be at least 1, not 0"),
        ("queue_max_bytes = '4 Mib'", "unknown unit 'Mib'; there are B, kB"),
        ("heartbeat = 'soon'", "it takes a number or a quantity"),
        ("retain_age = '2 weeks'", "unknown unit 'weeks'; there are ms, s"),
        ("replay = 1", "it takes true or false"),
        ("plugins = 'redact'", "it takes a list of names"),
        ("store = 1", "it takes a text"),
        ("publish_errors = 'ignore'", "must be 'drop' or 'keep'"),
        ("profile = 1", "profiles are tables"),
        ("[profile]\nproduction = 1", "profiles are tables"),
        ("[profile.other]\nqueue_max = -1", "profile other: queue_max = -1: queue_max must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_file(file: Path, text: str, complaint: str) -> None:
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigurationError) as caught:
        settings()
    assert str(file) in str(caught.value)
    assert complaint in str(caught.value)


def test_a_missing_file_or_profile_is_named(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("OPENCODE_SSE_PROFILE", "staging")
    with pytest.raises(ConfigurationError, match="no profile 'staging'; there are laptop, production"):
        settings()
    file.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        settings()


def test_what_it_requires_has_to_be_there(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text("plugins = ['opencode-sse-nix']", encoding="utf-8")
    monkeypatch.setattr("opencode_sse_plugin.loading.entry_points", lambda group: [Installed()])
    with pytest.raises(PluginError, match="required plugin 'opencode-sse-nix' is not installed"):
        EventBus()


def test_the_command_line_says_it_and_answers_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    file.write_text("queue_max = 0", encoding="utf-8")
    monkeypatch.setattr("opencode_sse_plugin.loading.entry_points", lambda group: [Installed()])
    assert main(["serve", "--port", "0"]) == 2
    assert f"opencode-sse: {file}: queue_max = 0" in capsys.readouterr().err


class Installed:
    """The entry point of this distribution, as ``importlib.metadata`` would give it."""

    name = "deployment"
    dist = None

    def load(self) -> object:
        return opencode_sse_deployment
