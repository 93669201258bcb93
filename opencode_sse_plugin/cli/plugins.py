"""``opencode-sse plugins``: what is installed, what it implements, what failed to load and why."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..bus import EventBus
from ..plugins import PluginInfo, Plugins
from ..settings import Settings

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser("plugins", help="list the installed plugins", description=__doc__)
    command.add_argument("--json", action="store_true", help="one JSON array")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """List the plugins as a bus would load them; 1 if one does not load or a required one is missing."""
    settings = Settings.load()
    loaded = Plugins(disabled=settings.disabled_plugins)
    EventBus(Settings(), plugins=loaded)  # Some fail only when they are asked what they bring.
    infos = loaded.info()
    if options.json:
        print(json.dumps([info.to_dict() for info in infos], indent=2))
    elif not infos:
        print("no plugin is installed; a plugin is a distribution with an entry point in the group opencode_sse")
    else:
        for info in infos:
            print(_line(info))
    loaded.require(settings.plugins)
    return 1 if any(info.failure is not None for info in infos) else 0


def _line(info: PluginInfo) -> str:
    where = f"{info.distribution} {info.version}" if info.distribution is not None else "no distribution"
    said = f"does not load: {info.failure}" if info.failure is not None else ", ".join(info.hooks)
    return f"{info.name} ({where}): {said}"
