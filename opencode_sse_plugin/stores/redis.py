"""``redis://host:port/database``: a log in Redis or Valkey (6.2 or later), shared by all machines that open it.

``rediss://`` is the same over TLS, ``unix:///path`` over a socket; ``?key=NAME`` names the log where a database holds
several. Everything done with a log is one script (``redis_scripts.py``), so that it happens whole or not at all:

- **Appending** gives numbers without holes, leaves out what is known, and remembers its answer under the number of the
  batch, so that a call whose answer got lost is made again and carried out once (``redis_writer.py``).
- **Reading**: each process has one reader that waits for news on the stream and tells what follows; what the process
  appended itself is told by the answer, where nothing of others comes before it (``redis_reader.py``).

**Lost history.** A server can lose what it acknowledged: it starts again from an older file, or empty, or a replica
that was behind takes over. What is left is the beginning of the old history, and the next append would give numbers
that meant something else before. So beside the epoch the log keeps which server stored it, and every append compares,
in the script, before it stores:

- The *replication id* is new with every start and every promotion, so while it is the same, nothing can be lost. It
  also changes when the first replica comes and long after the last one left; then the *run id* is the same and no
  former replication id is given: nothing is lost.
- If the run id is new too, the server was started again. It has lost nothing if it flushes every write before it
  answers (``appendonly yes``, ``appendfsync always``, as it was while this was stored), and if there was no replica
  that may be answering in its place. Then the epoch goes on.
- All else may have lost something, and a new epoch begins with that append. It begins at the head there is: what is
  left is the old history's beginning, so older cursors up to there stay good, and a false alarm costs nobody anything.

What no id tells (somebody put an old file in place, or deleted keys), processes notice that know better. With every
call they say the epoch, the newest number they know and its event's name. If that event is not there any more, and the
epoch is the same, they look for the newest event they were told that still is, and a new epoch begins behind it
(``redis_history.py``). And as the chain is stored with the events, whoever reads after a failover sees in it where his
history ended, even where the new one is longer by then.
"""

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
