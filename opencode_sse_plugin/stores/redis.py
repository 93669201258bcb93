"""``redis://host:port/database``: a log in Redis or Valkey (6.2 or later), shared by all machines that open it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from ..errors import ConfigurationError
from ..settings import Settings
from . import DURABLE_RETENTION, retention_of

if TYPE_CHECKING:
    from .redis_store import RedisEventStore

SCHEMES: Final = ("redis", "rediss", "unix")
_DEFAULT_KEY: Final = "opencode-sse"
_TLS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_PARAMETERS: Final = {"redis": ("key",), "rediss": ("key", *_TLS), "unix": ("key", "db")}


def open_redis(url: str, settings: Settings) -> RedisEventStore:
    """Make the store of a URL with the retention of the settings.

    :raises ConfigurationError: if the URL makes no sense, or redis-py is not installed.
    """
    bare, key, where = parse(url)
    try:
        from .redis_store import RedisEventStore
    except ImportError as error:
        raise ConfigurationError(
            f"{where} needs redis-py ({error}): pip install 'opencode-sse-plugin[redis]'"
        ) from error
    return RedisEventStore(
        bare, retention_of(settings, DURABLE_RETENTION), key=key, where=where, patience=settings.publish_deadline
    )


def parse(url: str) -> tuple[str, str, str]:
    """Take a URL apart.

    :return: the URL as redis-py takes it, the name of the log, and the URL as it may be shown.
    :raises ConfigurationError: saying what makes no sense, and what would.
    """
    parts = urlsplit(url)
    scheme = parts.scheme
    shown = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"{shown}: {error}") from None
    database = parts.path.strip("/")
    if scheme == "unix":
        if parts.netloc.rpartition("@")[2] or not database:
            raise ConfigurationError(f"{shown} names no socket; unix:///run/redis/redis.sock does")
    elif not parts.hostname or port == 0 or parts.fragment or (database and not database.isdecimal()):
        raise ConfigurationError(f"{shown} makes no sense; {scheme}://HOST:PORT/DATABASE with a number does")
    key, kept = _DEFAULT_KEY, []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _PARAMETERS[scheme]:
            raise ConfigurationError(
                f"{shown}: there is no parameter {name!r}; {scheme}:// takes {', '.join(_PARAMETERS[scheme])}"
            )
        if name == "key":
            key = value
        else:
            kept.append((name, value))
    if not key or not key.isprintable() or set(key) & set("{} "):
        raise ConfigurationError(f"{shown}: key={key!r} is no name for a log; letters, digits, - . : _ make one")
    where = shown if key == _DEFAULT_KEY else f"{shown}?key={key}"
    query = f"?{urlencode(kept)}" if kept else ""
    return f"{scheme}://{parts.netloc}{parts.path}{query}", key, where
