"""What the harness needs of the machine: a C compiler, two cores, open files, and the books of the operating system."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
BUILD: Final = HERE / ".build"


class CannotRun(Exception):
    """Something is missing; the message says what, and what to do."""


def compile_all() -> None:
    """Build the C programs where they are older than their source.

    :raises CannotRun: without a C compiler, or with one that fails.
    """
    for name in ("load", "loop"):
        source, target = HERE / f"{name}.c", BUILD / name
        if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
            continue
        compiler = shutil.which("cc")
        if compiler is None:
            raise CannotRun("a C compiler is needed for the load client: apt-get install gcc libc6-dev")
        BUILD.mkdir(exist_ok=True)
        # Under another name first: two runs at once must not see half a program.
        unfinished = BUILD / f"{name}.{os.getpid()}"
        command = [compiler, "-O3", "-std=gnu11", "-Wall", "-Wextra", "-o", str(unfinished), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotRun(f"{source.name} does not compile (apt-get install gcc libc6-dev?):\n{done.stderr}")
        unfinished.replace(target)


@cache
def two_cores() -> tuple[int | None, int | None]:
    """One core for the server and one for everything else; ``None`` where there is only one.

    Remembered from the first call, before this process keeps to one of them.
    """
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def raise_file_limit(needed: int) -> str | None:
    """Let this process and its children have so many open files.

    :return: a complaint if they cannot.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return None
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return None
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return f"{needed} open files are needed, the limit is {hard}: ulimit -Hn {needed} as root, or LimitNOFILE="


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that processes have used, by the operating system."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError, FileNotFoundError):  # A thread that has just ended.
                # In nanoseconds; /proc/PID/stat has hundredths, which is 2 us an event where few are published.
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory that processes hold."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * resource.getpagesize()


@cache
def description() -> str:
    """The machine, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), os.uname().machine)
    return f"{model}, {len(os.sched_getaffinity(0))} cores usable, {os.uname().sysname} {os.uname().release}"


def stolen() -> tuple[int, int]:
    """Ticks that other guests of the same host took from this one, and all ticks, since the start."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks)
