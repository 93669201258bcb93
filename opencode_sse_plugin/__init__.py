"""An event stream for agent hosts that survives slow, gone and returning clients."""

from .app import event_app
from .bus import EventBus
from .delivery import DeliveryClass
from .errors import (
    BusClosed,
    ConfigurationError,
    InvalidEvent,
    InvalidFilter,
    PluginError,
    PublishBufferFull,
    Reject,
    SSEPluginError,
    StoreUnavailable,
)
from .events import Cursor, Event, StoredEvent
from .filters import Filter
from .frames import Delivery
from .hookspecs import NAME, hookimpl, hookspec
from .install import install
from .overflow import (
    Backlog,
    Block,
    Disconnect,
    Lag,
    Limits,
    Merge,
    Outcome,
    OverflowPolicy,
    ReadFromStore,
    Skip,
)
from .plugins import register_specs
from .security import BasicPassword
from .settings import Settings
from .stores import Appended, Bounds, EpochStart, EventStore, Evicted, Page, Retention, StoreListener
from .subscriber import Grant, Snapshot, Start, Subscriber

__all__ = [
    "install",
    "event_app",
    "EventBus",
    "Settings",
    "Event",
    "StoredEvent",
    "Cursor",
    "Filter",
    "Delivery",
    "Grant",
    "Reject",
    "BasicPassword",
    "Subscriber",
    "Start",
    "Snapshot",
    "NAME",
    "hookimpl",
    "hookspec",
    "register_specs",
    "OverflowPolicy",
    "Backlog",
    "Lag",
    "Limits",
    "Outcome",
    "Skip",
    "Merge",
    "Disconnect",
    "ReadFromStore",
    "Block",
    "DeliveryClass",
    "EventStore",
    "StoreListener",
    "Retention",
    "Appended",
    "Bounds",
    "EpochStart",
    "Page",
    "Evicted",
    "SSEPluginError",
    "ConfigurationError",
    "PluginError",
    "InvalidEvent",
    "InvalidFilter",
    "PublishBufferFull",
    "StoreUnavailable",
    "BusClosed",
]
