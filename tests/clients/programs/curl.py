"""``curl``, started again whenever it does not exit with 0."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

from report import URL, read


def reader(cursor: str | None) -> Iterator[tuple[str | None, Any]]:
    command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", "--noproxy", "*", URL]
    if cursor is not None:
        command += ["--header", f"Last-Event-ID: {cursor}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        block: dict[bytes, bytes] = {}
        for line in curl.stdout:
            if line != b"\n":
                name, _, value = line.rstrip(b"\n").partition(b": ")
                block[name] = value
            else:
                yield (block[b"id"].decode() if b"id" in block else None), json.loads(block[b"data"])
                block = {}
    if curl.returncode:
        raise ConnectionError(f"curl exited with {curl.returncode}")


read(reader, (ConnectionError,))
