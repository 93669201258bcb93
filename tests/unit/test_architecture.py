"""What the layout promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_imports_run_in_one_direction() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_core_imports_nothing_but_its_three_dependencies() -> None:
    """Extras are imported where they are used."""
    program = (
        "import sys, opencode_sse_plugin;"
        "extras = {'uvicorn', 'trio', 'redis', 'pytest', 'fastapi'};"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & extras))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_all_public_names_exist() -> None:
    import opencode_sse_plugin

    for name in opencode_sse_plugin.__all__:
        assert getattr(opencode_sse_plugin, name).__doc__ or name == "NAME" or name in ("Outcome", "DeliveryClass"), (
            name
        )
