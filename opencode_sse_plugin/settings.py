"""Everything an operator can set, in one frozen dataclass.

Argument > command line > environment > ``sse_settings`` plugin > default. The environment is read through
``starlette.config``: ``OPENCODE_SSE_`` + the name in capitals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from starlette.config import Config

from .errors import ConfigurationError

PREFIX: Final = "OPENCODE_SSE_"
#: The variable of the proposal to opencode, honoured for ``queue_max``.
SEED_QUEUE_MAX: Final = "OPENCODE_EXPERIMENTAL_EVENT_QUEUE_MAX"

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits, times and names of one bus. Bytes count encoded payloads; times are seconds unless said.

    :param queue_max, queue_max_bytes: how far behind a live subscriber may be.
    :param overflow: name of the overflow policy, with parameters behind ``?``.
    :param write_timeout: a subscriber blocked in one write for so long is dropped.
    :param heartbeat: a heartbeat after so long without a frame.
    :param loop_share: of the event loop's time, what waking a hundred subscribers and more may take, from 0.01 to
        1: less saves processor time, since more events go out in one write, and more saves latency.
    :param retry: what clients are told to wait before they reconnect, in milliseconds.
    :param store: URL of the event store.
    :param replay: whether cursors are served; if not, they expire with reason ``disabled``.
    :param retain_events, retain_bytes, retain_age: what the store keeps; ``None`` takes the store's own default; a
        ``retain_age`` of ``inf`` is for ever.
    :param max_event_bytes: largest payload that may be published; never above ``queue_max_bytes``.
    :param max_request_bytes: largest body of ``POST /event``.
    :param max_subscribers: more are answered 503.
    :param publish_buffer: events waiting for the store before ``publish_nowait`` refuses.
    :param publish_deadline: how long a publish may wait for an unavailable store.
    :param plugins: distributions that must load. :param disabled_plugins: distributions that must not.
    :param publish_errors: what a failing ``sse_event_publish`` plugin does to the event.
    """

    queue_max: int = 1000
    queue_max_bytes: int = 8 * _MIB
    overflow: str = "disconnect"
    write_timeout: float = 30.0
    heartbeat: float = 10.0
    loop_share: float = 1 / 3
    retry: int = 1000
    store: str = "memory://"
    replay: bool = True
    retain_events: int | None = None
    retain_bytes: int | None = None
    retain_age: float | None = None
    max_event_bytes: int = _MIB
    max_request_bytes: int = 16 * _MIB
    max_subscribers: int = 10_000
    publish_buffer: int = 10_000
    publish_deadline: float = 5.0
    plugins: tuple[str, ...] = ()
    disabled_plugins: tuple[str, ...] = ()
    publish_errors: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigurationError(f"{name} must be at least {least}, not {value}")
        if self.loop_share > 1:
            raise ConfigurationError(f"loop_share must be at most 1, not {self.loop_share}")
        if self.publish_errors not in ("drop", "keep"):
            raise ConfigurationError(f"publish_errors must be 'drop' or 'keep', not {self.publish_errors!r}")
        if self.max_event_bytes > self.queue_max_bytes:
            # One event must always fit, or no subscriber could ever be given it.
            object.__setattr__(self, "max_event_bytes", self.queue_max_bytes)

    @classmethod
    def load(
        cls,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        plugin: Callable[[Settings], Settings | None] | None = None,
        defaults: Settings | None = None,
    ) -> Settings:
        """Put the layers together.

        :param arguments: field → value; ``None`` leaves a field to the layers below.
        :param plugin: the ``sse_settings`` hook. :param defaults: the lowest layer, where it is not this class's own.
        :raises ConfigurationError: naming the variable or field and what would be right.
        """
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        if unknown := given.keys() - known:
            raise ConfigurationError(f"unknown setting {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
        base = defaults or cls()
        if plugin is not None:
            base = plugin(base) or base
        return replace(base, **{**_from_environment(os.environ if environ is None else environ), **given})


_LEAST: Final[dict[str, float]] = {
    "queue_max": 1,
    "queue_max_bytes": 1,
    "write_timeout": 0.01,
    "heartbeat": 0.01,
    "loop_share": 0.01,
    "retry": 0,
    "retain_events": 1,
    "retain_bytes": 1,
    "retain_age": 0.01,
    "max_event_bytes": 1,
    "max_request_bytes": 1,
    "max_subscribers": 1,
    "publish_buffer": 1,
    "publish_deadline": 0,
}


def _boolean(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in value:
        raise ValueError("not a yes or no")
    return value[text.lower()]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in (part.strip() for part in text.split(",")) if name)


_READ: Final[dict[str, Callable[[str], Any]]] = {
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "bool": _boolean,
    "tuple[str, ...]": _names,
}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    config = Config(environ=environ)
    found: dict[str, Any] = {}
    for field in fields(Settings):
        names = [PREFIX + field.name.upper()] + ([SEED_QUEUE_MAX] if field.name == "queue_max" else [])
        for name in names:
            text = config(name, default="")
            if not text:
                continue
            try:
                found[field.name] = _READ.get(str(field.type), str)(text)
                Settings(**{field.name: found[field.name]})
            except ValueError as error:
                kind = str(field.type).removesuffix(" | None")
                raise ConfigurationError(f"{name}={text!r}: {error}; it takes {kind}") from None
            break
    return found
