"""Giving waiting readers what has come straight from the wake-up, without a turn of the event loop for each.

A reader that waits costs a future, a handle and a task switch per wake-up, which is more than the write itself. A
server's own ``send`` coroutine that does not have to wait runs to its end in one step; only one that suspends (the
socket is full) is left to the reader's task, which finishes it.

Only for a server's own, unwrapped ``send``, whose code is known not to ask which task it runs in, and which stands in
no timeout scope but ours. Everywhere else the plain path in ``response`` does the same.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import Any, Final

from starlette.types import Send

from .subscription import Subscription
from .wakeup import on_asyncio

_KNOWN: Final = ("uvicorn.protocols.http.h11_impl", "uvicorn.protocols.http.httptools_impl")


def supports(send: Send) -> bool:
    """Whether this is a ``send`` that may be stepped."""
    owner = getattr(send, "__self__", None)
    return type(owner).__module__ in _KNOWN and getattr(send, "__name__", "") == "send" and on_asyncio()


class Stepper:
    """Writes for one subscription while its pump waits."""

    __slots__ = ("_send", "_subscription")

    def __init__(self, subscription: Subscription[bytes], send: Send) -> None:
        self._subscription = subscription
        self._send = send

    def __call__(self) -> bool:
        """Give what is there.

        :return: whether all is done and the pump can go on waiting; else it has to look for itself.
        """
        subscription = self._subscription
        chunk = subscription.quick()
        if chunk is None:
            return False
        sending: Any = self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        subscription.given()
        try:
            suspended = sending.send(None)
        except StopIteration:
            subscription.writing_since = None
            return subscription.is_level()  # A big backlog goes on in turns with the others.
        except (OSError, RuntimeError):  # uvloop raises the latter; it must not reach whoever publishes
            subscription.end("client")
            return False
        subscription.unfinished = _Rest(sending, suspended)
        return False


class _Rest:
    """The rest of a coroutine that has suspended, for another task to await."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], suspended: Any) -> None:
        self._coroutine = coroutine
        self._suspended = suspended

    def __await__(self) -> Generator[Any, Any, None]:
        coroutine, suspended = self._coroutine, self._suspended
        try:
            while True:
                try:
                    answer = yield suspended
                except BaseException as error:
                    suspended = coroutine.throw(error)
                else:
                    suspended = coroutine.send(answer)
        except StopIteration:
            return
