"""Handlers in a chain, which may end in any order. What a drain by signal gives its clients: tests/hosts."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from opencode_sse_plugin.signals import chained_signals

NUMBER = signal.SIGTERM


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What was called, a server's own handler among it; the test's own handler is put back."""
    called: list[str] = []
    before = signal.signal(NUMBER, lambda *_: called.append("server"))
    yield called
    signal.signal(NUMBER, before)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_whoever_ends_first_leaves_the_others_in_place(heard: list[str], order: tuple[str, ...]) -> None:
    async def live() -> None:
        servers = signal.getsignal(NUMBER)
        chains = {name: chained_signals(lambda name=name: heard.append(name)) for name in "abc"}
        for name in "abc":
            chains[name].__enter__()
        left = ["c", "b", "a"]
        for name in order:
            signal.raise_signal(NUMBER)
            await asyncio.sleep(0)
            assert heard == ["server", *left]
            heard.clear()
            chains[name].__exit__(None, None, None)
            left.remove(name)
        assert signal.getsignal(NUMBER) is servers

    asyncio.run(live())


def test_one_that_has_ended_under_another_holds_no_event_loop(heard: list[str]) -> None:
    async def begin() -> None:
        early = chained_signals(lambda: heard.append("early"))
        early.__enter__()
        # A server that takes over and hands back what it found, after the loop is gone.
        found.append(signal.getsignal(NUMBER))
        early.__exit__(None, None, None)

    found: list[signal.Handlers] = []
    asyncio.run(begin())
    signal.signal(NUMBER, found[0])
    signal.raise_signal(NUMBER)
    assert heard == ["server"]


def test_a_signal_that_is_ignored_is_left_alone(heard: list[str]) -> None:
    async def live() -> None:
        with chained_signals(lambda: None):
            assert signal.getsignal(NUMBER) is signal.SIG_IGN

    signal.signal(NUMBER, signal.SIG_IGN)
    asyncio.run(live())


UNHANDLED = """
import asyncio, signal, sys
from opencode_sse_plugin.signals import chained_signals

def callback(then=None):
    print("called", flush=True)
    for _ in range(int(sys.argv[1])):
        signal.raise_signal(signal.SIGTERM)
    assert then is not None
    print("done", flush=True)
    then()

async def live():
    with chained_signals(callback):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(10)
        print("alive")

asyncio.run(live())
"""


@pytest.mark.parametrize(("again", "said"), [(0, "called\ndone\n"), (1, "called\n")])
def test_a_signal_that_nobody_handles_kills_when_all_is_done_and_the_second_at_once(again: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", UNHANDLED, str(again)], stdout=subprocess.PIPE, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, said)


def test_one_that_nobody_handled_is_so_again_afterwards(heard: list[str]) -> None:
    async def live() -> None:
        with chained_signals(lambda then=None: None):
            assert signal.getsignal(NUMBER) is not signal.SIG_DFL

    signal.signal(NUMBER, signal.SIG_DFL)
    asyncio.run(live())
    assert signal.getsignal(NUMBER) is signal.SIG_DFL


def test_another_thread_leaves_signals_alone(heard: list[str]) -> None:
    async def live() -> None:
        with chained_signals(lambda: None):
            seen.append(signal.getsignal(NUMBER))

    seen: list[object] = []
    thread = threading.Thread(target=lambda: asyncio.run(live()))
    before = signal.getsignal(NUMBER)
    thread.start()
    thread.join(5)
    assert seen == [before]
