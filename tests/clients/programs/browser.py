"""Where a Chromium is: the one from npm, or the system's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_UNPACKED = Path(__file__).parents[1] / "node_modules" / ".chromium"


def find() -> tuple[str, dict[str, str]] | None:
    """The program and its environment."""
    if _UNPACKED.exists():
        return str(_UNPACKED / "chromium"), {**os.environ, "LD_LIBRARY_PATH": str(_UNPACKED / "lib")}
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    return None if program is None else (program, dict(os.environ))


def version() -> str:
    """Its version; nothing where there is none."""
    found = find()
    if found is None:
        return ""
    program, environment = found
    command = [program, "--no-sandbox", "--version"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout.split()[-1]
