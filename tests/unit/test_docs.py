"""The documentation says what is there: its code runs, its commands exist, every hook has its signature."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from opencode_sse_plugin import Appended, EventBus, Limits, Settings, StoredEvent, event_app, frames
from opencode_sse_plugin.cli import parser
from opencode_sse_plugin.hookspecs import ASYNC, SPECS
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores.memory import MemoryEventStore
from opencode_sse_plugin.testing import settle, stream

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("hooks/**/README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
#: Typed in by a test of its own: its Python is that of several files.
TYPED_IN = ROOT / "docs/tutorial-policy.md"
#: The commands that example plugins bring.
SCRIPTS = {
    name
    for path in ROOT.glob("hooks/*/pyproject.toml")
    for name in tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("scripts", ())
}
_BLOCK = re.compile(r"^```(\w+)(?: fails)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            while words and "=" in words[0] and words[0].split("=")[0].isupper():
                words.pop(0)
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    if code and page != TYPED_IN:
        program = tmp_path / "page.py"
        program.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "error", program],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, ROOT.glob("hooks/*/")))},
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_toml_of_a_page_parses(page: Path) -> None:
    for block in blocks(page, "toml"):
        assert tomllib.loads(block)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert set(word for word in words[1:] if "=" not in word) <= targets, words
        elif words[0] == "opencode-sse":
            parser().parse_args(words[1:])
        else:
            assert words[0] in (
                *SCRIPTS,
                "curl",
                "pip",
                "cd",
                "pytest",
                "python",
                "uvicorn",
                "apt-get",
                "npm",
                "nginx",
            ), words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# Hooks: that each has a test is checked in test_hooks.py.


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_hook_has_a_page_with_its_exact_signature(spec: Any) -> None:
    signature = str(inspect.signature(spec)).replace("'", "")
    page = (ROOT / f"docs/hooks/{spec.__name__}.md").read_text(encoding="utf-8")
    heading, *rest = page.splitlines()
    assert heading == f"# `{spec.__name__}{signature}`"
    assert not [line for line in rest if line.startswith("# `")]
    for said in ("**Called**", "**May answer**", "**If it raises**"):
        assert page.count(f"\n{said}") == 1, said
    assert ("`async`" in page) == (spec.__name__ in ASYNC)


def test_the_index_has_every_hook_and_no_other() -> None:
    names = [spec.__name__ for spec in SPECS]
    index = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[`(sse_\w+)`\]\(hooks/\1\.md\)", index, re.MULTILINE) == names
    assert sorted(page.stem for page in ROOT.glob("docs/hooks/*.md")) == sorted(names)


class Moody(MemoryEventStore):
    """A store that fails once."""

    append_now = None  # type: ignore[assignment]
    failures = 0

    async def append(self, events: Sequence[StoredEvent]) -> Appended:
        if self.failures:
            self.failures -= 1
            raise OSError("disk full")
        return MemoryEventStore.append_now(self, events)


@pytest.mark.anyio
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
async def test_the_example_of_a_hook_is_called_and_fails_nowhere(spec: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A day of a bus on which every hook is called."""
    name = spec.__name__
    (code,) = blocks(ROOT / f"docs/hooks/{name}.md", "python")
    module = types.ModuleType("example")
    exec(compile(code, f"{name}.md", "exec"), module.__dict__)
    function, called = getattr(module, name), 0

    @functools.wraps(function)
    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called += 1
        return function(*arguments, **options)

    setattr(module, name, counted)
    plugins = Plugins(discover=False)
    plugins.register(module, "example")
    store = Moody()
    bus = EventBus({"overflow": "drop-oldest"}, store=store, plugins=plugins)
    app = event_app(bus, authorize=None)
    async with bus:
        async with stream(app, "/event?snapshot=true") as response:
            await response.next()
        async with bus.subscribe(limits=Limits(4, 10_000)) as events:
            await anext(events)
            for type in ("session.error", "session.idle", *"abcdefgh"):
                await bus.publish(type, {"sessionID": "ses_1"})
            await anext(events)
        store.failures = 1
        bus.publish_nowait("lost")
        await settle()
    assert called
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    (info,) = (info for info in bus.plugins.info() if info.name == "example")
    assert (info.errors, info.failure) == (0, None)
    assert name in info.hooks


def test_every_setting_is_in_the_quickstart() -> None:
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    for name in Settings.__dataclass_fields__:
        assert f"`{name}`" in text, name


def test_every_control_frame_is_in_the_contract() -> None:
    text = (ROOT / "docs/wire.md").read_text(encoding="utf-8")
    for type in (frames.CONNECTED, frames.HEARTBEAT, frames.EXPIRED, frames.LAGGED, frames.DRAINING):
        assert f"`{type}" in text, type
