"""Start an app and stop it, as a server does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
from starlette.types import ASGIApp, Message, Scope

from .connection import PATIENCE, within

_PHASES: Final = ("startup", "shutdown")


@asynccontextmanager
async def lifespan(app: ASGIApp, *, timeout: float = PATIENCE) -> AsyncIterator[dict[str, Any]]:
    """Run an app's start-up, and its shutdown on leaving the block. Yields the lifespan state, for
    ``stream(..., state=...)``.

    :param timeout: seconds for each of the two.
    :raises AssertionError: if the app says that one of the two failed, or returns without an answer.
    :raises TimeoutError: if one of the two does not end. :raises Exception: what the app raised.
    """
    span = _Lifespan()
    failure: BaseException | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(span.run, app)
        try:
            await span.ask("startup", timeout)
            yield span.state
        except (GeneratorExit, anyio.get_cancelled_exc_class()):
            raise
        except BaseException as error:
            failure = error
        if span.up:
            try:
                await span.ask("shutdown", timeout)
                with within(timeout, "the app did not return"):
                    await span.returned.wait()
            except Exception as error:
                failure = failure or error
        group.cancel_scope.cancel()
    outcome = failure or span.error
    if outcome is not None:
        raise outcome


class _Lifespan:
    """The server's side."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.up = False
        self.error: Exception | None = None
        self.returned = anyio.Event()
        self._asked = {phase: anyio.Event() for phase in _PHASES}
        self._answered = {phase: anyio.Event() for phase in _PHASES}
        self._complaint = ""
        self._received = 0

    async def run(self, app: ASGIApp) -> None:
        """Run the app; its end ends every wait for an answer."""
        scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            self.error = error
        finally:
            self.returned.set()
            for answered in self._answered.values():
                answered.set()

    async def ask(self, phase: str, timeout: float) -> None:
        """Let the app start up or shut down."""
        self.up = False
        self._asked[phase].set()
        with within(timeout, f"lifespan {phase} did not end"):
            await self._answered[phase].wait()
        if self.error is not None:
            raise self.error
        if self._complaint:
            raise AssertionError(f"lifespan {phase} failed: {self._complaint}")
        if self.returned.is_set() and phase == "startup":
            raise AssertionError("the app returned before its lifespan ended")
        self.up = phase == "startup"

    async def _receive(self) -> Message:
        phase = _PHASES[min(self._received, 1)]
        self._received += 1
        await self._asked[phase].wait()
        return {"type": f"lifespan.{phase}"}

    async def _send(self, message: Message) -> None:
        _, phase, outcome = message["type"].split(".")
        if outcome == "failed":
            self._complaint = message.get("message") or "no reason given"
        self._answered[phase].set()
