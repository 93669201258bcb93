"""Every error this package raises on purpose, and nothing else.

All of them derive from :class:`SSEPluginError`, so that a host can catch the family.
"""

from __future__ import annotations

from collections.abc import Mapping


class SSEPluginError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(SSEPluginError, ValueError):
    """A setting, parameter or option has a value that cannot work; the text says which and what would."""


class PluginError(SSEPluginError):
    """A plugin cannot be loaded or registered; the text names plugin, hook and complaint."""


class InvalidEvent(SSEPluginError, ValueError):
    """An event that cannot be published: no JSON, a reserved type, a malformed id, too large.

    ``index`` is its place in the batch (0 for a single event).
    """

    def __init__(self, message: str, *, index: int = 0, too_large: bool = False) -> None:
        super().__init__(message)
        self.index = index
        self.too_large = too_large


class InvalidFilter(SSEPluginError, ValueError):
    """A filter value that can match nothing a publisher may send; ``parameter`` names it."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class PublishBufferFull(SSEPluginError):
    """``publish_nowait`` found the bounded publish buffer full; nothing was stored."""


class StoreUnavailable(SSEPluginError):
    """The event store could not take or give events within its deadline; nothing was acknowledged."""


class BusClosed(SSEPluginError):
    """The bus was not started, is draining, or was closed."""


class Reject(SSEPluginError):
    """Raised by ``authorize`` or ``sse_subscriber_attach`` to turn a caller away.

    :param status: an HTTP status, 400 to 599, sent before the first byte of the stream.
    :param detail: one sentence for the caller.
    :param headers: extra response headers (``Retry-After``, ``WWW-Authenticate``).
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"Reject takes a status from 400 to 599, not {status}")
        super().__init__(f"{status} {detail}")
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
