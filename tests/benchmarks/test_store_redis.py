"""The benchmark of appends to Valkey is tested, so that it does not rot between two measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent / "servers/store_redis.py"


def test_it_measures_ours_and_a_bare_script_with_the_same_batches() -> None:
    command = [sys.executable, str(PROGRAM), "--rounds", "1", "--seconds", "0.05", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["1", "10", "100"]
    assert round(found["1"]["batch"][0]) == 1
    assert found["100"]["batch"][0] > found["10"]["batch"][0] > 5, "what waits goes into one call"
    assert all(row["bus"][0] > 0 and row["ours"][0] > 0 and row["bare"][0] > 0 for row in found.values())
