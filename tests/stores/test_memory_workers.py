"""Several workers over memory stores are several streams, and are told so."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_crash_loop import CLEAN


@pytest.mark.parametrize(("workers", "warnings"), [("1", 0), ("3", 2)])
@pytest.mark.parametrize("store", ["memory://", "sqlite"])
def test_workers_that_share_nothing_are_warned(
    tmp_path: Path, started: list[Callable[[], None]], store: str, workers: str, warnings: int
) -> None:
    """All but the first one that starts; over a shared store none."""
    options = ("--port", "0", "--workers", workers, "--lifespan", "on", "--app-dir", str(Path(__file__).parent))
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *options, "workers:app"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**CLEAN, "STORE": f"sqlite:///{tmp_path / 'a.db'}" if store == "sqlite" else store},
    )
    started.append(process.kill)
    assert process.stderr is not None
    said: list[str] = []
    while sum("Application startup complete" in line for line in said) < int(workers):
        said.append(process.stderr.readline())
        assert said[-1], said
    process.terminate()
    said += process.communicate(timeout=60)[1].splitlines()
    found = [line for line in said if re.search(r"several workers .* OPENCODE_SSE_STORE=", line)]
    assert len(found) == (warnings if store == "memory://" else 0)
