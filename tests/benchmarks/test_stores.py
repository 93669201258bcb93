"""The benchmark of stores runs, and what it says of our store and of bare SQLite is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (("appends", "10", "0.2"), {"ours", "bare"}),
        (("pages", "2000", "1"), {"ours", "bare"}),
        (("told", "5"), {"p50", "p99", "max"}),
    ],
)
def test_each_part_answers_with_figures(part: tuple[str, ...], names: set[str]) -> None:
    done = run("servers/store_sqlite.py", *part)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == names
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("store", ["memory://", "sqlite:///", "redis://"])
def test_parts_with_a_server_see_every_event(store: str) -> None:
    pytest.importorskip("uvicorn", reason="pip install uvicorn")
    done = run("servers/store_sqlite.py", "latency", store, "20")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["p50"] > 0
    if store == "sqlite:///":
        done = run("servers/store_sqlite.py", "replay", "5000")
        assert json.loads(done.stdout)["complete"], "a reader counted other events than there are"


def test_an_unknown_part_is_an_error_with_a_message() -> None:
    done = run("stores.py", "--parts", "nothing")
    assert done.returncode == 1
    assert "there is no nothing" in done.stderr
