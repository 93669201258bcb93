"""``opencode-sse bench``: attach many subscribers to an event stream, and say what they get.

Works against any endpoint that speaks Server-Sent Events. With ``--publish`` it also posts events (to the same path, as
``POST /event`` takes them) and says how long they take to reach the subscribers. It reads as fast as one Python process
can: where it is at its limit, ``busy`` says so, and the server may be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
from typing import TYPE_CHECKING, Any

import anyio

from ..errors import ConfigurationError
from .measuring import Bench
from .reading import CannotRead, Endpoint

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser(
        "bench", help="measure an event stream as its subscribers see it", description=__doc__
    )
    command.add_argument("url", metavar="URL", help="of the stream; /event if it has no path")
    command.add_argument("--subscribers", type=int, default=100, metavar="N", help="how many attach (%(default)s)")
    command.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="how long, once attached (%(default)s)"
    )
    command.add_argument("--publish", type=float, metavar="RATE", help="post so many events a second meanwhile")
    command.add_argument("--size", type=int, default=300, metavar="BYTES", help="of such an event (%(default)s)")
    command.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="send this too")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure; 1 if the stream cannot be read.

    :raises ConfigurationError: for a command line that makes no sense. :raises CannotRead: if there is no stream.
    """
    if options.subscribers < 1 or options.seconds <= 0:
        raise ConfigurationError("--subscribers must be at least 1, --seconds more than 0")
    if options.publish is not None and options.publish <= 0:
        raise ConfigurationError("--publish must be more than 0")
    headers = dict(_header(text) for text in options.header)
    user, password = (os.environ.get(f"OPENCODE_SERVER_{name}", "") for name in ("USERNAME", "PASSWORD"))
    endpoint = Endpoint.parse(options.url, headers, user or "opencode", password)
    _raise_file_limit(options.subscribers + 50)
    bench = Bench(endpoint, options.subscribers, options.seconds, options.publish, options.size, _progress)
    try:
        anyio.run(bench.run)
    except BaseExceptionGroup as group:
        found = [error for error in _flat(group) if isinstance(error, CannotRead | KeyboardInterrupt)]
        raise (found[0] if found else group) from None
    finally:
        _progress("")
    result = bench.result()
    print(json.dumps(result) if options.json else _text(result))
    return 0


def _flat(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_flat(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\r\n\0]", value):
        raise ConfigurationError(f"--header takes 'NAME: VALUE', not {text!r}")
    return name, value.strip()


def _raise_file_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigurationError(f"{needed} open files are needed and the limit is {hard}: ulimit -Hn {needed}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['subscribers']} subscribers, {result['seconds']:g} s",
        f"  {result['events']:,} events, {result['events_per_second']:,.0f} a second, "
        f"{result['megabytes_per_second']:,.1f} MB a second",
    ]
    if result["published"] is not None:
        lines.append(f"  {result['published']:,} published")
    if result["latency_ms"] is not None:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in result["latency_ms"].items())
        lines.append(f"  latency in ms: {shown}")
    if result["cursors"]:
        lines.append(
            f"  by cursor, of {result['looked_at']}: {result['gaps']} gaps, {result['missing']} events missing, "
            f"{result['repeated']} repeated (a filter leaves gaps too); {result['lagged']} losses told"
        )
    else:
        lines.append("  no cursors: the stream has no numbered id:, so gaps cannot be seen")
    lines.append(
        f"  {result['reconnects']} reconnects ({result['clean_ends']} clean ends, {result['aborts']} aborts, "
        f"{result['refused']} refused)"
    )
    if result["busy"] > 0.9:
        lines.append(f"  this program was busy for {result['busy']:.0%} of the time: the server may be faster")
    return "\n".join(lines)
