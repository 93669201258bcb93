"""Finding and loading plugins: a broken one is named with distribution and version, and left out.

A manager belongs to a bus, never to a module; a host's own manager can be added beside it.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import pluggy

from . import hookspecs
from .errors import PluginError
from .hookspecs import NAME
from .slowness import PATIENCE, timed
from .specs import complaints, normalized, register_specs

__all__ = ["PluginInfo", "PluginLoader", "register_specs"]

logger = logging.getLogger("opencode_sse")

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


class PluginLoader:
    """The plugins of one bus, and the managers whose plugins may implement our hooks."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(NAME)
        self.manager.add_hookspecs(hookspecs)
        self._managers: list[pluggy.PluginManager] = []
        self._infos: dict[str, PluginInfo] = {}
        self._errors: Counter[str] = Counter()
        self._connected: tuple[Callable[..., None], ...] | None = None
        self._watch(self.manager)

    def _watch(self, manager: pluggy.PluginManager) -> None:
        """From now on its plugins are called too."""
        self._managers.append(manager)

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
        name, distribution = point.name, _distribution(point)
        if name in self._infos:  # Another distribution's: both are wanted.
            name = f"{distribution}:{name}"
        info = PluginInfo(name, distribution, point.dist.version if point.dist is not None else None)
        try:
            with timed(f"plugin {info}: loading it took", PATIENCE):
                plugin = point.load()
            self._register(plugin, info)
        except (Exception, SystemExit) as error:  # A program, imported, may want to leave.
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

                    with timed(f"plugin {info}: {hook} held the event loop for"):
                        refuse_coroutine(implementation.function(*(collect for _ in implementation.argnames)))
        for register, args, options in said:
            try:
                register(*args, **options)
            except Exception as error:
                raise PluginError(f"plugin {info}: {error}") from error

    def add_manager(self, manager: pluggy.PluginManager) -> None:
        """Let the plugins of a host's own manager implement our hooks too, with the host's own marker."""
        register_specs(manager)
        if manager not in self._managers:
            self._watch(manager)
            if self._connected is not None:
                self._connect_host(manager)

    def _connect_host(self, manager: pluggy.PluginManager) -> None:
        """Historic hooks of a host's manager, one by one; pluggy itself calls plugins that come later."""
        assert self._connected is not None
        for hook, register in zip(_REGISTERS, self._connected, strict=True):
            implementations = getattr(manager.hook, hook).get_hookimpls()
            for implementation in implementations:
                try:
                    with timed(f"plugin {implementation.plugin_name}: {hook} held the event loop for"):
                        refuse_coroutine(implementation.function(*(register for _ in implementation.argnames)))
                except Exception as error:
                    self._failed(hook, implementation, error)

            def later(*args: Any, _hook: str = hook, _register: Callable[..., None] = register, **options: Any) -> None:
                try:
                    _register(*args, **options)
                except Exception as error:  # It would come out of the host's own ``register``.
                    logger.error("a plugin of %s: %s failed: %s", manager.project_name, _hook, error)

            others = manager.subset_hook_caller(hook, [implementation.plugin for implementation in implementations])
            others.call_historic(kwargs={"register": later})

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


def refuse_coroutine(answer: object) -> None:
    """:raises TypeError: for what nobody would await; it is closed, or a warning would come from nowhere later."""
    if inspect.iscoroutine(answer):
        answer.close()
        raise TypeError("this hook is called from synchronous code and cannot be async")


def _distribution(point: EntryPoint) -> str | None:
    return point.dist.name if point.dist is not None else None
