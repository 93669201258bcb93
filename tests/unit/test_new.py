"""``opencode-sse new``: what it writes is a whole distribution whose tests pass at once, and fail when it is broken."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from opencode_sse_plugin.cli import main

#: As in an environment of somebody who has the package and its extra ``test``.
OPTIONS = ("-q", "-p", "no:randomly", "-p", "no:asyncio", "-p", "no:cacheprovider", "-W", "error")
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OPENCODE_"))}

#: What a hasty author does to it.
BROKEN = {
    "policy": ("return Skip.of(lost)", "return Skip(())"),
    "store": ("else self._known.get(name)", "else None"),
}


def new(kind: str, name: str, into: Path) -> Path:
    assert main(["new", kind, name, "--into", str(into)]) == 0
    return into / f"opencode-sse-{name}"


def run_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *OPTIONS]
    return subprocess.run(command, cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(("kind", "name"), [("policy", "keep-todos"), ("store", "jsonl2")])
def test_what_is_written_passes_its_tests_at_once(
    kind: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new(kind, name, tmp_path)
    module = f"opencode_sse_{name.replace('-', '_')}"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["README.md", f"{module}.py", "pyproject.toml", f"test_{module}.py"]
    )
    assert capsys.readouterr().out.startswith(f"wrote {folder}: README.md")
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["name"], project["entry-points"]["opencode_sse"]) == (folder.name, {name: module})
    done = run_tests(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout

    program = folder / f"{module}.py"
    good, broken = BROKEN[kind]
    assert good in program.read_text(encoding="utf-8")
    program.write_text(program.read_text(encoding="utf-8").replace(good, broken), encoding="utf-8")
    done = run_tests(folder)
    assert done.returncode == 1, done.stdout + done.stderr


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_written_is_clean(kind: str, tmp_path: Path) -> None:
    folder = new(kind, "my-own", tmp_path)
    ruff = [Path(sys.executable).parent / "ruff"]
    for command in (["check", "--select", "E,F,W,I,B,UP,RUF,SIM,PT"], ["format", "--check"]):
        options = [*command, "--isolated", "--no-cache", "--line-length", "120", "."]
        done = subprocess.run([*ruff, *options], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "$" not in text
        assert text.endswith("\n")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("policy", "", "policy name ''"),
        ("policy", "Keep", "small letters, digits and single -, beginning with a letter"),
        ("policy", "2nd", "beginning with a letter"),
        ("policy", "a--b", "single -"),
        ("policy", "a-", "single -"),
        ("policy", "../up", "policy name '../up'"),
        ("policy", "ünder", "small letters"),
        ("policy", "a\n", "small letters"),
        ("policy", "a" * 31, "up to 30"),
        ("policy", "shed", "there is a policy 'shed' already, beside block, catch-up"),
        ("policy", "plugin", "opencode-sse-plugin is the package itself"),
        ("store", "sqlite", "there is a store 'sqlite' already, beside memory"),
        ("store", "my_store", "store name 'my_store'"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(
    kind: str, name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new", kind, name, "--into", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "link that leads nowhere"])
def test_what_is_there_is_not_touched(there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "opencode-sse-mine"
    if there == "folder":
        target.mkdir()
    elif there == "file":
        target.write_text("mine", encoding="utf-8")
    else:
        target.symlink_to("nowhere")
    before = target.lstat()
    assert main(["new", "policy", "mine", "--into", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"opencode-sse: {target} exists already; nothing was written\n"
    assert list(tmp_path.iterdir()) == [target]
    assert target.lstat() == before


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "store", "mine", "--into", str(tmp_path / "no")]) == 2
    assert f"{tmp_path / 'no'} is not a folder" in capsys.readouterr().err


def test_where_writing_fails_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = Path.write_text, 0

    def fails_at_the_third(self: Path, *arguments: str, **options: str) -> int:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fails_at_the_third)
    assert main(["new", "policy", "mine", "--into", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert written == 3
    assert list(tmp_path.iterdir()) == []
