"""Whether a plugin fits the hooks, and our hooks in a host's own manager."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any, Final

import pluggy

from .hookspecs import ASYNC, NAME, SPECS

_SPECS: Final[dict[str, Callable[..., Any]]] = {spec.__name__: spec for spec in SPECS}


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def complaints(plugin: object, name: str) -> str | None:
    """What is wrong with a plugin's implementations, by plugin, hook, signature and complaint; ``None`` if nothing."""
    found = [
        f"plugin {name}: {hook}{inspect.signature(function)}: {wrong}"
        for hook, function, options in _implementations(plugin)
        if (wrong := _complaint(hook, function, options)) is not None
    ]
    return "; ".join(found) or None


def _implementations(plugin: object) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    for attribute in dir(plugin):
        try:
            function = getattr(plugin, attribute)
            options = getattr(function, f"{NAME}_impl", None)
        except Exception:  # A property of the plugin's own may raise anything; it is no hook.
            continue
        if isinstance(options, dict) and callable(function):
            yield options.get("specname") or attribute, function, options


def _complaint(hook: str, function: Callable[..., Any], options: dict[str, Any]) -> str | None:
    spec = _SPECS.get(hook)
    if spec is None:
        near = difflib.get_close_matches(hook, _SPECS, 1)
        return f"there is no such hook; did you mean {near[0]}?" if near else "there is no such hook"
    if options.get("wrapper") or options.get("hookwrapper"):
        return "hook wrappers are not supported; implement the hook itself"
    if hook not in ASYNC and (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
        return "this hook is called from synchronous code and cannot be async"
    known = inspect.signature(spec).parameters
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in known:
            return f"unknown parameter {parameter.name!r}; the hook gives {', '.join(known)}"
    return None


def register_specs(manager: pluggy.PluginManager) -> None:
    """Add our hooks to a host's own manager, marked as the host's: its plugins implement them with its own marker.

    ``install(plugin_manager=…)`` does this; call it earlier where the host's ``check_pending()`` comes first. A second
    call does nothing.
    """
    caller = getattr(manager.hook, SPECS[0].__name__, None)
    if caller is not None and caller.has_spec():
        return
    mark = pluggy.HookspecMarker(manager.project_name)
    copies = ModuleType(f"{NAME}_hookspecs")
    for spec in SPECS:
        # A copy: the marker is an attribute of the function, and two managers must not see each other's.
        copy = FunctionType(spec.__code__, spec.__globals__, spec.__name__, spec.__defaults__, spec.__closure__)
        options = getattr(spec, f"{NAME}_spec")
        setattr(copies, spec.__name__, mark(copy, firstresult=options["firstresult"], historic=options["historic"]))
    manager.add_hookspecs(copies)
