"""``opencode-sse serve``: a stand-alone event stream; what others publish by ``POST /event``, its clients read."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ..app import event_app
from ..bus import EventBus
from ..errors import ConfigurationError, SSEPluginError
from ..security import BasicPassword, LoopbackGuard, is_loopback
from ..settings import Settings
from ..signals import chained_signals
from . import demo, logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

logger = logging.getLogger("opencode_sse")

PASSWORD = "OPENCODE_SERVER_PASSWORD"
USERNAME = "OPENCODE_SERVER_USERNAME"


def add(commands: Commands) -> None:
    """Put the command on the command line."""
    command = commands.add_parser(
        "serve",
        help="run a stand-alone event stream",
        description=__doc__,
        epilog=f"A password is taken from {PASSWORD} (user name: {USERNAME}, opencode). All else that has no option is "
        "set by environment, OPENCODE_SSE_…",
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    command.add_argument("--port", type=int, default=4096, help="port, 0 for a free one (%(default)s)")
    command.add_argument("--store", metavar="URL", help=f"event store ({state_file()})")
    command.add_argument("--overflow", metavar="NAME", help="overflow policy, such as drop-oldest")
    command.add_argument("--queue-max", type=int, metavar="N", help="events a live subscriber may be behind")
    command.add_argument("--queue-max-bytes", type=int, metavar="N", help="bytes a live subscriber may be behind")
    command.add_argument("--retain-events", type=int, metavar="N", help="events the store keeps")
    command.add_argument("--retain-bytes", type=int, metavar="N", help="bytes the store keeps")
    command.add_argument("--retain-age", type=float, metavar="S", help="seconds the store keeps an event, inf for ever")
    command.add_argument("--heartbeat", type=float, metavar="S", help="seconds without a frame before a heartbeat")
    command.add_argument("--write-timeout", type=float, metavar="S", help="seconds a blocked subscriber is kept")
    command.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="serve this Host, too")
    command.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="let this page in, too")
    command.add_argument("--demo", action="store_true", help="publish a recorded opencode trace for ever")
    command.add_argument("--demo-rate", type=float, default=1.0, metavar="X", help="its speed (%(default)s)")
    command.add_argument("--demo-file", type=Path, metavar="F", help="another trace, JSON Lines (implies --demo)")
    command.add_argument("--json-logs", action="store_true", help="log JSON lines")
    command.set_defaults(run=run)


_SETTINGS = (
    "store",
    "overflow",
    "queue_max",
    "queue_max_bytes",
    "retain_events",
    "retain_bytes",
    "retain_age",
    "heartbeat",
    "write_timeout",
)


def state_file() -> Path:
    """Where the log of this user is kept, if nothing else is said."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~")
    if not state.is_absolute():
        state = Path("~/.local/state").expanduser()
    return state / "opencode-sse" / "events.db"


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then drain.

    :raises ConfigurationError: before anything is opened. :raises OSError: if the address cannot be had.
    """
    if find_spec("uvicorn") is None:
        raise SSEPluginError("serve needs uvicorn: pip install 'opencode-sse-plugin[serve]'")
    password = os.environ.get(PASSWORD, "")
    if not is_loopback(options.host) and not password:
        raise ConfigurationError(
            f"--host {options.host} lets other machines in; set {PASSWORD}, or listen on 127.0.0.1"
        )
    if not options.demo_rate > 0:
        raise ConfigurationError(f"--demo-rate must be more than 0, not {options.demo_rate}")
    trace = None
    if options.demo or options.demo_file is not None:
        trace = demo.read_trace(options.demo_file or demo.shipped())
    logs.set_up(as_json=options.json_logs)
    default = f"sqlite:///{quote(str(state_file()))}"
    bus = EventBus({name: getattr(options, name) for name in _SETTINGS}, defaults=Settings(store=default))
    if bus.settings.store == default:
        state_file().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = _listen(options.host, options.port, bus.settings.write_timeout)
    with listener:
        anyio.run(
            _serve,
            bus,
            listener,
            _app(bus, options, password),
            trace,
            options,
            backend_options={"use_uvloop": find_spec("uvloop") is not None},
        )
    return 0


def _listen(host: str, port: int, write_timeout: float) -> socket.socket:
    """Our own listening socket: a reader that never reads can be dropped by the kernel alone, whatever the server."""
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"--port must be 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigurationError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout * 1000))
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; --port 0 takes a free one") from error
    return listener


def _app(bus: EventBus, options: argparse.Namespace, password: str) -> ASGIApp:
    authorize = BasicPassword(password, os.environ.get(USERNAME) or "opencode") if password else None
    events = event_app(bus, authorize=authorize, publish=True, origins=options.allow_origin)
    served = CORSMiddleware(
        events.answer,
        allow_origins=options.allow_origin,
        allow_origin_regex=r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?",
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
    )
    hosts = [options.host, *options.allow_host]
    return LoopbackGuard(served, hosts=hosts, origins=options.allow_origin, addresses=not is_loopback(options.host))


async def _serve(
    bus: EventBus,
    listener: socket.socket,
    app: ASGIApp,
    trace: list[demo.Recorded] | None,
    options: argparse.Namespace,
) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Drains before it waits for its streams, which would not end by themselves."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _say(bus, listener, options)

        async def main_loop(self) -> None:
            with chained_signals(bus.drain_soon):
                await super().main_loop()

    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    with _signals_end_well():
        async with bus, anyio.create_task_group() as tasks:
            if trace is not None:
                tasks.start_soon(demo.play, bus, trace, options.demo_rate)
            await Server(config).serve(sockets=[listener])
            await bus.drain()
            tasks.cancel_scope.cancel()


@contextmanager
def _signals_end_well() -> Iterator[None]:
    """uvicorn raises the signal it got again once it is done; having been asked to stop is no failure."""
    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(bus: EventBus, listener: socket.socket, options: argparse.Namespace) -> None:
    """What to try next."""
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}"
    if options.json_logs:
        fields = {"url": url, "pid": os.getpid(), "store": bus.store.kind, "overflow": bus.settings.overflow}
        logger.info("listening", extra={"fields": fields})
        return
    user = f"-u {os.environ.get(USERNAME) or 'opencode'} " if os.environ.get(PASSWORD) else ""
    where = f" {path}" if (path := getattr(bus.store, "path", None)) is not None else ""
    what = f"{bus.store.kind} store{where}, overflow policy {bus.settings.overflow}"
    print(
        f"opencode-sse {version('opencode-sse-plugin')} on {url} ({what})\n"
        f"  watch    curl -N {user}{url}/event\n"
        f"  replay   curl -N {user}'{url}/event?after_seq=0'\n"
        f"  resume   curl -N {user}-H 'Last-Event-ID: {bus.epoch}:{bus.head}' {url}/event\n"
        f"  publish  curl {user}-H 'Content-Type: application/json' "
        f'-d \'{{"type":"hello","properties":{{}}}}\' {url}/event\n'
        f"  status   curl {user}{url}/event/status\n"
        f"Ctrl-C stops it.",
        flush=True,
    )
