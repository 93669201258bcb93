"""``opencode-sse store``: look at an event log, check it, copy it out of a store and into one, make it smaller.

Any store will do that this package or a plugin registers; what one cannot do is said. Only ``import`` and ``prune``
write; ``info``, ``verify`` and ``export`` leave a log as it is, and all may be used while servers have it open.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import anyio

from ..bus import EventBus
from ..errors import ConfigurationError, StoreUnavailable
from ..stores import Bounds, EventStore, Evicted, Measured, Prunable
from ..stores.verifying import PAGE_BYTES, PAGE_EVENTS, Nobody, Progress, faults, reading
from .importing import bring_in, opened_lines
from .lines import line_of

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

_SHOWN: Final = 100
_RETENTION: Final = ("retain_events", "retain_bytes", "retain_age")


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser("store", help="look at an event log, check, copy, prune it", description=__doc__)
    actions = command.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], Awaitable[int]], help: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help, description=run.__doc__)
        parser.add_argument("url", metavar="URL", help="the event store, such as sqlite:///events.db")
        parser.set_defaults(run=lambda options: anyio.run(run, options))
        return parser

    info = action("info", _info, "what it holds")
    verify = action("verify", _verify, "whether all is there and can be read")
    export = action("export", _export, "its events, one JSON object a line")
    export.add_argument(
        "--output", type=Path, metavar="FILE", help="write there, whole or not at all (standard output)"
    )
    bring = action("import", _import, "put exported events into it")
    bring.add_argument("file", metavar="FILE", nargs="?", type=Path, help="what was exported (standard input)")
    bring.add_argument("--from-line", type=int, default=1, metavar="N", help="leave out the lines before this one")
    prune = action("prune", _prune, "delete what is not to be kept")
    prune.add_argument("--retain-events", type=int, metavar="N", help="events to keep")
    prune.add_argument("--retain-bytes", type=int, metavar="N", help="bytes to keep")
    prune.add_argument("--retain-age", type=float, metavar="S", help="seconds to keep an event, inf for ever")
    for parser in (info, verify, bring, prune):
        parser.add_argument("--json", action="store_true", help="one JSON object")


async def _info(options: argparse.Namespace) -> int:
    """What a log holds: its bounds, the chain of its epochs, what is kept."""
    store = _bus(options).store
    async with reading(store):
        bounds = await store.bounds()
        held = store.statistics() if isinstance(store, Measured) else {}
    found = {
        "kind": store.kind,
        "epoch": bounds.epoch,
        "oldest": bounds.oldest,
        "latest": bounds.latest,
        "events": bounds.latest - bounds.oldest + 1,
        **held,
        "epochs": [link._asdict() for link in bounds.epochs],
        "retention": store.retention._asdict(),
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    chain = ", ".join(f"{link.epoch} after {link.began}" for link in bounds.epochs)
    keep = store.retention
    kept = f"{keep.events} events, {keep.bytes} bytes, {'any age' if keep.age is None else f'{keep.age:g} s'}"
    for name, value in {**found, "epochs": chain, "retention": kept}.items():
        print(f"{name:10} {value}")
    return 0


async def _verify(options: argparse.Namespace) -> int:
    """Read everything in a log. Exit code 1 if an event is missing, cannot be read, or is not what the log says."""
    store = _bus(options).store
    found = []
    checked = 0
    with _progress("checked") as shown:

        def told(done: int, total: int) -> None:
            nonlocal checked
            checked = total
            shown(done, total)

        async with aclosing(faults(store, told)) as looking:
            async for fault in looking:
                found.append(fault)
                if len(found) == _SHOWN:
                    break
    if options.json:
        what = {"kind": store.kind, "events": checked, "faults": [fault._asdict() for fault in found]}
        print(json.dumps(what, indent=2))
    else:
        for fault in found:
            print(fault)
        if len(found) == _SHOWN:
            print(f"stopped after {_SHOWN} faults")
        if not found:
            print(f"{checked} events, nothing wrong")
    return 1 if found else 0


async def _export(options: argparse.Namespace) -> int:
    """Write all events up to the newest one there is now, one JSON object a line, as `store import` takes them."""
    store = _bus(options).store
    with _progress("exported") as told, _output(options.output) as file:
        async with reading(store):
            bounds = await store.bounds()
            try:
                async for lines in _pages(store, bounds, told):
                    file.write(lines)
                file.flush()
            except BrokenPipeError:
                # Whoever read has enough. What is left in our buffer must not complain when Python ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
    if options.output is not None:
        print(f"exported {bounds.latest - bounds.oldest + 1} events to {options.output}")
    return 0


async def _pages(store: EventStore, bounds: Bounds, told: Progress) -> AsyncGenerator[bytes]:
    """All lines, a page at a time. :raises StoreUnavailable: if some of it is gone before it was read."""
    begin = position = bounds.oldest - 1
    while position < bounds.latest:
        page = await store.read(position, min(PAGE_EVENTS, bounds.latest - position), PAGE_BYTES)
        if isinstance(page, Evicted) or not page.events:
            raise StoreUnavailable(
                f"event {position + 1} went while the log was exported (retention, or damage that `store verify` finds)"
            )
        yield b"".join(map(line_of, page.events))
        position = page.last
        told(position - begin, bounds.latest - begin)
    end = (await store.bounds()).end_of(bounds.epoch)
    if end is None or end < bounds.latest:
        raise StoreUnavailable("history was lost or replaced while the log was exported")


async def _import(options: argparse.Namespace) -> int:
    """Append exported events under a new epoch, with new numbers. All lines are checked before the first is stored;
    events that are known are not stored again; `sse_event_publish` plugins look at each as at any other."""
    if options.from_line < 1:
        raise ConfigurationError(f"--from-line must be at least 1, not {options.from_line}")
    bus = _bus(options)
    with opened_lines(options.file) as lines, _progress("imported") as told:
        done = await bring_in(bus, lines, options.from_line, told)
    if options.json:
        print(json.dumps(done._asdict(), indent=2))
        return 0
    where = f" as {done.first} to {done.last}, epoch {done.epoch}" if done.imported else ""
    print(f"imported {done.imported} events{where}")
    if done.duplicates:
        print(f"{done.duplicates} were known already")
    if done.dropped:
        print(f"{done.dropped} were dropped by a plugin")
    return 0


async def _prune(options: argparse.Namespace) -> int:
    """Delete now what is beyond retention, in small steps, beside whoever uses the log."""
    store = _bus(options, {name: getattr(options, name) for name in _RETENTION}).store
    if not isinstance(store, Prunable):
        raise ConfigurationError(f"a {store.kind} store keeps to its retention by itself; there is nothing to prune")
    async with reading(store):
        before = await store.bounds()
    await store.open(Nobody())
    try:
        with _progress("looking for what is to go; oldest is event") as told:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, store, told)
                await store.prune()
                group.cancel_scope.cancel()
        after = await store.bounds()
    finally:
        with anyio.CancelScope(shield=True):
            await store.close()
    deleted = after.oldest - before.oldest
    if options.json:
        print(json.dumps({"deleted": deleted, "oldest": after.oldest, "latest": after.latest}, indent=2))
    else:
        print(f"deleted {deleted} events; there are {after.latest - after.oldest + 1}, from {after.oldest}")
    return 0


async def _watch(store: EventStore, told: Progress) -> None:
    while True:
        bounds = await store.bounds()
        told(bounds.oldest, bounds.latest)
        await anyio.sleep(0.2)


def _bus(options: argparse.Namespace, settings: dict[str, Any] | None = None) -> EventBus:
    """A bus that is never started: it has the plugins, and the store of the URL."""
    bus = EventBus({"store": options.url, **(settings or {})})
    if bus.store.kind == "memory":
        raise ConfigurationError(
            "memory:// is a log inside of the process that serves it: only its clients can look at it "
            "(GET /event?after_seq=0, /event/status)"
        )
    return bus


@contextmanager
def _output(path: Path | None) -> Iterator[IO[bytes]]:
    """Standard output, or a file that is there once all is written."""
    if path is None:
        yield sys.stdout.buffer
        return
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """How far it is, on a terminal only."""
    shown = 0.0

    def told(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            print(f"\r\033[K{what} {done} of {total}", end="", file=sys.stderr, flush=True)

    try:
        yield told
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
