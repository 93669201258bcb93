"""How each event type may be treated under overflow: one table, extended by registration.

``ephemeral`` events may go missing if it is told; of ``latest`` events that describe the same thing only the newest
matters; ``required`` events must never be dropped by a policy that looks at classes. Unknown types are ``required``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from .encoding import encode
from .errors import ConfigurationError
from .events import NOTHING, Described, StoredEvent

DeliveryClass = Literal["ephemeral", "latest", "required"]
#: From an event's properties to what it describes; ``None`` if it describes nothing comparable.
KeyFunction = Callable[[Mapping[str, Any]], str | None]

CLASSES: Final = frozenset({"ephemeral", "latest", "required"})
#: Not compared when events are added up: of two times, the later one is right.
_TIMES: Final = frozenset({"timestamp", "time"})


@dataclass(frozen=True, slots=True)
class _Entry:
    delivery_class: DeliveryClass
    key: KeyFunction | None
    family: str
    append: str | None


class DeliveryClasses:
    """The table. ``register`` is what plugins get in ``sse_register_delivery_classes``."""

    def __init__(self) -> None:
        self._table: dict[str, _Entry] = {}

    def register(
        self,
        type: str,
        delivery_class: DeliveryClass,
        key: KeyFunction | None = None,
        *,
        family: str | None = None,
        append: str | None = None,
    ) -> None:
        """Add an event type, or say otherwise about one of ours.

        A ``latest`` or ``required`` event with a key settles what it describes: earlier ``ephemeral`` and ``latest``
        events with the same key and family are superseded by it.

        :param family: what types have in common whose keys mean the same thing; ``None``: the type alone.
        :param append: property of an ``ephemeral`` event whose texts add up, so that neighbours can be merged.
        :raises ConfigurationError: for an unknown class, ``latest`` without a key, or ``append`` elsewhere.
        """
        if delivery_class not in CLASSES:
            raise ConfigurationError(f"delivery class {delivery_class!r}; there are {', '.join(sorted(CLASSES))}")
        if delivery_class == "latest" and key is None:
            raise ConfigurationError(f"event type {type!r} is 'latest' and needs a key")
        if append is not None and (delivery_class != "ephemeral" or key is None):
            raise ConfigurationError(f"event type {type!r}: only an 'ephemeral' event with a key can be appended")
        self._table[type] = _Entry(delivery_class, key, family or type, append)

    def __contains__(self, type: object) -> bool:
        return type in self._table

    def of(self, event: StoredEvent) -> DeliveryClass:
        """The class of an event."""
        found = self._table.get(event.type)
        return found.delivery_class if found is not None else "required"

    def key(self, event: StoredEvent) -> str | None:
        """What an event describes, with family and place; ``None`` if nothing comparable."""
        return self._described(event)[0]

    def adds_up(self, earlier: StoredEvent, later: StoredEvent) -> bool:
        """Whether two neighbours can be given as one: they differ in the text that is appended, and in their times."""
        shape = self._described(later)[1]
        return shape is not None and shape == self._described(earlier)[1]

    def join(self, run: Sequence[StoredEvent]) -> StoredEvent:
        """Neighbours that add up as one event that says what all of them say, with the id of the last one.

        :return: without a sequence number.
        """
        last = run[-1]
        entry = self._table[last.type]
        assert entry.append is not None
        events = [stored.event for stored in run]
        text = "".join((event.properties or {})[entry.append] for event in events)
        properties = {**(events[-1].properties or {}), entry.append: text}
        joined = StoredEvent.encode(replace(events[-1], properties=properties))
        joined.described = last.described
        return joined

    def _described(self, event: StoredEvent) -> Described:
        """Key and shape of an event: found once an event, not once a reader."""
        if event.described is not None:
            return event.described
        entry = self._table.get(event.type)
        if entry is None or entry.key is None:
            return NOTHING
        parsed = event.event
        properties = parsed.properties or {}
        try:
            key = entry.key(properties)
        except (KeyError, TypeError, AttributeError):
            key = None  # It does not look like its type: then it describes nothing.
        if key is None:
            event.described = NOTHING
            return NOTHING
        shape = None
        if entry.append is not None and isinstance(properties.get(entry.append), str):
            rest = {name: value for name, value in properties.items() if name not in _TIMES and name != entry.append}
            shape = encode(
                [event.type, event.scope, event.directory, event.project, event.workspace, rest, parsed.extra]
            )
        event.described = (f"{entry.family}\n{key}\n{event.directory}\n{event.workspace}", shape)
        return event.described
