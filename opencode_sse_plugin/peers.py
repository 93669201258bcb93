"""Finding a server's connection by its addresses, among the files this process has open.

The only way to a connection of a server that keeps its transport to itself. Where there is no ``/proc/self/fd``, or the
connection is none of ours (a Unix socket, addresses that a proxy's headers have rewritten), nothing is found.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

_FILES: Final = "/proc/self/fd"
#: How long a look at all open files is good for: after a drain, many are asked for at once that are gone.
_GOOD_FOR: Final = 0.2

#: Where a connection comes from and which port of ours it came to.
Ends = tuple[str, int, int]


class Peers:
    """The connections of this process by their ends. What it remembers is checked at every use."""

    def __init__(self) -> None:
        self._files: dict[Ends, int] = {}
        self._seen = float("-inf")

    def find(self, scope: Mapping[str, Any], *, newest: bool = False) -> socket.socket | None:
        """The connection of a request; a duplicate, to be closed.

        :param newest: whether it may have come a moment ago.
        """
        ends = _ends_of(scope)
        if ends is None:
            return None
        found = _opened(self._files.get(ends, -1), ends)
        if found is None and (newest or time.monotonic() - self._seen > _GOOD_FOR):
            self._look()
            found = _opened(self._files.get(ends, -1), ends)
        return found

    def _look(self) -> None:
        self._files.clear()
        try:
            names = os.listdir(_FILES)
        except OSError:
            names = []
        for name in names:
            connection = _opened(int(name))
            if connection is not None:
                with connection:
                    self._files[_ends(connection)] = int(name)
        self._seen = time.monotonic()


def _ends_of(scope: Mapping[str, Any]) -> Ends | None:
    client, server = scope.get("client"), scope.get("server")
    if not client or not server or not server[1]:
        return None
    return _address(client[0]), int(client[1]), int(server[1])


def _ends(connection: socket.socket) -> Ends:
    peer, own = connection.getpeername(), connection.getsockname()
    return _address(peer[0]), peer[1], own[1]


def _address(host: str) -> str:
    """A server may call a caller of IPv4 by its IPv6 name, or the other way round."""
    return host.removeprefix("::ffff:")


def _opened(file: int, ends: Ends | None = None) -> socket.socket | None:
    """A duplicate of an open TCP connection, if it is one, and one with these ends."""
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            return None
        duplicate = socket.socket(fileno=os.dup(file))
    except OSError:
        return None
    is_tcp = duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM
    with suppress(OSError):  # It listens, or is closed.
        if is_tcp and _ends(duplicate) == (ends or _ends(duplicate)):
            return duplicate
    duplicate.close()
    return None
