"""The event bus: what a host holds. It puts log, publisher, subscriptions and plugins together and owns their tasks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import anyio
import anyio.abc
import anyio.from_thread
import anyio.lowlevel
import pluggy

from . import draining
from .clock import Clock, SystemClock
from .deliveries import Deliveries
from .delivery import DeliveryClasses
from .delivery_table import builtin_delivery_classes
from .errors import BusClosed, ConfigurationError
from .events import Cursor, Event, Scope
from .filters import Filter
from .frames import OBJECT, Delivery, Envelope
from .ids import event_ids
from .liveness import Liveness
from .log import Log
from .overflow import Limits, OverflowPolicy, PolicyRegistry
from .plugins import Plugins
from .policies import builtin_policies
from .publisher import Publisher, closed
from .roster import Roster
from .settings import Settings
from .siblings import has_siblings
from .signals import chained_signals
from .stores import EventStore, StoreRegistry
from .stores.memory import open_memory
from .stores.redis import SCHEMES as REDIS_SCHEMES
from .stores.redis import open_redis
from .stores.sqlite import open_sqlite
from .subscriber import AT_HEAD, Grant, Mode, Start, Subscriber
from .subscription import Services, Subscription
from .wakeup import on_asyncio

logger = logging.getLogger("opencode_sse")
Chunk = TypeVar("Chunk")

State = Literal["new", "running", "draining", "closed"]
_FINISH_PUBLISHES: Final = 1.0
_FINISH_PLUGINS: Final = 5.0
_FINISH_LEAVING: Final = 0.5
_APART: Final = (
    "several workers of this server run over memory:// stores, so that each has its own stream: a client sees only "
    "what its worker publishes, and its cursor expires at another one. Run one worker, or let all share a store: "
    "OPENCODE_SSE_STORE=sqlite:///events.db"
)


class EventBus:
    """One event stream: publish into it, subscribe to it, mount it.

    Start it with ``async with bus:`` (asyncio and trio), with :meth:`start` (asyncio), or let :func:`install` do it.

    :param settings: a :class:`Settings` is taken as it is; a mapping gives arguments over environment, ``sse_settings``
        plugin and defaults; ``None`` leaves everything to those.
    :param store: instead of the one ``settings.store`` names; the bus opens and closes it.
    :param plugins: instead of those found by entry points.
    :param defaults: what stands below plugins and environment, where it is not ``Settings()``.
    :param plugin_manager: a host's own pluggy manager, whose plugins may implement our hooks too.
    :raises ConfigurationError, PluginError: if settings or required plugins cannot work.
    """

    def __init__(
        self,
        settings: Settings | Mapping[str, Any] | None = None,
        *,
        store: EventStore | None = None,
        plugins: Plugins | None = None,
        plugin_manager: pluggy.PluginManager | None = None,
        clock: Clock | None = None,
        defaults: Settings | None = None,
    ) -> None:
        found = plugins is None
        if plugins is None:
            given = settings if isinstance(settings, Settings) else Settings.load(settings)
            plugins = Plugins(required=given.plugins, disabled=given.disabled_plugins)
        self.plugins = plugins
        if plugin_manager is not None:
            plugins.add_manager(plugin_manager)
        self.settings = (
            settings
            if isinstance(settings, Settings)
            else Settings.load(settings, plugin=self.plugins.settings, defaults=defaults)
        )
        if found:
            plugins.publish_errors = self.settings.publish_errors
            plugins.disable(self.settings.disabled_plugins)
        self._limits = Limits(self.settings.queue_max, self.settings.queue_max_bytes)
        self.policies = PolicyRegistry()
        self.stores = StoreRegistry()
        self.delivery = DeliveryClasses()
        builtin_policies(self.policies)
        builtin_delivery_classes(self.delivery.register)
        self.stores.register("memory", open_memory)
        self.stores.register("sqlite", open_sqlite)
        for scheme in REDIS_SCHEMES:
            self.stores.register(scheme, open_redis)
        self.plugins.connect(self.policies.register, self.stores.register, self.delivery.register)
        if found:
            # Again: an ``sse_settings`` plugin may have named more, and one may have failed to register.
            plugins.require(self.settings.plugins)
        self.policies.create(self.settings.overflow)  # A misspelt name fails now, not at the first overflow.
        self.store = store if store is not None else self.stores.create(self.settings.store, self.settings)
        self.clock: Clock = clock or SystemClock()
        self._ids = event_ids()
        self._state: State = "new"
        self._tasks: anyio.abc.TaskGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._started_at = 0.0
        self._after_drain: Callable[[], None] | None = None
        self._roster = Roster(self.settings, self.plugins, self.policies, lambda: self._state == "running")

    # Running.

    async def __aenter__(self) -> EventBus:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            await self._open(self._tasks)
        except BaseException:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        with anyio.CancelScope(shield=True):
            await self.drain()
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(kind, error, trace)

    async def start(self) -> None:
        """Start without a scope around it, on asyncio; :meth:`drain` ends it. A running bus is left as it is.

        :raises StoreUnavailable: if the store cannot be opened; whatever ``sse_startup`` raises.
        """
        if self._state == "running":
            return
        if self._state == "draining":
            raise closed()
        if not on_asyncio():
            raise BusClosed("start() needs asyncio; on trio use `async with bus:`")
        if self._runner is None:
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._runner = asyncio.create_task(self._run(ready), name="opencode-sse-bus")
            self._ready = ready
        await asyncio.shield(self._ready)

    async def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            with chained_signals(self.drain_soon):  # Where no lifespan does it.
                async with anyio.create_task_group() as tasks:
                    self._tasks = tasks
                    await self._open(tasks)
                    ready.set_result(None)
        except BaseException as error:
            if ready.done():
                raise
            self._runner = None
            ready.set_exception(error)

    async def _open(self, tasks: anyio.abc.TaskGroup) -> None:
        if self._state not in ("new", "closed"):
            raise closed()
        self._drained = anyio.Event()
        self._drain_asked = anyio.Event()
        self._watching = False
        settings = self.settings
        self.log = Log(self.store, self._limits, self._moved, self._woken, settings.loop_share)
        await self.log.open()
        if self.store.kind == "memory" and has_siblings():
            logger.warning(_APART)
        self._thread = threading.get_ident()
        self._token = anyio.lowlevel.current_token()
        self._publisher = Publisher(self.log, self.plugins, settings, self._ids)
        self._roster.services = Services(
            self.log, settings, self.plugins, self.policies, self.delivery, self.clock, self._ids, self._roster.counters
        )
        self._liveness = Liveness(self.log, settings, self.plugins, self.clock, self._roster.subscriptions)
        self._started_at = time.time()
        for task in (
            self.log.show_arrivals,
            self._publisher.run,
            self._publisher.watch,
            self._liveness.run,
            self._drain_when_asked,
        ):
            tasks.start_soon(task)
        self._state = "running"
        try:
            await self.plugins.startup(self)
        except BaseException:
            self._state = "closed"
            await self.store.close()
            raise

    def _moved(self) -> None:
        if self._state != "new":
            self._liveness.moved()

    def _woken(self) -> None:
        if self._state != "new":
            self._liveness.woken()

    @property
    def state(self) -> State:
        """``new``, ``running``, ``draining`` or ``closed``."""
        return self._state

    @property
    def running(self) -> bool:
        """Whether it takes events and subscribers."""
        return self._state == "running"

    @property
    def head(self) -> int:
        """Sequence number of the newest visible event; 0 for an empty log."""
        return self.log.head

    @property
    def epoch(self) -> str:
        """The current epoch."""
        return self.log.epoch

    async def drain(self) -> None:
        """End well: finish publishes, tell and end every stream, close the store. A second call waits for the first.

        Takes at most about two seconds, however many subscribers are stalled.
        """
        if self._state == "draining":
            await self._drained.wait()
        if self._state != "running":
            return
        self._state = "draining"
        # Whoever asked may be cancelled while this goes on, but half a drain would leave everybody waiting for ever.
        with anyio.CancelScope(shield=True):
            await self._publisher.finish(_FINISH_PUBLISHES)
            await draining.end_streams(self._roster.subscriptions, self.settings.retry, self._roster.one_left)
            with anyio.move_on_after(_FINISH_PLUGINS):
                await self.plugins.shutdown(self)
            await self.store.close()
        self._state = "closed"
        self._drained.set()
        if self._tasks is not None and self._runner is not None:
            self._tasks.cancel_scope.cancel()
            self._runner = None

    def drain_soon(self, then: Callable[[], None] | None = None) -> None:
        """Begin to drain, from a callback of the event loop: not a task, so that no task can be started there.

        :param then: called when everyone has been told.
        """
        if self._state in ("running", "draining"):
            self._after_drain = then
            self._drain_asked.set()
        elif then is not None:
            then()

    def drain_when(self, stopping: Callable[[], Awaitable[object]]) -> None:
        """Drain when this returns, for a server whose signals do not reach this process; the first one counts."""
        if not self._watching and self._tasks is not None:
            self._watching = True
            self._tasks.start_soon(self._drain_after, stopping)

    async def _drain_after(self, stopping: Callable[[], Awaitable[object]]) -> None:
        await stopping()
        self.drain_soon()

    async def _drain_when_asked(self) -> None:
        await self._drain_asked.wait()
        await self.drain()
        if self._after_drain is not None:
            with anyio.move_on_after(_FINISH_LEAVING, shield=True):
                while self._roster.subscriptions:
                    await self._roster.one_left()
            self._after_drain()

    # Publishing.

    async def publish(
        self,
        event: Event | str,
        properties: Mapping[str, Any] | None = None,
        *,
        id: str = "",
        directory: str | None = None,
        project: str | None = None,
        workspace: str | None = None,
        scope: Scope = "instance",
    ) -> int | None:
        """Store one event and give it to everyone who may see it.

        :param event: an :class:`Event`, or a type whose properties and places follow.
        :return: its sequence number, once as durable as the store promises; ``None`` if a plugin dropped it.
        :raises InvalidEvent: if it cannot be published. :raises StoreUnavailable: if the store did not take it.
        :raises BusClosed: if the bus does not run.
        """
        if self._state != "running":
            raise closed()
        if isinstance(event, str):
            stored = self._publisher.prepare_parts(event, properties or {}, id, directory, project, workspace, scope)
        else:
            stored = self._publisher.prepare(event)
        if stored is None:
            return None
        return (await self._publisher.append((stored,))).seqs[0]

    async def publish_batch(self, events: Sequence[Event]) -> list[int | None]:
        """Store all or none of a batch, neighbours in the log.

        :return: a sequence number for each, ``None`` where a plugin dropped one.
        :raises InvalidEvent: with the ``index`` of the first bad one; all else as :meth:`publish`.
        """
        return (await self.publish_batch_counting(events))[0]

    async def publish_batch_counting(self, events: Sequence[Event]) -> tuple[list[int | None], int]:
        """As :meth:`publish_batch`, and how many were known already."""
        if self._state != "running":
            raise closed()
        prepared = [self._publisher.prepare(event, index) for index, event in enumerate(events)]
        kept = [event for event in prepared if event is not None]
        if not kept:
            return [None] * len(prepared), 0
        appended = await self._publisher.append(kept)
        seqs = iter(appended.seqs)
        return [None if event is None else next(seqs) for event in prepared], appended.duplicates

    def publish_nowait(
        self,
        event: Event | str,
        properties: Mapping[str, Any] | None = None,
        *,
        id: str = "",
        directory: str | None = None,
        project: str | None = None,
        workspace: str | None = None,
        scope: Scope = "instance",
    ) -> None:
        """Accept one event for storing, in call order, without waiting; parameters as :meth:`publish`.

        :raises PublishBufferFull: if ``publish_buffer`` events wait already. :raises InvalidEvent, BusClosed: as
            ``publish``; BusClosed from another thread, which has :meth:`publish_from_thread`.
        """
        if self._state != "running":
            raise closed()
        if threading.get_ident() != self._thread:
            raise BusClosed("publish_nowait belongs to the event loop's thread; use publish_from_thread here")
        if isinstance(event, str):
            stored = self._publisher.prepare_parts(event, properties or {}, id, directory, project, workspace, scope)
        else:
            stored = self._publisher.prepare(event)
        if stored is not None:
            self._publisher.append_nowait((stored,))

    def publish_from_thread(
        self, event: Event | str, properties: Mapping[str, Any] | None = None, **place: Any
    ) -> int | None:
        """Publish from a thread that is not the event loop's, and wait for the result; as :meth:`publish`."""
        if self._state != "running":
            raise closed()
        call = partial(self.publish, event, properties, **place)
        result: int | None = anyio.from_thread.run(call, token=self._token)
        return result

    # Subscribing.

    @asynccontextmanager
    async def subscribe(
        self,
        filter: Filter = Filter(),
        *,
        after: int | str | None = None,
        limits: Limits | None = None,
        overflow: OverflowPolicy | str | None = None,
        caller: str = "",
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        """Read the stream in-process, under the same rules as a client: limits, overflow policy, losses told.

        :param after: sequence number or ``EPOCH:SEQ`` to resume after; ``None`` begins at the head.
        :return: deliveries, control frames among them; the iteration ends when the stream does.
        :raises Reject: if a plugin refuses. :raises BusClosed: if the bus does not run.
        :raises ConfigurationError: for an unknown policy or parameter, or limits that are none.
        """
        start, mode = AT_HEAD, "live"
        if after is not None:
            mode = "resume"
            cursor = Cursor(None, after) if isinstance(after, int) else Cursor.parse(after)
            start = Start(cursor, requested=str(after))
        subscriber = self.new_subscriber("object", filter, Grant.everything(caller), mode=mode, start=start)  # type: ignore[arg-type]
        if limits is not None:
            subscriber.limits = limits
        if overflow is not None:
            subscriber.policy = self.policies.of(overflow)
        try:
            subscriber.check()
        except TypeError as error:
            raise ConfigurationError(str(error)) from error
        subscription = await self.attach(subscriber, OBJECT)
        try:
            yield Deliveries(subscription)
        finally:
            self.detach(subscription)

    def new_subscriber(
        self,
        route: str,
        filter: Filter,
        grant: Grant,
        *,
        mode: Mode = "live",
        start: Start = AT_HEAD,
        snapshot: bool = False,
        sees_abort: bool = True,
    ) -> Subscriber:
        """Describe a connection that is about to attach, with the bus's limits and the grant's filter."""
        return Subscriber(
            id=uuid.uuid4().hex[:12],
            route=route,
            filter=grant.filter & filter,
            limits=self._limits,
            grant=grant,
            mode=mode,
            start=start,
            snapshot=snapshot,
            sees_abort=sees_abort,
            since=time.time(),
        )

    async def attach(
        self, subscriber: Subscriber, envelope: Envelope[Chunk], request: Any = None
    ) -> Subscription[Chunk]:
        """Let a subscriber in: plugins look at it, its policy is chosen, its position begins.

        :raises Reject: if a plugin refuses, the bus drains, or there are ``max_subscribers`` already.
        """
        subscription = await self._roster.attach(subscriber, envelope, request)
        self._liveness.watch(subscription)
        return subscription

    def set_overflow_policy(self, subscriber: Subscriber, policy: OverflowPolicy | str) -> None:
        """Put another policy in charge of a live subscriber, as a hook or route knows it.

        What it lost so far is told first, under the policy that lost it.

        :raises ConfigurationError: for an unknown policy or parameter. :raises LookupError: if it has left.
        """
        self._roster.set_overflow_policy(subscriber, self.policies.of(policy))

    def detach(self, subscription: Subscription[Any]) -> None:
        """A subscriber left."""
        self._liveness.forget(subscription)
        self._roster.detach(subscription)

    # Looking.

    def statistics(self, caller: Grant | None = None) -> dict[str, Any]:
        """The JSON of ``/event/status``.

        :param caller: show only what this grant may see; ``None`` shows all.
        """
        held: Mapping[str, int] = getattr(self.store, "statistics", dict)()
        log, roster = self.log, self._roster
        return {
            "pid": os.getpid(),
            "state": self._state,
            "since": self._started_at,
            "store": {
                "kind": self.store.kind,
                "epoch": log.epoch,
                "oldest": log.channels.oldest(log.head),
                "latest": log.head,
                **held,
            },
            "subscribers": roster.statistics(self.clock.now(), caller),
            "plugins": [info.to_dict() for info in self.plugins.info()],
            "counters": {**self._publisher.counters, "failed": self.plugins.failed_publishes, **roster.sums()},
        }
