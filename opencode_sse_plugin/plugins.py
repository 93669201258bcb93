"""Calling plugins: one typed method per hook, so that call sites are checked.

Implementations are called one by one, so that one failure does not silence the others.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import pluggy
from starlette.requests import Request
from starlette.routing import BaseRoute

from . import hookspecs
from .errors import PluginError, Reject
from .events import Event, StoredEvent
from .loading import Implementation, PluginInfo, PluginLoader, refuse_coroutine
from .overflow import Outcome, OverflowPolicy, is_policy
from .settings import Settings
from .slowness import PATIENCE, SLOW
from .specs import register_specs
from .stores import Bounds
from .subscriber import Snapshot, Subscriber

if TYPE_CHECKING:
    from .bus import EventBus

__all__ = ["PluginInfo", "Plugins", "register_specs"]

logger = logging.getLogger("opencode_sse")

#: Seconds that a client may have to wait for a plugin.
TIMEOUT: Final = 5.0


class Plugins(PluginLoader):
    """The plugins of one bus.

    :param required: distributions or entry points that must load. :param disabled: those that must not.
    :param discover: whether to load installed plugins at once; else :meth:`discover` does.
    :param publish_errors: what a failing ``sse_event_publish`` does to the event.
    :raises PluginError: if a required one is missing or broken.
    """

    def __init__(
        self,
        *,
        required: Sequence[str] = (),
        disabled: Sequence[str] = (),
        discover: bool = True,
        publish_errors: Literal["drop", "keep"] = "drop",
    ) -> None:
        self.publish_errors = publish_errors
        #: Events dropped because a publish hook failed.
        self.failed_publishes = 0
        #: The implementations of each manager, as they come and go; asked at every event, where copies would be dear.
        #: Where all are empty, nobody implements ``sse_event_publish``, or ``sse_event_published``.
        self.publish_hooks: list[list[pluggy.HookImpl]] = []
        self.published_hooks: list[list[pluggy.HookImpl]] = []
        self._lag_warning: list[list[pluggy.HookImpl]] = []
        self._offenders: set[tuple[int, str]] = set()
        super().__init__()
        if discover:
            self.discover(required=required, disabled=disabled)

    def _watch(self, manager: pluggy.PluginManager) -> None:
        super()._watch(manager)
        # Those that are asked about at every event.
        self.publish_hooks.append(manager.hook.sse_event_publish._hookimpls)
        self.published_hooks.append(manager.hook.sse_event_published._hookimpls)
        self._lag_warning.append(manager.hook.sse_subscriber_lag_warning._hookimpls)

    def _implementations(self, hook: str) -> list[Implementation]:
        """In pluggy's order: tryfirst, then the last registered first; our own manager before the hosts'."""
        found: list[Implementation] = []
        for manager in self._managers:
            implementations = getattr(manager.hook, hook).get_hookimpls()
            if manager is not self.manager:
                implementations = [i for i in implementations if self._acceptable(hook, i)]
            found.extend(reversed(implementations))
        return found

    def _acceptable(self, hook: str, implementation: Implementation) -> bool:
        """A host's manager takes wrappers and coroutines that ours refuses: those are left out, and named once."""
        wrong = None
        if implementation.wrapper or implementation.hookwrapper:
            wrong = "hook wrappers are not supported"
        elif inspect.iscoroutinefunction(implementation.function) and hook not in hookspecs.ASYNC:
            wrong = "this hook is called from synchronous code and cannot be async"
        if wrong is None:
            return True
        key = (id(implementation.function), hook)
        if key not in self._offenders:
            self._offenders.add(key)
            logger.error("plugin %s: %s is left out: %s", implementation.plugin_name, hook, wrong)
        return False

    def _call(self, implementation: Implementation, hook: str, arguments: dict[str, Any]) -> Any:
        begun = time.perf_counter()
        try:
            answer = implementation.function(*(arguments[name] for name in implementation.argnames))
        finally:
            took = time.perf_counter() - begun
            if took > SLOW:
                logger.warning("plugin %s: %s held the event loop for %.2f s", self._named(implementation), hook, took)
        if hook not in hookspecs.ASYNC:
            refuse_coroutine(answer)
        return answer

    async def _finish(self, implementation: Implementation, hook: str, arguments: dict[str, Any]) -> Any:
        """Call a hook that may be async, to its end."""
        answer = self._call(implementation, hook, arguments)
        if not inspect.isawaitable(answer):
            return answer
        begun = time.perf_counter()
        try:
            return await answer
        finally:
            took = time.perf_counter() - begun
            if took > PATIENCE:
                logger.warning("plugin %s: %s took %.2f s", self._named(implementation), hook, took)

    def _tell(self, hook: str, **arguments: Any) -> None:
        """Call everyone; failures are logged."""
        for implementation in self._implementations(hook):
            try:
                self._call(implementation, hook, arguments)
            except Exception as error:
                self._failed(hook, implementation, error)

    def _first(self, hook: str, wanted: Callable[[Any], bool], arguments: dict[str, Any]) -> Any:
        """The first answer that is not ``None``; failures and nonsense are logged and passed over."""
        for implementation in self._implementations(hook):
            try:
                answer = self._call(implementation, hook, arguments)
                if answer is None:
                    continue
                if not wanted(answer):
                    raise TypeError(f"it answered {answer!r}")
                return answer
            except Exception as error:
                self._failed(hook, implementation, error)
        return None

    @property
    def warns(self) -> bool:
        """Whether anyone implements ``sse_subscriber_lag_warning``."""
        return any(self._lag_warning)

    def settings(self, settings: Settings) -> Settings | None:
        """``sse_settings``. :raises Exception: whatever a plugin raises."""
        for implementation in self._implementations("sse_settings"):
            answer = self._call(implementation, "sse_settings", {"settings": settings})
            if answer is not None:
                if not isinstance(answer, Settings):
                    raise PluginError(f"plugin {self._named(implementation)}: sse_settings answered {answer!r}")
                return answer
        return None

    def routes(self, bus: EventBus) -> list[BaseRoute]:
        """``sse_routes``. :raises Exception: whatever a plugin raises."""
        routes: list[BaseRoute] = []
        for implementation in self._implementations("sse_routes"):
            answer = self._call(implementation, "sse_routes", {"bus": bus})
            given = list(answer) if isinstance(answer, Iterable) else () if answer is None else (answer,)
            if not all(isinstance(route, BaseRoute) for route in given):
                # A router would fail at each request, those for the host too.
                raise PluginError(f"plugin {self._named(implementation)}: sse_routes answered {answer!r}")
            routes += given
        return routes

    async def startup(self, bus: EventBus) -> None:
        """``sse_startup``. :raises Exception: whatever a plugin raises, logged."""
        for implementation in self._implementations("sse_startup"):
            try:
                await self._finish(implementation, "sse_startup", {"bus": bus})
            except Exception as error:
                self._failed("sse_startup", implementation, error)
                raise

    async def shutdown(self, bus: EventBus) -> None:
        """``sse_shutdown``."""
        for implementation in self._implementations("sse_shutdown"):
            try:
                await self._finish(implementation, "sse_shutdown", {"bus": bus})
            except Exception as error:
                self._failed("sse_shutdown", implementation, error)

    def event_publish(self, event: Event) -> Event | None:
        """``sse_event_publish``: what is to be stored, ``None`` if it was dropped."""
        for implementation in self._implementations("sse_event_publish"):
            try:
                answer = self._call(implementation, "sse_event_publish", {"event": event})
                if answer is False:
                    return None
                if isinstance(answer, Event):
                    event = answer
                elif answer is not None:
                    raise TypeError(f"it answered {type(answer).__name__}, not an Event, False or None")
            except Exception as error:
                self._failed("sse_event_publish", implementation, error)
                if self.publish_errors == "drop":
                    self.failed_publishes += 1
                    return None
        return event

    def event_published(self, event: StoredEvent, seq: int) -> None:
        """``sse_event_published``."""
        self._tell("sse_event_published", event=event, seq=seq)

    def publish_failed(self, events: Sequence[Event], error: Exception) -> None:
        """``sse_publish_failed``."""
        self._tell("sse_publish_failed", events=events, error=error)

    async def subscriber_attach(self, subscriber: Subscriber, request: Request | None) -> None:
        """``sse_subscriber_attach``. :raises Reject: as a plugin says, or 500 where one fails or takes too long."""
        for implementation in self._implementations("sse_subscriber_attach"):
            try:
                with anyio.fail_after(TIMEOUT):
                    arguments = {"subscriber": subscriber, "request": request}
                    answer = await self._finish(implementation, "sse_subscriber_attach", arguments)
                if answer is not None:  # It may have wanted to keep somebody out.
                    raise TypeError(f"it answered {answer!r}, not None")
                subscriber.check()
            except Reject:
                raise
            except Exception as error:
                self._failed("sse_subscriber_attach", implementation, error)
                raise Reject(500, "the stream cannot be attached") from error

    def overflow_policy(self, subscriber: Subscriber) -> OverflowPolicy | str | None:
        """``sse_overflow_policy``: the first answer."""
        answer: OverflowPolicy | str | None = self._first(
            "sse_overflow_policy",
            lambda answer: isinstance(answer, str) or is_policy(answer),
            {"subscriber": subscriber},
        )
        return answer

    def subscriber_lag_warning(self, subscriber: Subscriber, fraction: float) -> None:
        """``sse_subscriber_lag_warning``."""
        self._tell("sse_subscriber_lag_warning", subscriber=subscriber, fraction=fraction)

    def subscriber_overflow(self, subscriber: Subscriber, outcome: Outcome) -> None:
        """``sse_subscriber_overflow``."""
        self._tell("sse_subscriber_overflow", subscriber=subscriber, outcome=outcome)

    def subscriber_detach(self, subscriber: Subscriber, reason: str) -> None:
        """``sse_subscriber_detach``."""
        self._tell("sse_subscriber_detach", subscriber=subscriber, reason=reason)

    async def snapshot(
        self, subscriber: Subscriber, head: int, bounds: Callable[[], Awaitable[Bounds]]
    ) -> Snapshot | None:
        """``sse_snapshot``: the first answer that fits into what the store holds by then."""
        for implementation in self._implementations("sse_snapshot"):
            try:
                arguments = {"subscriber": subscriber, "head": head}
                with anyio.fail_after(TIMEOUT):
                    answer = await self._finish(implementation, "sse_snapshot", arguments)
                if answer is None:
                    continue
                if not isinstance(answer, Snapshot):
                    raise TypeError(f"it answered {type(answer).__name__}, not a Snapshot or None")
                oldest, latest, _ = await bounds()
                answer.check(oldest, latest)
                return answer
            except Exception as error:
                self._failed("sse_snapshot", implementation, error)
        return None
