"""An nginx in front of a server: a program on a free port, without root, with a configuration of its own."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

import pytest

from .programs import TIMEOUT, free_port

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "servers.md"
#: nginx as people put it in front of something first: HTTP/1.0 to the server, and buffered.
DEFAULT: Final = "location / {\n    proxy_pass http://127.0.0.1:4096;\n}\n"

_CONFIGURATION: Final = """\
daemon off;
master_process off;
pid {folder}/pid;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def documented() -> str:
    """The settings that the documentation gives."""
    (block,) = re.findall(r"^```nginx\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return str(block)


class Nginx:
    """In front of the server at a port.

    :param location: what passes on to port 4096.
    """

    def __init__(self, upstream: int, location: str) -> None:
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
        if program is None:
            pytest.skip("NOT TESTED BEHIND A PROXY: as root, make test-peers, or: apt-get install -y nginx")
        self._folder = tempfile.TemporaryDirectory(prefix="nginx-")
        self.port = free_port()
        configuration = Path(self._folder.name, "nginx.conf")
        location = location.replace("127.0.0.1:4096", f"127.0.0.1:{upstream}")
        configuration.write_text(
            _CONFIGURATION.format(folder=self._folder.name, port=self.port, location=location), encoding="utf-8"
        )
        command = [program, "-p", self._folder.name, "-e", "stderr", "-c", str(configuration)]
        self._said = Path(self._folder.name, "said")
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(command, stdout=said, stderr=said)
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), TIMEOUT).close()
                return
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, self._said.read_text()  # noqa: PT018
                time.sleep(0.02)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(TIMEOUT)
        self._folder.cleanup()
