"""Settings for every bus in this environment, from one TOML file.

What a file says lies below the environment and the host's arguments, so that an operator can still override it. A file
that makes no sense stops the start: a server with half of its settings is worse than none.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from opencode_sse_plugin import ConfigurationError, Settings, hookimpl

#: The file, which must exist; else the system's, if it is there.
FILE_VARIABLE: Final = "OPENCODE_SSE_CONFIG"
SYSTEM_FILE: Final = Path("/etc/opencode-sse.toml")
#: Which table of ``[profile]`` is laid over the rest.
PROFILE_VARIABLE: Final = "OPENCODE_SSE_PROFILE"

_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]+)")
_SIZES: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS: Final = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}


@hookimpl
def sse_settings(settings: Settings) -> Settings | None:
    """What the file says, and of its profile; ``None`` where there is no file and none was asked for."""
    named = os.environ.get(FILE_VARIABLE)
    profile = os.environ.get(PROFILE_VARIABLE)
    path = Path(named) if named else SYSTEM_FILE
    if not named and not path.exists():
        if profile:
            raise ConfigurationError(f"{PROFILE_VARIABLE}={profile}, but there is no {path} and no {FILE_VARIABLE}")
        return None
    return replace(settings, **read(path, profile))


def read(path: Path, profile: str | None = None) -> dict[str, Any]:
    """The settings in a file, those of a profile laid over the rest.

    :raises ConfigurationError: naming the file, the setting, and what it takes.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    profiles = table.pop("profile", {})
    if not isinstance(profiles, dict) or not all(isinstance(values, dict) for values in profiles.values()):
        raise ConfigurationError(f"{path}: profiles are tables such as [profile.production]")
    if profile and profile not in profiles:
        raise ConfigurationError(f"{path}: no profile {profile!r}; there are {', '.join(sorted(profiles)) or 'none'}")
    # All of them, so that a mistake shows before the day it is needed.
    checked = {name: _checked(values, f"{path}, profile {name}") for name, values in profiles.items()}
    return {**_checked(table, str(path)), **(checked[profile] if profile else {})}


def _checked(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    kinds = {field.name: str(field.type).removesuffix(" | None") for field in fields(Settings)}
    checked: dict[str, Any] = {}
    for name, value in table.items():
        if name not in kinds:
            raise ConfigurationError(f"{where}: unknown setting {name!r}; there are {', '.join(kinds)}")
        try:
            read_value: Callable[[Any], Any] = _READ.get(kinds[name], _string)
            checked[name] = read_value(_plain(name, value))
            Settings(**{name: checked[name]})
        except ValueError as error:
            raise ConfigurationError(f"{where}: {name} = {value!r}: {error}") from None
    return checked


def _plain(name: str, value: Any) -> Any:
    """A quantity with its unit as the number it means: ``"8 MiB"``, ``"7 d"``."""
    units = _SIZES if name.endswith("_bytes") else _SECONDS
    if not isinstance(value, str) or (match := _QUANTITY.fullmatch(value)) is None:
        return value
    number, unit = match.groups()
    if unit not in units:
        raise ValueError(f"unknown unit {unit!r}; there are {', '.join(units)}")
    seconds = float(number) * units[unit]
    # The one setting that counts milliseconds.
    return round(seconds * 1000) if name == "retry" else int(seconds) if units is _SIZES else seconds


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("it takes a number or a quantity such as '30 s'")
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("it takes a whole number")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("it takes true or false")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("it takes a list of names")
    return tuple(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it takes a text")
    return value


_READ: Final[dict[str, Callable[[Any], Any]]] = {
    "int": _integer,
    "float": _number,
    "bool": _boolean,
    "tuple[str, ...]": _names,
}
