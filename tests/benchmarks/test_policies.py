"""The benchmark of the policies measures what it says: everybody overflows in each burst, and the accounts balance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "policies.py"


def test_every_policy_acts_on_every_burst(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    policies = "disconnect,drop-newest,coalesce,catch-up,block?timeout=1ms&then=coalesce"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--rounds", "1", "--readers", "2", "--policies", policies, "--json", figures],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    none, *others = json.loads(figures.read_text(encoding="utf-8"))
    events = none["frames"] - 1  # and `server.connected`
    assert (none["policy"], none["overflows"], none["dropped"], events) == ("none", 0, 0, 6253)
    assert [row["policy"] for row in others] == policies.split(",")
    assert {row["overflows"] for row in others} == {3}
    rows = {row["policy"]: row for row in others}
    assert rows["catch-up"]["frames"] == events + 1
    assert rows["disconnect"]["frames"] == events + 1 + 2 * 3  # an announcement and a heartbeat for each
    for name in ("coalesce", "block?timeout=1ms&then=coalesce"):
        assert rows[name]["frames"] + rows[name]["merged"] == events + 1
        assert rows[name]["frames"] < events / 4
    assert rows["drop-newest"]["frames"] + rows["drop-newest"]["dropped"] == events + 1 + 3
    assert "times fewer" in done.stdout
