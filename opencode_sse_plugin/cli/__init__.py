"""``opencode-sse``: the package on the command line. One module a command.

Exit codes: 0 it did what was asked, 1 it could not, 2 the command line or a setting makes no sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import ConfigurationError, SSEPluginError
from . import bench, new, plugins, serve, store

_COMMANDS = (serve, store, plugins, new, bench)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="opencode-sse", description="An event stream that survives slow, gone and returning clients."
    )
    whole.add_argument("--version", action="version", version=f"opencode-sse {version('opencode-sse-plugin')}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    :return: the exit code.
    """
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except ConfigurationError as error:
        print(f"opencode-sse: {error}", file=sys.stderr)
        return 2
    except SSEPluginError as error:
        print(f"opencode-sse: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        said = error if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"opencode-sse: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code
