"""opencode's own server, with a scripted model provider on loopback: a prompt makes it publish deltas to
``/global/event``. It runs in a folder of its own, with a home of its own, and needs nothing from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

from common import pin, say

HERE: Final = Path(__file__).resolve().parent
FOLDER: Final = HERE.parent / ".build" / "opencode"
FLAGS: Final = ("MODELS_FETCH", "AUTOUPDATE", "SHARE", "LSP_DOWNLOAD", "DEFAULT_PLUGINS", "CLAUDE_CODE")


def binary() -> Path | None:
    """The server's binary for this machine, if it is installed."""
    found = sorted(FOLDER.glob("node_modules/opencode-*/bin/opencode"), key=lambda path: "baseline" in str(path))
    return found[0] if found else None


def config(provider: int) -> dict[str, Any]:
    model = {"name": "m", "limit": {"context": 1_000_000, "output": 100_000}}
    options = {"baseURL": f"http://127.0.0.1:{provider}/v1", "apiKey": "none"}
    return {
        "model": "scripted/m",
        "small_model": "scripted/m",
        "autoupdate": False,
        "share": "disabled",
        "snapshot": False,
        "lsp": False,
        "formatter": False,
        "provider": {
            "scripted": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Scripted",
                "options": options,
                "models": {"m": model},
            }
        },
    }


def ask(port: int, path: str, body: object | None = None, seconds: float = 120) -> Any:
    """One JSON request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=seconds) as answer:
        return json.loads(answer.read() or b"null")


def start(program: Path, folder: Path, provider: int) -> tuple[subprocess.Popen[bytes], int]:
    project = folder / "project"
    project.mkdir()
    (folder / "opencode.json").write_text(json.dumps(config(provider)))
    home = {"HOME": str(folder), "OPENCODE_CONFIG": str(folder / "opencode.json")}
    home |= {f"XDG_{kind}_HOME": str(folder / kind) for kind in ("CONFIG", "DATA", "STATE", "CACHE")}
    environment = {**os.environ, **home, **{f"OPENCODE_DISABLE_{flag}": "1" for flag in FLAGS}}
    command = [str(program), "serve", "--hostname", "127.0.0.1", "--port", "0"]
    log = folder / "server.log"
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdin=subprocess.DEVNULL, stdout=log.open("wb"), stderr=subprocess.STDOUT
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        port = log.read_text().rpartition("http://127.0.0.1:")[2].split()
        if port:
            with contextlib.suppress(OSError, ValueError):
                ask(int(port[0]), "/global/health", seconds=5)
                return process, int(port[0])
        time.sleep(0.1)
    process.kill()
    raise SystemExit("opencode does not start: " + log.read_text()[-500:].replace("\n", " "))


def main() -> None:
    program = binary()
    if program is None or shutil.which("node") is None:
        raise SystemExit("opencode is not installed here: apt-get install nodejs npm, then make bench-peers")
    scripted = subprocess.Popen(["node", str(HERE / "provider.mjs")], stdout=subprocess.PIPE)
    assert scripted.stdout is not None
    pin()
    server = None
    try:
        with tempfile.TemporaryDirectory(prefix="bench-opencode-", ignore_cleanup_errors=True) as folder:
            server, port = start(program, Path(folder), int(scripted.stdout.readline()))
            pin("BENCH_LOAD_CPU")
            version = ask(port, "/global/health").get("version", "?")
            about = f"opencode {version}, one session answering prompts, /global/event"
            session = ask(port, "/session", {})["id"]
            say(ready=True, port=port, pids=[server.pid], about=about)
            for line in sys.stdin:
                _, count, *_ = line.split()
                parts = [{"type": "text", "text": f"DELTAS {count}"}]
                begun = time.monotonic()
                ask(port, f"/session/{session}/message", {"parts": parts})
                say(seconds=time.monotonic() - begun)
            server.terminate()
            server.wait(10)
    finally:
        for process in (server, scripted):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
