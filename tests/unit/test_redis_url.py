"""What a ``redis://`` URL may say, and that the rest is refused before anything is opened."""

from __future__ import annotations

import sys

import anyio
import pytest

from opencode_sse_plugin import ConfigurationError, EventBus, Settings, StoreUnavailable
from opencode_sse_plugin.plugins import Plugins
from opencode_sse_plugin.stores import DURABLE_RETENTION
from opencode_sse_plugin.stores.redis import open_redis, parse


@pytest.mark.parametrize(
    ("url", "bare", "key", "where"),
    [
        ("redis://host", "redis://host", "opencode-sse", "redis://host"),
        ("redis://host:7000/3?key=a.b-c:d", "redis://host:7000/3", "a.b-c:d", "redis://host:7000/3?key=a.b-c:d"),
        ("redis://me:secret@host", "redis://me:secret@host", "opencode-sse", "redis://host"),
        ("redis://:se%40cret@[::1]:7/0", "redis://:se%40cret@[::1]:7/0", "opencode-sse", "redis://[::1]:7/0"),
        (
            "rediss://host?ssl_ca_certs=%2Fa.pem&key=k",
            "rediss://host?ssl_ca_certs=%2Fa.pem",
            "k",
            "rediss://host?key=k",
        ),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2", "opencode-sse", "unix:///run/redis.sock"),
        ("unix://:secret@/run/r.sock", "unix://:secret@/run/r.sock", "opencode-sse", "unix:///run/r.sock"),
    ],
)
def test_the_url_names_server_and_log(url: str, bare: str, key: str, where: str) -> None:
    assert parse(url) == (bare, key, where)
    assert "cret" not in where
    store = open_redis(url, Settings(publish_deadline=7.0))
    assert (store.key, store.where, store.retention) == (key, where, DURABLE_RETENTION)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://", "redis://HOST:PORT/DATABASE"),
        ("redis:///0", "redis://HOST:PORT/DATABASE"),
        ("redis://host/first", "redis://HOST:PORT/DATABASE"),
        ("redis://host#0", "redis://HOST:PORT/DATABASE"),
        ("redis://host:0", "redis://HOST:PORT/DATABASE"),
        ("redis://host:port", "Port could not be cast"),
        ("redis://host:99999", "out of range"),
        ("unix://", "names no socket"),
        ("unix://run/redis.sock", "names no socket"),
        ("redis://host?keys=a", "there is no parameter 'keys'; redis:// takes key"),
        ("redis://host?ssl_ca_certs=a", "there is no parameter 'ssl_ca_certs'; redis:// takes key"),
        ("rediss://host?timeout=1", "rediss:// takes key, ssl_ca_certs, "),
        ("redis://host?key=", "is no name for a log"),
        ("redis://host?key={a}", "is no name for a log"),
        ("redis://host?key=a%0Ab", "is no name for a log"),
        ("redis://me:secret@host?key=a%20b", r"^redis://host: key='a b'"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        open_redis(url, Settings())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_a_bus_knows_the_schemes(scheme: str) -> None:
    bus = EventBus(
        Settings(store=f"{scheme}:///0" if scheme == "unix" else f"{scheme}://h"), plugins=Plugins(discover=False)
    )
    assert bus.store.kind == "redis"


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opencode_sse_plugin.stores.redis_")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("redis", "redis.exceptions", "redis.asyncio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'opencode-sse-plugin\[redis\]'"):
        open_redis("redis://host", Settings())


def test_trio_is_told_that_it_cannot() -> None:
    async def start() -> None:
        async with EventBus(Settings(store="redis://127.0.0.1:1"), plugins=Plugins(discover=False)):
            pass

    with pytest.raises(StoreUnavailable, match=r"redis://127.0.0.1:1: redis:// needs asyncio"):
        anyio.run(start, backend="trio")
