"""Overflow policy ``keep-questions``: under pressure everything goes but permissions and questions."""

from __future__ import annotations

from collections.abc import Callable

from opencode_sse_plugin import Backlog, Disconnect, Outcome, Skip, hookimpl

KEPT = ("permission.", "question.")


class KeepQuestions:
    """Skip what nobody waits for; if questions alone are too many, let the client resume from the log."""

    name = "keep-questions"

    def __call__(self, backlog: Backlog) -> Outcome:
        if not backlog.fits([event for event in backlog.events if event.type.startswith(KEPT)]):
            return Disconnect()
        return Skip.of(i for i, event in enumerate(backlog.events) if not event.type.startswith(KEPT))


@hookimpl
def sse_register_overflow_policies(register: Callable[[str, Callable[[], KeepQuestions]], None]) -> None:
    register(KeepQuestions.name, KeepQuestions)
