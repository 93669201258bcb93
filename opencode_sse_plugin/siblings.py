"""Whether this process is one of several workers of one server, each of which would hold a stream of its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys

#: What says to the others that we are there; held until the process ends, whatever happens to it.
_claim: socket.socket | None = None


def has_siblings() -> bool:
    """Whether another worker of the same server asked this before.

    Servers start their workers by multiprocessing (uvicorn, hypercorn, granian) or fork them (gunicorn). On Linux only;
    elsewhere nobody is found.
    """
    global _claim
    if not sys.platform.startswith("linux") or _claim is not None:
        return False
    if multiprocessing.parent_process() is None and "gunicorn.arbiter" not in sys.modules:
        return False
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0opencode-sse-worker-of-{os.getuid()}-{os.getppid()}")
    except OSError:
        claim.close()
        return True
    _claim = claim
    return False
