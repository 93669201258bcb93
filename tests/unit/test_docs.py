"""The documentation says what is there: its code runs, its commands exist, every hook has its signature."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from opencode_sse_plugin import Settings, frames
from opencode_sse_plugin.cli import parser
from opencode_sse_plugin.hookspecs import SPECS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("hooks/**/README.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
#: The commands that example plugins bring.
SCRIPTS = {
    name
    for path in ROOT.glob("hooks/*/pyproject.toml")
    for name in tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("scripts", ())
}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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
    if code:
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
            assert words[0] in (*SCRIPTS, "curl", "pip", "cd", "pytest", "uvicorn", "apt-get", "npm", "nginx"), words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_every_hook_has_a_heading_with_its_exact_signature(spec: object) -> None:
    assert callable(spec)
    signature = str(inspect.signature(spec)).replace("'", "")
    headings = (ROOT / "docs/hooks.md").read_text(encoding="utf-8").splitlines()
    assert f"## `{spec.__name__}{signature}`" in headings  # type: ignore[attr-defined]


def test_no_heading_for_a_hook_that_is_not_there() -> None:
    headings = re.findall(r"^## `(sse_\w+)", (ROOT / "docs/hooks.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [spec.__name__ for spec in SPECS]


def test_every_setting_is_in_the_quickstart() -> None:
    text = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    for name in Settings.__dataclass_fields__:
        assert f"`{name}`" in text, name


def test_every_control_frame_is_in_the_contract() -> None:
    text = (ROOT / "docs/wire.md").read_text(encoding="utf-8")
    for type in (frames.CONNECTED, frames.HEARTBEAT, frames.EXPIRED, frames.LAGGED, frames.DRAINING):
        assert f"`{type}" in text, type
