"""nginx with nchan, run from a folder of its own without root. It cannot publish inside its own process: this one
does, over one kept-alive connection with pipelined requests, on the core of the load client."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

import orjson
from common import Schedule, payload, pin, say

MODULES: Final = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
CONFIG: Final = """\
{user}
load_module {module};
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
daemon off;
events {{ worker_connections 16384; use epoll; multi_accept on; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_body_buffer_size 16k;
  client_body_in_single_buffer on;
  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /publish {{
      nchan_publisher;
      nchan_channel_id "all$arg_session";
      nchan_message_buffer_length 1000;
      nchan_message_timeout 10s;
    }}
    location = /event {{
      nchan_subscriber eventsource;
      nchan_channel_id "all$arg_session";
      nchan_subscriber_first_message newest;
    }}
  }}
}}
"""


def missing() -> str | None:
    """Why there is no nchan here; ``None`` if there is."""
    if _nginx() is None:
        return "nginx is not installed: apt-get install nginx libnginx-mod-nchan (or make bench-peers)"
    if _module() is None:
        return "nginx has no nchan module: apt-get install libnginx-mod-nchan (or make bench-peers)"
    return None


def _nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _module() -> Path | None:
    return next((path for folder in MODULES if (path := Path(folder, "ngx_nchan_module.so")).exists()), None)


def _version(nginx: str) -> str:
    said = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"nginx/(\S+)", said)
    debian = (
        subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"], capture_output=True, text=True, check=False
        ).stdout
        if shutil.which("dpkg-query")
        else ""
    )
    return f"nginx {found[1] if found else '?'} with nchan {debian or '(version unknown)'}"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _start(folder: str) -> tuple[subprocess.Popen[bytes], int]:
    nginx, module = _nginx(), _module()
    assert nginx is not None
    assert module is not None
    for _ in range(5):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""
        Path(folder, "nginx.conf").write_text(CONFIG.format(folder=folder, module=module, port=port, user=user))
        command = [nginx, "-p", folder, "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(200):
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return process, port
            time.sleep(0.02)
    raise SystemExit("nginx does not start: " + Path(folder, "error.log").read_text()[-500:])


class Publisher:
    """POSTs without waiting for answers, which a thread throws away."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port))
        # Little room on the way: what nginx cannot take must be seen here as not published.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._discard, daemon=True).start()

    def _discard(self) -> None:
        while self.connection.recv(65536):
            pass

    def post(self, session: int | None) -> bytes:
        body = orjson.dumps(payload(session))
        name = b"" if session is None else b"?session=ses_%d" % session
        return b"POST /publish%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (name, len(body), body)

    def run(self, schedule: Schedule, sessions: int) -> None:
        turn = 0
        while not schedule.over:
            time.sleep(max(0.0, schedule.next_wakeup() - time.monotonic()))
            turns = range(turn, turn + schedule.take())
            turn = turns.stop
            self.connection.sendall(b"".join(self.post(one % sessions if sessions else None) for one in turns))


def main() -> None:
    if complaint := missing():
        raise SystemExit(complaint)
    pin()
    with tempfile.TemporaryDirectory(prefix="bench-nchan-") as folder:
        process, port = _start(folder)
        pin("BENCH_LOAD_CPU")
        try:
            nginx = _nginx()
            assert nginx is not None
            about = f"{_version(nginx)}, one worker, 1000 messages kept, published by pipelined POSTs from outside"
            say(ready=True, port=port, pids=[process.pid, *_children(process.pid)], about=about)
            publisher = Publisher(port)
            for line in sys.stdin:
                _, rate, seconds, sessions = line.split()
                schedule = Schedule(float(rate), float(seconds))
                publisher.run(schedule, int(sessions))
                say(**schedule.report())
        finally:
            process.terminate()
            process.wait(10)


if __name__ == "__main__":
    main()
