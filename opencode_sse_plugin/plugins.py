"""Finding, loading and isolating plugins, and one typed method per hook.

Implementations are called one by one, so that one failure does not silence the others. A manager belongs to a bus,
never to a module; a host's own manager can be added beside it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
import pluggy
from starlette.requests import Request
from starlette.routing import BaseRoute

from . import hookspecs
from .errors import PluginError, Reject
from .events import Event, StoredEvent
from .hookspecs import NAME
from .overflow import Outcome, OverflowPolicy
from .settings import Settings
from .specs import complaints, normalized, register_specs
from .subscriber import Snapshot, Subscriber

if TYPE_CHECKING:
    from .bus import EventBus

__all__ = ["PluginInfo", "Plugins", "register_specs"]

logger = logging.getLogger("opencode_sse")

ATTACH_TIMEOUT: Final = 5.0
#: A sync hook that holds the event loop for longer is named in the log.
SLOW: Final = 0.1
_REGISTERS: Final = (
    "sse_register_overflow_policies",
    "sse_register_event_stores",
    "sse_register_delivery_classes",
)
Implementation = pluggy.HookImpl


@dataclass(slots=True)
class PluginInfo:
    """One plugin as status and ``opencode-sse plugins`` show it; ``failure`` says why it was left out."""

    name: str
    distribution: str | None = None
    version: str | None = None
    hooks: list[str] = field(default_factory=list)
    errors: int = 0
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "hooks": self.hooks,
            "errors": self.errors,
            "failure": self.failure,
        }

    def __str__(self) -> str:
        return self.name if self.distribution is None else f"{self.name} ({self.distribution} {self.version})"


class Plugins:
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
        self.manager = pluggy.PluginManager(NAME)
        self.manager.add_hookspecs(hookspecs)
        self.publish_errors = publish_errors
        #: Events dropped because a publish hook failed.
        self.failed_publishes = 0
        self._managers: list[pluggy.PluginManager] = [self.manager]
        self._publish: list[pluggy.HookCaller] = []
        self._published: list[pluggy.HookCaller] = []
        self._lag_warning: list[pluggy.HookCaller] = []
        self._watch(self.manager)
        self._infos: dict[str, PluginInfo] = {}
        self._errors: Counter[str] = Counter()
        self._connected: tuple[Callable[..., None], ...] | None = None
        self._offenders: set[tuple[int, str]] = set()
        if discover:
            self.discover(required=required, disabled=disabled)

    # Loading.

    def discover(self, *, required: Sequence[str] = (), disabled: Sequence[str] = ()) -> None:
        """Load what is installed, in the order of distribution names; a broken one is named and left out.

        :raises PluginError: if a required one is missing or broken.
        """
        unwanted = {normalized(name) for name in disabled}
        found = sorted(entry_points(group=NAME), key=lambda point: (_distribution(point) or "", point.name))
        # pluggy calls the last registered first, and the order of distribution names is promised.
        for point in reversed(found):
            if not {normalized(point.name), normalized(_distribution(point) or "")} & unwanted:
                self._load(point)
        self.require(required)

    def require(self, names: Iterable[str]) -> None:
        """Check that distributions or entry points were loaded.

        :raises PluginError: naming the missing or broken one.
        """
        for name in names:
            wanted = normalized(name)
            infos = [
                i for i in self._infos.values() if wanted in (normalized(i.name), normalized(i.distribution or ""))
            ]
            if not infos:
                raise PluginError(f"required plugin {name!r} is not installed (or disabled); install it or unlist it")
            for info in infos:
                if info.failure is not None:
                    raise PluginError(f"required plugin {info} does not load: {info.failure}")

    def _load(self, point: EntryPoint) -> None:
        info = PluginInfo(point.name, _distribution(point), point.dist.version if point.dist is not None else None)
        try:
            self._register(point.load(), info)
        except Exception as error:
            self._leave_out(info, error)

    def _leave_out(self, info: PluginInfo, error: BaseException) -> None:
        info.failure = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        info.hooks = []
        self._infos[info.name] = info
        logger.error("plugin %s is left out: %s", info, info.failure)

    def register(self, plugin: object, name: str | None = None) -> str:
        """Add a plugin object.

        :return: the name it is known under.
        :raises PluginError: naming plugin, hook, signature and complaint; nothing of it stays.
        """
        if name is None:
            name = self.manager.get_canonical_name(plugin) if inspect.ismodule(plugin) else type(plugin).__name__
            if self.manager.has_plugin(name):
                name = f"{name}-{id(plugin)}"
        self._register(plugin, PluginInfo(name))
        return name

    def _register(self, plugin: object, info: PluginInfo) -> None:
        if wrong := complaints(plugin, str(info)):
            raise PluginError(wrong)
        try:
            self.manager.register(plugin, info.name)
        except (ValueError, pluggy.PluginValidationError) as error:
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise PluginError(f"plugin {info}: {error}") from error
        info.hooks = sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or ())
        self._infos[info.name] = info
        if self._connected is not None:
            try:
                self._give_registers(plugin, info)
            except Exception:
                self.unregister(info.name)
                raise

    def unregister(self, name: str) -> None:
        """Take a plugin out again; what it registered by name stays."""
        self.manager.unregister(name=name)
        self._infos.pop(name, None)

    def disable(self, names: Iterable[str]) -> None:
        """Take out what distributions or entry points of these names brought."""
        unwanted = {normalized(name) for name in names}
        for info in tuple(self._infos.values()):
            if {normalized(info.name), normalized(info.distribution or "")} & unwanted:
                if self.manager.has_plugin(info.name):
                    self.manager.unregister(name=info.name)
                del self._infos[info.name]

    def connect(self, policies: Callable[..., None], stores: Callable[..., None], classes: Callable[..., None]) -> None:
        """Give the ``sse_register_*`` hooks what they register with; later plugins get it when they come."""
        self._connected = (policies, stores, classes)
        for name, plugin in reversed(self.manager.list_name_plugin()):
            info = self._infos.get(name)
            if plugin is None or info is None:
                continue
            try:
                self._give_registers(plugin, info)
            except Exception as error:
                self.manager.unregister(plugin)
                self._leave_out(info, error)
        for manager in self._managers[1:]:
            self._connect_host(manager)

    def _give_registers(self, plugin: object, info: PluginInfo) -> None:
        """Collect what a plugin registers and apply it once all of it was said, so that nothing is half done."""
        assert self._connected is not None
        said: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = []
        for hook, register in zip(_REGISTERS, self._connected, strict=True):
            for implementation in getattr(self.manager.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:

                    def collect(*args: Any, _register: Callable[..., None] = register, **options: Any) -> None:
                        said.append((_register, args, options))

                    implementation.function(*(collect for _ in implementation.argnames))
        for register, args, options in said:
            try:
                register(*args, **options)
            except Exception as error:
                raise PluginError(f"plugin {info}: {error}") from error

    def add_manager(self, manager: pluggy.PluginManager) -> None:
        """Let the plugins of a host's own manager implement our hooks too, with the host's own marker."""
        register_specs(manager)
        if manager not in self._managers:
            self._managers.append(manager)
            self._watch(manager)
            if self._connected is not None:
                self._connect_host(manager)

    def _connect_host(self, manager: pluggy.PluginManager) -> None:
        """Historic hooks of a host's manager: pluggy calls plugins that come later by itself."""
        assert self._connected is not None
        for hook, register in zip(_REGISTERS, self._connected, strict=True):
            for implementation in getattr(manager.hook, hook).get_hookimpls():
                try:
                    implementation.function(*(register for _ in implementation.argnames))
                except Exception as error:
                    self._failed(hook, implementation, error)

    def info(self) -> list[PluginInfo]:
        """Every plugin, those left out too, by name; the hosts' own plugins with the hooks of ours they implement."""
        infos = {name: info for name, info in self._infos.items()}
        for manager in self._managers[1:]:
            for spec in hookspecs.SPECS:
                for implementation in getattr(manager.hook, spec.__name__).get_hookimpls():
                    info = infos.setdefault(
                        implementation.plugin_name, PluginInfo(implementation.plugin_name, manager.project_name)
                    )
                    if spec.__name__ not in info.hooks:
                        info.hooks.append(spec.__name__)
        for name, info in infos.items():
            info.errors = self._errors[name]
        return sorted(infos.values(), key=lambda info: info.name)

    # Calling.

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
            return implementation.function(*(arguments[name] for name in implementation.argnames))
        finally:
            took = time.perf_counter() - begun
            if took > SLOW:
                logger.warning("plugin %s: %s held the event loop for %.2f s", self._named(implementation), hook, took)

    def _named(self, implementation: Implementation) -> str:
        return str(self._infos.get(implementation.plugin_name, implementation.plugin_name))

    def _failed(self, hook: str, implementation: Implementation, error: BaseException) -> None:
        self._errors[implementation.plugin_name] += 1
        logger.error(
            "plugin %s: %s failed: %s: %s",
            self._named(implementation),
            hook,
            type(error).__name__,
            error,
            exc_info=error,
        )

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
                    if inspect.iscoroutine(answer):
                        answer.close()
                    raise TypeError(f"it answered {answer!r}")
                return answer
            except Exception as error:
                self._failed(hook, implementation, error)
        return None

    @property
    def publishes(self) -> bool:
        """Whether anyone implements ``sse_event_publish``."""
        return _any(self._publish)

    @property
    def published(self) -> bool:
        """Whether anyone implements ``sse_event_published``."""
        return _any(self._published)

    @property
    def warns(self) -> bool:
        """Whether anyone implements ``sse_subscriber_lag_warning``."""
        return _any(self._lag_warning)

    def _watch(self, manager: pluggy.PluginManager) -> None:
        """Keep the callers that are asked about at every event."""
        self._publish.append(manager.hook.sse_event_publish)
        self._published.append(manager.hook.sse_event_published)
        self._lag_warning.append(manager.hook.sse_subscriber_lag_warning)

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
        return [
            route
            for implementation in self._implementations("sse_routes")
            for route in self._call(implementation, "sse_routes", {"bus": bus}) or ()
        ]

    async def startup(self, bus: EventBus) -> None:
        """``sse_startup``. :raises Exception: whatever a plugin raises, logged."""
        for implementation in self._implementations("sse_startup"):
            try:
                await _awaited(self._call(implementation, "sse_startup", {"bus": bus}))
            except Exception as error:
                self._failed("sse_startup", implementation, error)
                raise

    async def shutdown(self, bus: EventBus) -> None:
        """``sse_shutdown``."""
        for implementation in self._implementations("sse_shutdown"):
            try:
                await _awaited(self._call(implementation, "sse_shutdown", {"bus": bus}))
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
                with anyio.fail_after(ATTACH_TIMEOUT):
                    arguments = {"subscriber": subscriber, "request": request}
                    await _awaited(self._call(implementation, "sse_subscriber_attach", arguments))
            except Reject:
                raise
            except Exception as error:
                self._failed("sse_subscriber_attach", implementation, error)
                raise Reject(500, "the stream cannot be attached") from error

    def overflow_policy(self, subscriber: Subscriber) -> OverflowPolicy | str | None:
        """``sse_overflow_policy``: the first answer."""
        answer: OverflowPolicy | str | None = self._first(
            "sse_overflow_policy",
            lambda answer: isinstance(answer, str) or (callable(answer) and isinstance(answer.name, str)),
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

    async def snapshot(self, subscriber: Subscriber, head: int) -> Snapshot | None:
        """``sse_snapshot``: the first answer."""
        for implementation in self._implementations("sse_snapshot"):
            try:
                arguments = {"subscriber": subscriber, "head": head}
                answer = await _awaited(self._call(implementation, "sse_snapshot", arguments))
                if isinstance(answer, Snapshot):
                    return answer
                if answer is not None:
                    raise TypeError(f"it answered {type(answer).__name__}, not a Snapshot or None")
            except Exception as error:
                self._failed("sse_snapshot", implementation, error)
        return None


def _any(callers: Sequence[pluggy.HookCaller]) -> bool:
    """Whether a hook has an implementation; ``get_hookimpls`` would copy the list at every event."""
    for caller in callers:  # noqa: SIM110 - any() with a generator takes four times as long
        if caller._hookimpls:
            return True
    return False


async def _awaited(answer: Any | Awaitable[Any]) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def _distribution(point: EntryPoint) -> str | None:
    return point.dist.name if point.dist is not None else None
