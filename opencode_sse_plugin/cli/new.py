"""``opencode-sse new``: a ready distribution with a policy or a store of your own, whose tests pass at once."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

from ..bus import EventBus
from ..errors import ConfigurationError
from ..plugins import Plugins
from ..settings import Settings

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", re.ASCII)
#: Longer ones make no name of a class that anybody would want to read.
_NAME_MAX: Final = 30


@dataclass(frozen=True, slots=True)
class Kind:
    """What can be written: ``templates/NAME.*``, and how it is spoken of."""

    name: str
    suffix: str
    summary: str
    setting: str


KINDS: Final = (
    Kind("policy", "", "An overflow policy for opencode-sse-plugin", "OPENCODE_SSE_OVERFLOW={name}"),
    Kind("store", "Store", "An event store for opencode-sse-plugin", "OPENCODE_SSE_STORE={name}://events.log"),
)


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser("new", help="write a plugin of your own to start from", description=__doc__)
    kinds = command.add_subparsers(metavar="KIND", required=True)
    for kind in KINDS:
        one = kinds.add_parser(kind.name, help=kind.summary, description=f"{kind.summary}, as a distribution.")
        one.add_argument("name", metavar="NAME", help="as operators will write it: letters, digits, single -")
        one.add_argument("--into", metavar="FOLDER", type=Path, default=Path(), help="where it is written (here)")
        one.set_defaults(run=run, kind=kind)


def run(options: argparse.Namespace) -> int:
    """Write it and say what to do next."""
    kind: Kind = options.kind
    folder = write(kind, options.name, options.into)
    print(f"wrote {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    print(f"\n  cd {folder}\n  pip install -e '.[test]'\n  pytest")
    print(f"  {kind.setting.format(name=options.name)} opencode-sse serve")
    return 0


def write(kind: Kind, name: str, into: Path) -> Path:
    """Write a distribution into a folder: all of it or nothing.

    :return: its own folder. :raises ConfigurationError: for a name that cannot be one, or a folder that exists.
    """
    _check(kind, name)
    distribution = f"opencode-sse-{name}"
    target = into / distribution
    if target.exists() or target.is_symlink():
        raise ConfigurationError(f"{target} exists already; nothing was written")
    if not into.is_dir():
        raise ConfigurationError(f"{into} is not a folder; nothing was written")
    module = distribution.replace("-", "_")
    words = {
        "name": name,
        "distribution": distribution,
        "module": module,
        "cls": "".join(word.capitalize() for word in name.split("-")) + kind.suffix,
        "summary": kind.summary,
    }
    made = {
        "pyproject.toml": "pyproject.toml",
        "README.md": f"{kind.name}.md",
        f"{module}.py": f"{kind.name}.py",
        f"test_{module}.py": f"{kind.name}_test.py",
    }
    # Under its name only once it is whole.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{distribution}-", dir=into))
    try:
        for path, template in made.items():
            text = (files(__package__) / "templates" / f"{template}.txt").read_text(encoding="utf-8")
            (unfinished / path).write_text(Template(text).substitute(words), encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _check(kind: Kind, name: str) -> None:
    """Refuse a name that is none or is taken, by what ships or what is installed here."""
    if _NAME.fullmatch(name) is None or len(name) > _NAME_MAX:
        raise ConfigurationError(
            f"{kind.name} name {name!r}: up to {_NAME_MAX} small letters, digits and single -, beginning with a letter"
        )
    bus = EventBus(Settings(), plugins=Plugins())
    taken = bus.policies.names() if kind.name == "policy" else bus.stores.schemes()
    if name in taken:
        raise ConfigurationError(f"there is a {kind.name} {name!r} already, beside {', '.join(taken)}")
    if name == "plugin":
        raise ConfigurationError(f"{kind.name} name 'plugin': opencode-sse-plugin is the package itself")
