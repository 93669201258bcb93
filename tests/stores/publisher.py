"""Publishes over HTTP, one event after another, until its input ends; a server that is away is asked again.

Each acknowledgement is written down and flushed to the disk before the next event is published.

Arguments: a file that holds the port of the server, the list of acknowledgements, a name for the ids.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from pathlib import Path


def publish(port: int, id: str) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        body = json.dumps({"type": "test.event", "id": id, "properties": {"pad": "x" * 200}})
        connection.request("POST", "/event", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise OSError(f"{answer.status} {said!r}")
        return {"id": id, "pid": answer.getheader("x-pid"), **json.loads(said)}
    finally:
        connection.close()


def main(port: Path, acknowledged: Path, name: str) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    number = 0
    with acknowledged.open("a") as file:
        while not ended.is_set():
            number += 1
            while True:
                try:
                    answer = publish(int(port.read_text()), f"evt_{name}_{number}")
                    break
                except (OSError, http.client.HTTPException):
                    time.sleep(0.02)  # The server is away; nothing tells when it is back.
            file.write(json.dumps(answer) + "\n")
            file.flush()
            os.fsync(file.fileno())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
