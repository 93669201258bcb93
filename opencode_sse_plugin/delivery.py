"""How each event type may be treated under overflow: one table, extended by registration.

``ephemeral`` events may go missing if it is told; of ``latest`` events with the same key only the newest matters;
``required`` events must never be dropped by a policy that looks at classes. Unknown types are ``required``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from .errors import ConfigurationError
from .events import StoredEvent

DeliveryClass = Literal["ephemeral", "latest", "required"]
#: From an event's properties to what it describes; ``None`` if it describes nothing comparable.
KeyFunction = Callable[[Mapping[str, Any]], str | None]

CLASSES: Final = frozenset({"ephemeral", "latest", "required"})


class DeliveryClasses:
    """The table. ``register`` is what plugins get in ``sse_register_delivery_classes``."""

    def __init__(self) -> None:
        self._table: dict[str, tuple[DeliveryClass, KeyFunction | None]] = {}

    def register(self, type: str, delivery_class: DeliveryClass, key: KeyFunction | None = None) -> None:
        """Add an event type, or say otherwise about one of ours.

        :raises ConfigurationError: for an unknown class, or ``latest`` without a key.
        """
        if delivery_class not in CLASSES:
            raise ConfigurationError(f"delivery class {delivery_class!r}; there are {', '.join(sorted(CLASSES))}")
        if delivery_class == "latest" and key is None:
            raise ConfigurationError(f"event type {type!r} is 'latest' and needs a key")
        self._table[type] = (delivery_class, key)

    def of(self, event: StoredEvent) -> DeliveryClass:
        """The class of an event."""
        found = self._table.get(event.type)
        return found[0] if found is not None else "required"

    def key(self, event: StoredEvent) -> str | None:
        """What an event describes, with its type's family in front; ``None`` if nothing."""
        found = self._table.get(event.type)
        if found is None or found[1] is None:
            return None
        key = found[1](event.event.properties or {})
        return None if key is None else f"{event.type}:{key}"
