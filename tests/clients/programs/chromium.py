"""``EventSource`` in a real Chromium, driven over its debugging pipe."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from browser import find
from report import BASE, URL

SCRIPT = """
const source = new EventSource(%s)
source.onmessage = (message) => {
  const event = JSON.parse(message.data)
  const { id, type, properties } = event.payload ?? event
  const { pad, ...rest } = properties ?? {}
  report(JSON.stringify({ id, type, properties: pad === undefined ? rest : { ...rest, pad: pad.length } }))
}
source.onerror = () => source.readyState === EventSource.CLOSED && report(JSON.stringify({ ended: true }))
"""


class Browser:
    """A Chromium that takes commands on its descriptor 3 and answers on its descriptor 4."""

    def __init__(self) -> None:
        profile = tempfile.mkdtemp(prefix="chromium-")
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Above 4, so that neither is overwritten before it is put in its place.
        sources = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def place() -> None:
            for source, target in zip(sources, (3, 4), strict=True):
                os.dup2(source, target)

        found = find()
        assert found is not None, "no Chromium"
        program, environment = found
        self.process = subprocess.Popen(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-dev-shm-usage",
                "--disable-breakpad",
                "--disable-background-networking",
                "--disable-component-update",
                "--no-proxy-server",
                "--ignore-certificate-errors",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            preexec_fn=place,
            close_fds=False,
        )
        for end in (theirs_in, theirs_out, *sources):
            os.close(end)
        self._out = os.fdopen(ours_out, "wb", buffering=0)
        self._in = os.fdopen(ours_in, "rb")
        self._numbers = itertools.count(1)
        self._session: str | None = None

    def messages(self) -> Any:
        """What it says, until it ends."""
        rest = b""
        while data := os.read(self._in.fileno(), 65536):
            *whole, rest = (rest + data).split(b"\0")
            for message in whole:
                yield json.loads(message)

    def command(self, method: str, **params: Any) -> int:
        """Send a command, to the page once there is one."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        return number

    def run(self) -> None:
        """Open the host's page, start an EventSource in it, and print what it reports."""
        messages = self.messages()

        def result(number: int) -> Any:
            return next(message for message in messages if message.get("id") == number)["result"]

        target = result(self.command("Target.createTarget", url="about:blank"))["targetId"]
        self._session = result(self.command("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        result(self.command("Page.enable"))
        result(self.command("Runtime.enable"))
        result(self.command("Runtime.addBinding", name="report"))
        result(self.command("Page.addScriptToEvaluateOnNewDocument", source=SCRIPT % json.dumps(URL)))
        self.command("Page.navigate", url=f"{BASE}/page")
        for message in messages:
            if message.get("method") == "Runtime.bindingCalled":
                sys.stdout.write(message["params"]["payload"] + "\n")
                sys.stdout.flush()


Browser().run()
