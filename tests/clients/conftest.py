"""Fixtures that start hosts, proxies and clients, and end them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import pytest

from . import clients, harness
from .harness import Client, HostInThread, HostProcess
from .proxy import Proxy

Closable = TypeVar("Closable", HostInThread, HostProcess, Proxy, Client)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/clients.md from what the clients did")


class _Table:
    """Collects cells from the reports, which come from parallel test processes too."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "cell" and report.when == "call" and report.passed:
                client, situation, cell = value  # type: ignore[misc]
                self.cells[client, situation] = cell

    def pytest_sessionfinish(self) -> None:
        clients.DOCUMENT.write_text(clients.table(self.cells))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("write_table", False) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Table())


@pytest.fixture(scope="session")
def node_packages() -> None:
    """The npm clients are installed."""
    harness.install_node_packages()


@pytest.fixture
def opened() -> Iterator[Callable[[Closable], Closable]]:
    """Closes what a test opened, last first."""
    with ExitStack() as stack:
        yield lambda thing: stack.enter_context(closing(thing))


@pytest.fixture
def start_host(opened: Callable[[HostInThread], HostInThread]) -> Callable[..., HostInThread]:
    """Start a host in a thread; takes settings."""
    return lambda **settings: opened(HostInThread(**{"retry": 50, **settings}))


@pytest.fixture
def start_host_process(opened: Callable[[HostProcess], HostProcess]) -> Callable[..., HostProcess]:
    """Start a host in a process; takes settings."""
    return lambda **settings: opened(HostProcess(**{"retry": 50, **settings}))


@pytest.fixture
def start_proxy(opened: Callable[[Proxy], Proxy]) -> Callable[[int], Proxy]:
    """Start a relay to a port."""
    return lambda port: opened(Proxy(port))


@pytest.fixture
def start_client(opened: Callable[[Client], Client], node_packages: None) -> Callable[..., Client]:
    """Start a client program; parameters as of :func:`harness.command`."""

    def start(*arguments: Any, **options: Any) -> Client:
        return opened(Client(harness.command(*arguments, **options)))

    return start
