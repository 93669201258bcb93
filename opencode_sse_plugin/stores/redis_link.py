"""The server behind ``redis://``: calling scripts on it, what its errors mean, and waiting until it is back."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from random import uniform
from typing import Any, Final

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from ..errors import StoreUnavailable
from .redis_log import Keys
from .redis_scripts import Script

#: Seconds until a call counts as unanswered, and for how long at most one is made that waits for news.
TIMEOUT: Final = 2.0
BLOCK: Final = 1.0
_SHORTEST_WAIT: Final = 0.05
_LONGEST_WAIT: Final = 1.0

#: The beginnings of what a server answers, and what they mean.
_MEANING: Final = {
    "WRONGTYPE": "a key of it is of another program; choose another name with ?key=",
    "FOREIGN": "its stream was written by someone else; choose another name with ?key=, or delete its keys",
    "OOM": "the server is out of memory; raise maxmemory, or keep less with OPENCODE_SSE_RETAIN_BYTES",
    "READONLY": "the server is a read-only replica; the address must lead to the primary",
    "MISCONF": "the server cannot write its data to disk and takes no writes",
    "NOAUTH": "the server asks for a password: redis://:PASSWORD@host",
    "WRONGPASS": "wrong user name or password",
    "NOPERM": "the user may not do what is needed: EVALSHA, SCRIPT LOAD, INFO, XREAD and the commands of the scripts",
    "MOVED": "the server is a node of a cluster, and the log lies on another one; name that one, or a proxy",
}
#: What passes by itself, or when somebody has been made primary. (Busy with a script; loading; a failover under way.)
_PASSING: Final = ("READONLY", "LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "UNBLOCKED")
_NEWER: Final = "NEWER"


def unavailable(where: str, error: Exception) -> StoreUnavailable:
    """What an error means, for whoever wanted something of the store."""
    if isinstance(error, StoreUnavailable):
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    code = _code(error)
    if code == _NEWER:
        return StoreUnavailable(
            f"event store {where}: its layout has version {said.split()[-1]}, this program knows 1; "
            "a newer opencode-sse-plugin wrote it"
        )
    if not code and isinstance(error, exceptions.AuthenticationError):
        code = "NOAUTH" if "required" in said or "HELLO" in said else "WRONGPASS"
    meaning = _MEANING.get(code)
    return StoreUnavailable(f"event store {where}: {said if meaning is None else f'{meaning} ({said})'}")


def _code(error: Exception) -> str:
    """The word that says what an answer of the server is about."""
    for kind, code in _KINDS:  # The client has taken it off.
        if isinstance(error, kind):
            return code
    found = _CODE.search(str(error))  # Older servers put it behind the place in the script.
    return "" if found is None else found[0]


_KINDS: Final[Sequence[tuple[type[Exception], str]]] = (
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.MovedError, "MOVED"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
)
_CODE: Final = re.compile("|".join(rf"\b{code}\b" for code in {*_MEANING, *_PASSING, _NEWER}))


def passes(error: Exception) -> bool:
    """Whether asking again may help: the server is away, or not what it should be just now."""
    if isinstance(error, exceptions.AuthenticationError):  # It is a ConnectionError too.
        return False
    lost = (exceptions.ConnectionError, exceptions.TimeoutError, OSError, TimeoutError)
    return isinstance(error, lost) or _code(error) in _PASSING


def may_have_run(error: Exception) -> bool:
    """Whether a call that failed so may have been carried out."""
    if isinstance(error, exceptions.ResponseError) or _code(error) in _PASSING:
        return False
    return "connecting to" not in str(error)


class Backoff:
    """Waits longer each time, and never as long as others do."""

    def __init__(self) -> None:
        self._wait = _SHORTEST_WAIT

    async def wait(self) -> None:
        """Until it is time to try again."""
        await asyncio.sleep(uniform(self._wait / 2, self._wait))
        self._wait = min(_LONGEST_WAIT, 2 * self._wait)

    def reset(self) -> None:
        """It went well."""
        self._wait = _SHORTEST_WAIT


class Link:
    """Calls the scripts of one log; connections are made when they are needed, and again when they were lost.

    :param url: as the client library takes it. :param where: the same, as it may be shown.
    """

    def __init__(self, url: str, where: str, keys: Keys) -> None:
        self.where = where
        self.keys = keys
        self._client = Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 0),  # Whoever calls knows whether a call may be repeated.
            socket_timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            decode_responses=False,
        )
        self._pool = self._client.connection_pool
        self._beginnings: dict[str, bytes] = {}
        #: Which process of the server we know, and whether it flushes every write before it answers.
        self.vouched = ""

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def forget_connections(self) -> None:
        """Look for the server anew: the address may lead to another one by now."""
        await self._pool.disconnect(inuse_connections=False)

    async def call(self, script: Script, *arguments: str | bytes | int) -> list[Any]:
        """Run a script. :raises RedisError, OSError: whatever went wrong."""
        command = self._command(script, arguments)
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            return await self._run(connection, script, command)
        finally:
            await self._pool.release(connection)

    def _command(
        self, script: Script, arguments: Sequence[str | bytes | int], more: Sequence[bytes] = (), words: int = 0
    ) -> bytes:
        count = 3 + len(self.keys) + len(arguments) + words
        return b"".join([b"*%d\r\n" % count, self._beginning(script), *map(bulk, arguments), *more])

    def _beginning(self, script: Script) -> bytes:
        """What is the same in every call."""
        known = self._beginnings.get(script.sha)
        if known is None:
            words = ("EVALSHA", script.sha, len(self.keys), *self.keys)
            known = self._beginnings[script.sha] = b"".join([bulk(word) for word in words])
        return known

    async def _run(self, connection: AbstractConnection, script: Script, command: bytes) -> list[Any]:
        try:
            return await self._send(connection, command)
        except exceptions.NoScriptError:
            await self._ask("SCRIPT LOAD", script.text)
            return await self._send(connection, command)

    async def _send(self, connection: AbstractConnection, command: bytes) -> list[Any]:
        try:
            await connection.send_packed_command([command], check_health=False)
        except AttributeError as error:
            raise _closed(error) from error
        answer: list[Any] = await connection.read_response()
        return answer

    async def news(self, after: int) -> bool:
        """Wait until an event is stored beyond this number, for a second at most."""
        position = f"{after}-18446744073709551615"
        return bool(
            await self._ask("XREAD", "COUNT", 1, "BLOCK", int(BLOCK * 1000), "STREAMS", self.keys.stream, position)
        )

    async def scores(self, names: Sequence[bytes]) -> list[int | None]:
        """The numbers under which events are known now."""
        found = await self._ask("ZMSCORE", self.keys.known, *names)
        return [None if score is None else int(float(score)) for score in found]

    async def look_at_server(self) -> None:
        """Find out whom we talk to, and what it promises."""
        run = (await self._ask("INFO", "server"))["run_id"]
        try:
            settings = await self._ask("CONFIG GET", "append*")
        except exceptions.ResponseError:
            settings = {}  # Hosted ones do not say; then nothing is promised.
        text = {_text(name): _text(value) for name, value in settings.items()}
        always = (text.get("appendonly"), text.get("appendfsync")) == ("yes", "always")
        self.vouched = f"{run}:{int(always)}"

    async def memory_policy(self) -> str:
        """Under which rule the server throws keys away when its memory is full; empty where it has no limit."""
        memory = await self._ask("INFO", "memory")
        return str(memory.get("maxmemory_policy", "")) if memory.get("maxmemory") else ""

    async def _ask(self, *words: Any) -> Any:
        try:
            return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]
        except AttributeError as error:
            raise _closed(error) from error


def _closed(error: AttributeError) -> exceptions.ConnectionError:
    """Python 3.12 and later raise it where one writes to a closed connection, and redis-py hands it on.

    Measured: 3.13.0, ``'NoneType' object has no attribute '_add_writer'``.
    """
    return exceptions.ConnectionError(f"the connection is closed ({error})")


class _Patience:
    """``asyncio.timeout`` for one call after another, which share a timer: a new one for each is a tenth of its cost.

    :param seconds: after which whoever is between ``begin`` and ``end`` is cancelled.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._others = 0
        self._until = 0.0
        self._late = False

    def begin(self) -> None:
        """A call begins."""
        self._task = task = asyncio.current_task()
        assert task is not None
        self._others = task.cancelling()
        self._until = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._until, self._look)

    def end(self) -> bool:
        """It is over. :return: whether it took too long, and nobody else cancels it."""
        task, self._task = self._task, None
        if not self._late:
            return False
        self._late = False
        assert task is not None
        return task.uncancel() <= self._others

    def close(self) -> None:
        """There will be no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if self._until > self._loop.time():
            self._timer = self._loop.call_at(self._until, self._look)
        else:
            self._late = True
            self._task.cancel()


class KeptConnection:
    """A connection that is kept for one who calls again and again: asking the pool for it takes as long as a call."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._connection: AbstractConnection | None = None
        self._patience = _Patience(TIMEOUT)

    async def call(
        self, script: Script, *arguments: str | bytes | int, more: Sequence[bytes] = (), words: int = 0
    ) -> list[Any]:
        """As :meth:`Link.call`.

        :param more: further arguments, so many ``words``, as the protocol has them: putting commands together takes
            half of the client library's time.
        """
        link = self._link
        connection = self._connection
        if connection is None:
            connection = await link._pool.get_connection()  # type: ignore[no-untyped-call]
            # It is connected. From now on one timer does for a call: the client library makes a task for what it times.
            connection.socket_timeout = None
        self._connection = None
        self._patience.begin()
        try:
            answer = await link._run(connection, script, link._command(script, arguments, more, words))
        except BaseException as error:
            late = self._patience.end()
            await self._release(connection)
            if late and isinstance(error, asyncio.CancelledError):
                raise exceptions.TimeoutError(f"no answer to a call within {TIMEOUT:g} s") from error
            raise
        self._patience.end()
        self._connection = connection
        return answer

    async def close(self) -> None:
        """Give it back."""
        self._patience.close()
        if self._connection is not None:
            await self._release(self._connection)
            self._connection = None

    async def _release(self, connection: AbstractConnection) -> None:
        connection.socket_timeout = TIMEOUT
        await self._link._pool.release(connection)


def bulk(word: str | bytes | int) -> bytes:
    """A word as the protocol has it."""
    data = word if isinstance(word, bytes) else str(word).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def new_writer() -> str:
    """A name for one who appends, which nobody had before."""
    return os.urandom(8).hex()
