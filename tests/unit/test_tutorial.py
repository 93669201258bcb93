"""The tutorial, typed in: its files are written, its commands run, and what they print is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/tutorial-policy.md"
_BLOCK = re.compile(r"^```(\w+)( fails)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment(folder: Path) -> dict[str, str]:
    """One that has the package and what its tests need, and into which more can be installed; without a network."""
    venv.create(folder, with_pip=True)
    ours = sysconfig.get_path("purelib")
    theirs = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(theirs, "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    for name, module, function in (("opencode-sse", "opencode_sse_plugin.cli", "main"), ("pytest", "pytest", "main")):
        program = folder / "bin" / name
        program.write_text(
            f"#!{folder}/bin/python\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        program.chmod(0o755)
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OPENCODE_", "PIP_"))
    }
    return environ | {
        "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        # Of the tests' own plugins; whoever follows the page has none of them.
        "PYTEST_ADDOPTS": "-p no:randomly -p no:asyncio -p no:cacheprovider",
    }


def test_whoever_types_it_in_sees_what_it_says(tmp_path: Path) -> None:
    environ = environment(tmp_path / "environment")
    at = tmp_path / "desk"
    at.mkdir()
    said: str | None = None
    typed = 0
    for language, fails, code in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", code)
            assert name is not None, f"which file is this?\n{code}"
            (at / name[1]).write_text(code, encoding="utf-8")
        elif language == "text":
            assert said is not None, f"nothing was run before\n{code}"
            pattern = re.escape(code.strip()).replace("…", ".*")
            assert re.fullmatch(pattern, said.strip(), re.DOTALL), f"expected\n{code}\ngot\n{said}"
            said = None
        else:
            assert language == "sh"
            if "cd " in code:
                first, _, code = code.partition("\n")
                at /= first.removeprefix("cd ")
            done = subprocess.run(
                ["sh", "-ec", code], cwd=at, env=environ, capture_output=True, text=True, timeout=100, check=False
            )
            assert (done.returncode != 0) == bool(fails), f"{code}\n{done.stdout}{done.stderr}"
            said = done.stdout + done.stderr
            typed += 1
    assert typed > 5
