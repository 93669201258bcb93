"""What is shipped: the wheels of the package and of every example plugin, built and used from a clean environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from opencode_sse_plugin.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in ROOT.glob("hooks/*/pyproject.toml"))
#: What ``opencode-sse new`` writes, to be built and found as the examples are.
GENERATED = (("policy", "keep-todos"), ("store", "jsonl"))

_USE = """
import anyio
from opencode_sse_plugin import EventBus, Limits

async def main():
    async with EventBus({"overflow": "keep-questions"}) as bus, bus.subscribe(limits=Limits(2, 10_000)) as events:
        await anext(events)
        for type in ["text"] * 5 + ["question.asked"]:
            await bus.publish(type, {})
            await anyio.sleep(0)
        async for delivery in events:
            print(delivery.event.type)
            if delivery.event.type == "question.asked":
                break

anyio.run(main)
"""


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def run(*command: str | Path, **environ: str) -> str:
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env={**os.environ, **environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    written = tmp_path_factory.mktemp("written")
    for kind, name in GENERATED:
        assert main(["new", kind, name, "--into", str(written)]) == 0
    for project in (ROOT, *EXAMPLES, *written.iterdir()):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project)
    return folder


@pytest.fixture(scope="module")
def environment(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheels and what they depend on, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run(folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *wheels.glob("*.whl"))
    return folder / "bin"


def test_the_wheel_holds_what_it_needs(wheels: Path) -> None:
    names = zipfile.ZipFile(next(wheels.glob("opencode_sse_plugin-*.whl"))).namelist()
    for wanted in (
        "opencode_sse_plugin/py.typed",
        "opencode_sse_plugin/cli/trace.jsonl.xz",
        "opencode_sse_plugin/cli/templates/pyproject.toml.txt",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("opencode_sse_plugin")]


def test_the_core_depends_on_three_packages(environment: Path) -> None:
    shown = json.loads(run(environment / "python", "-m", "pip", "list", "--format", "json"))
    installed = {package["name"].lower().replace("_", "-") for package in shown}
    theirs = {re.split("[^a-z-]", name)[0] for example in EXAMPLES for name in project(example)["dependencies"]}
    ours = {path.name for path in EXAMPLES} | {
        "opencode-sse-plugin",
        *(f"opencode-sse-{name}" for _, name in GENERATED),
    }
    extra = installed - ours - theirs - {"pip", "setuptools"}
    assert extra <= {"anyio", "idna", "pluggy", "starlette", "typing-extensions"}


def test_every_example_is_found(environment: Path) -> None:
    found = {
        plugin["distribution"]: plugin for plugin in json.loads(run(environment / "opencode-sse", "plugins", "--json"))
    }
    for example in EXAMPLES:
        assert found[example.name]["failure"] is None
        assert found[example.name]["hooks"]
        assert found[example.name]["version"]
    for kind, name in GENERATED:
        written = found[f"opencode-sse-{name}"]
        assert written["failure"] is None
        assert written["hooks"] == [
            "sse_register_overflow_policies" if kind == "policy" else "sse_register_event_stores"
        ]


def test_what_new_writes_has_to_be_found_where_it_was_installed(environment: Path, tmp_path: Path) -> None:
    """A second one of the name would be refused there, and is not written."""
    done = subprocess.run(
        [environment / "opencode-sse", "new", "store", "jsonl"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "there is a store 'jsonl' already" in done.stderr
    run(environment / "opencode-sse", "new", "policy", "other", "--into", tmp_path)
    assert (tmp_path / "opencode-sse-other" / "opencode_sse_other.py").exists()


def test_an_installed_policy_is_chosen_by_its_name(environment: Path) -> None:
    """With all the other plugins beside it."""
    said = run(environment / "python", "-c", _USE, OPENCODE_SSE_ACL_SECRETS="only for this test").split()
    assert said[-2:] == ["server.stream.lagged", "question.asked"]
    assert "text" not in said


def test_serve_names_the_extra_it_needs(environment: Path) -> None:
    done = subprocess.run(
        [environment / "opencode-sse", "serve", "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "pip install 'opencode-sse-plugin[serve]'" in done.stderr
