"""A client that comes back: raw HTTP in a thread, resuming after the last event it has whole."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Got(NamedTuple):
    """One event as it came."""

    epoch: str
    seq: int
    id: str


class Reader:
    """Reads ``/event`` from its beginning until told to stop, over as many connections as it takes.

    :param port: where the server is now.
    """

    def __init__(self, port: Callable[[], int]) -> None:
        self._port = port
        self.events: list[Got] = []
        #: Control frames that say that something is lost, which must not come.
        self.complaints: list[dict[str, Any]] = []
        #: Process ids of the servers that were read from, where they say so.
        self.pids: set[str] = set()
        self.connections = 0
        self._cursor: str | None = None
        self._stop = False
        self._connection: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._run, name="reader")
        self._thread.start()

    @property
    def seq(self) -> int:
        """The last number it has."""
        return self.events[-1].seq if self.events else 0

    def stop(self) -> None:
        """Leave."""
        self._stop = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            connection.sock.shutdown(2)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop:
            try:
                self._read()
            except (OSError, http.client.HTTPException):
                time.sleep(0.02)  # The server is away; nothing tells when it is back.

    def _read(self) -> None:
        headers = {} if self._cursor is None else {"Last-Event-ID": self._cursor}
        self._connection = connection = http.client.HTTPConnection("127.0.0.1", self._port(), timeout=30)
        try:
            connection.request("GET", "/event?after_seq=0&follow=true", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            self.connections += 1
            self.pids.add(answer.getheader("x-pid", ""))
            id, data = None, None
            while line := answer.readline():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "id":
                    id = value
                elif name == "data":
                    data = value
                elif not line.strip():
                    assert data is not None
                    self._take(id, json.loads(data))
                    id = data = None
        finally:
            connection.close()

    def _take(self, id: str | None, data: dict[str, Any]) -> None:
        if id is not None:
            self._cursor = id
        if data["type"].startswith("server.stream.") and data["type"] != "server.stream.draining":
            self.complaints.append(data)
        elif not data["type"].startswith("server."):
            assert id is not None
            epoch, _, seq = id.partition(":")
            self.events.append(Got(epoch, int(seq), data["id"]))
