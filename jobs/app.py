"""The composition root: the only place where the parts are put together."""

import inspect
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import sqlalchemy

from beatless.client import Client
from beatless.client.base import DEFAULT_APP
from beatless.client.queue_limit import QueueLimit
from beatless.failures import Failures, OnFailure
from beatless.namespaces import stored_id
from beatless.observe import logs
from beatless.observe.export import export_from_worker
from beatless.observe.metrics import Metrics
from beatless.observe.tracing import PublishSpans, Tracing
from beatless.orchestrator.celery_task import is_celery_task
from beatless.orchestrator.child_elements import check_child_elements
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Lease, Leases
from beatless.orchestrator.limit import check_kinds
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Plan, Step, on_cancel_steps
from beatless.orchestrator.records import new_run_id
from beatless.orchestrator.schedule import Schedule, check_schedules
from beatless.outbox import forks
from beatless.outbox.faults import CrashPoints
from beatless.outbox.observer import Observer, fan_out
from beatless.outbox.queries import Queries
from beatless.outbox.sessions import OWN
from beatless.postgres import async_engine, connect_directly, dispose, engine
from beatless.queues import Queues
from beatless.redaction import Redact, Redaction, ShownClient
from beatless.settings import Settings
from beatless.streams.streams import Streams
from beatless.transactions import needs_transactions, set_in_each_transaction
from beatless.worker import canary

# Imported at run time where they are used: Celery, kombu and redis are half of the time to start,
# and a client that starts and reads runs needs none of them.
if TYPE_CHECKING:
    import redis
    from kombu import Connection
    from redis import asyncio as aioredis
    from sqlalchemy.ext.asyncio import AsyncEngine

    from beatless.orchestrator.firing import Firing
    from beatless.orchestrator.fleet_watch import FleetWatch
    from beatless.outbox.chores import Chore
    from beatless.outbox.direct_connection import DirectConnection
    from beatless.outbox.relay import Relay
    from beatless.worker.executors import Executors
    from beatless.worker.tasks import RunsCelery

REDIS_TIMEOUTS: dict[str, Any] = {
    "socket_timeout": 5,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
}


PUBLISH_TIMEOUTS = {"socket_timeout": 2, "socket_connect_timeout": 1}
"""A relay dispatches nothing while it publishes events."""

VERSION = metadata.version("beatless")

HOST_CHARS = 20
"""Of a host, in names of sessions: Postgres cuts them at 63 bytes, and threads that fail follow."""


def session_name(*process: str) -> str:
    """The application name of a session in Postgres, with the version: an upgrade looks for it."""
    return " ".join(("beatless", *process, VERSION))


def process_name() -> str:
    """This process and its host, as `4711@web-1`; short, as the name of a session is."""
    return f"{os.getpid()}@{socket.gethostname().partition('.')[0][:HOST_CHARS]}"


def check_plans(plans: object) -> tuple[Plan, ...]:
    """The plans of an App. Raises TypeError for anything else, with the way to one."""
    if isinstance(plans, Plan):
        raise TypeError(f"plans are a list: App(settings, plans=[{plans.name}])")
    if isinstance(plans, str) or not isinstance(plans, Iterable) or is_celery_task(plans):
        raise TypeError(f"plans are {plans!r:.200}; give a list: App(settings, plans=[checkout])")
    found: tuple[Any, ...] = tuple(plans)
    for each in found:
        if isinstance(each, Plan):
            continue
        advice = "give it a Plan"
        if isinstance(each, Step):
            advice = f'put the step into a plan: Plan("{each.name}", [{each.name}])'
        elif is_celery_task(each):
            advice = 'make the task a step of a plan: Plan("name", [Plan.task(…)])'
        elif inspect.isfunction(each):
            advice = f'decorate the function with @plan("{each.__name__}")'
        raise TypeError(f"plans have {each!r:.200}, which is no plan: {advice}")
    return found


class App:
    """Your plans and where they run. Opens no connection before something is done with it.

    `app.client` starts and follows runs, `app.celery` is the Celery app for workers and Flower
    (`celery -A myproject.app:celery worker`), `app.relay()` makes a relay.

    >>> from beatless import App, Plan, Settings, step
    >>> @step
    ... def charge(ctx): ...
    >>> settings = Settings(
    ...     database_url="postgresql://shop@db.example/shop",
    ...     redis_url="redis://redis.example:6379/0",
    ... )
    >>> app = App(settings, plans=[Plan("checkout", [charge])])
    >>> sorted(app.plans)
    ['checkout']
    >>> app.close()
    """

    def __init__(
        self,
        settings: Settings,
        plans: Iterable[Plan],
        *,
        schedules: Sequence[Schedule] = (),
        name: str = DEFAULT_APP,
        on_failure: OnFailure | None = None,
        redact: Redact | None = None,
    ) -> None:
        """`schedules` start runs of the plans, from the next `beatless migrate` on.

        They belong to the app of this `name`: apps with different ones can share a schema.

        `on_failure` is called once for each run that has failed for good, and each dead letter.

        In the process that wrote it, for five seconds at most; an exception of it is logged.

        `redact` decides how inputs, results, errors and traces are shown: on the page, over
        HTTP, on the command line, in logs, spans and Flower. Stored values stay.

        Raises PlanError when two plans, or two schedules, share a name, when limits of one name are
        of two kinds, and when a schedule or the function of a plan names a plan that is not among
        them: nobody would execute its runs.
        Raises TypeError for an argument of another type.
        """
        logs.enable_own_loggers()
        if not isinstance(settings, Settings):
            raise TypeError(
                f"settings are {type(settings).__name__}: give Settings(…), or those of the "
                "environment: App(Settings.from_env(), plans=[…])"
            )
        plans = check_plans(plans)
        for hook, called in (("on_failure", on_failure), ("redact", redact)):
            if called is not None and not callable(called):
                raise TypeError(f"{hook} is {called!r:.200}, which is no function")
        self.settings = settings
        self.plans = {plan.name: plan for plan in plans}
        if len(self.plans) < len(plans):
            names = [plan.name for plan in plans]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"two plans are called {', '.join(twice)}")
        check_kinds((plan.name, limit) for plan in plans for limit in plan.all_limits)
        for plan in plans:
            if isinstance(plan, FunctionPlan):
                plan.check_children(self.plans)
            else:
                check_child_elements(plan, self.plans)
        self.name = name
        self.schedules = tuple(schedules)
        check_schedules(self.schedules, self.plans)
        self._canary = canary.canary(plans)
        self.redact = redact
        self.redaction = Redaction(redact)
        self.tracing = Tracing(partial(self.redaction.value, "error"))
        self.on_failure = on_failure
        self._failures = None if on_failure is None else Failures(on_failure)
        if self._canary.name in self.plans:
            raise PlanError(f"the plan {self._canary.name} is beatless's own: choose another name")
        self.journal = Journal(settings.schema, max_event_bytes=settings.max_event_bytes)
        self.leases = Leases(settings.schema, seconds=settings.lease_seconds)
        self.queries = Queries(settings.schema)
        self.faults = CrashPoints(settings.fault)
        direct, password = not settings.pooled, settings.password("database")
        self.engine = engine(
            settings.database_url,
            session_name(),
            direct=direct,
            password=password,
            isolation_level="READ COMMITTED",
        )
        # No more than there are steps at a time: one must not wait for the end of another.
        self._steps_engine = engine(
            settings.database_url, session_name(), direct=direct, password=password, pool_size=0
        )
        self._relays_redis: list[redis.Redis] = []
        self.metrics = Metrics(
            [*plans, self._canary],
            self.engine,
            settings.schema,
            schedules=[each.name for each in self.schedules],
        )
        self._bounded_engines: list[sqlalchemy.Engine] = []
        self.streams = self.streams_on(self.engine)
        self.queue_limit = QueueLimit(
            settings.schema,
            most=settings.max_queues,
            plans={plan.queue for plan in (*plans, self._canary)},
        )
        self.queues = self._queues_on(self.engine)
        self.client = self.client_for("default")
        self._making = threading.RLock()
        self._executors: Executors | None = None
        self._celery: RunsCelery | None = None
        forks.watch(self)

    if not TYPE_CHECKING:  # a type checker tells of attributes that are not there

        def __getattr__(self, name: str) -> Any:
            text = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name == "user_options":  # the first that Celery's command asks of what -A names
                text += (
                    ": -A names an App of beatless, not a Celery app; write `celery = app.celery` "
                    "in its module, and -A module:celery"
                )
            raise AttributeError(text, name=name, obj=self)

    @property
    def celery(self) -> "RunsCelery":
        """The Celery app of this app's workers, made at its first use: a task for each plan."""
        from beatless.worker.composition import make_celery

        with self._making:
            if self._celery is None:
                self._celery = make_celery(
                    self.settings,
                    [*self.plans.values(), self._canary],
                    executors=self.executors,
                    leases=self.leases,
                    metrics=self.metrics,
                    fleet=self._fleet_watch(),
                )
            return self._celery

    @property
    def executors(self) -> "Executors":
        """The executors of this process, made at their first use."""
        from beatless.worker.executors import Executors

        with self._making:
            if self._executors is None:
                self._executors = Executors(
                    settings=self.settings,
                    journal=self.journal,
                    leases=self.leases,
                    engine=self._steps_engine,
                    new_async_engine=self._new_async_engine,
                    faults=self.faults,
                    counts=self.metrics.worker,
                    scope=self._scope,
                    observer=fan_out(self.tracing.observe, self._failures),
                    on_process=self._on_worker_process,
                    shown_error=partial(self.redaction.value, "error") if self.redact else None,
                    plans=self.plans,
                )
            return self._executors

    def _new_async_engine(self) -> "AsyncEngine":
        """For transactional steps that are `async def`."""
        return async_engine(
            self.settings.database_url,
            session_name(),
            direct=not self.settings.pooled,
            password=self.settings.password("database"),
            pool_size=0,  # as for the others
        )

    def after_fork(self) -> None:
        self._making = threading.RLock()
        for each in (self.engine, self._steps_engine, *self._bounded_engines):
            each.dispose(close=False)

    def client_for(
        self,
        namespace: str,
        *,
        canary: bool = False,
        shown: bool = False,
        engine: sqlalchemy.Engine | None = None,
        kind: type[Client] = Client,
    ) -> Client:
        """A client that sees the runs of one namespace, and no others.

        `canary` gives it the plan of `beatless doctor` instead of yours; `engine` is one of
        `bounded_engine`. `shown` is for processes that display its results: see `redact`. `kind`
        is the class that is made.
        """
        if shown and self.redaction.active:
            kind = type("ShownClient", (ShownClient, kind), {"redaction": self.redaction})
        return kind(
            plans={self._canary.name: self._canary} if canary else self.plans,
            journal=self.journal,
            engine=engine or self.engine,
            streams=self.streams,
            queues=self._queues_on(engine) if engine else self.queues,
            namespace=namespace,
            queue_limit=self.queue_limit,
            tracing=self.tracing,
            app_name=self.name,
        )

    def bounded_engine(
        self, *, lock_s: float, statement_s: float, **pool: Any
    ) -> sqlalchemy.Engine:
        """For a server: no statement waits for a lock, or works, for longer than that."""
        limits = {
            "lock_timeout": str(round(lock_s * 1000)),
            "statement_timeout": str(round(statement_s * 1000)),
        }
        bounded = engine(
            self.settings.database_url,
            session_name(),
            direct=not self.settings.pooled,
            session=OWN | limits,
            isolation_level="READ COMMITTED",
            **pool,
        )
        if self.settings.pooled:
            set_in_each_transaction(bounded, limits)
        self._bounded_engines.append(bounded)
        return bounded

    def streams_on(self, engine: sqlalchemy.Engine) -> Streams:
        """Streams that read the journal through this engine."""
        # One statement is its own transaction: no BEGIN and COMMIT around it.
        limited = needs_transactions(engine)
        return Streams(
            journal=self.journal,
            engine=engine if limited else engine.execution_options(isolation_level="AUTOCOMMIT"),
            redis_client=self.redis,
            aredis_client=self.aredis,
            prefix=self.settings.prefix,
            observer=self.metrics.streams,
        )

    def _queues_on(self, engine: sqlalchemy.Engine) -> Queues:
        return Queues(
            engine=engine,
            schema=self.settings.schema,
            prefix=self.settings.prefix,
            broker=self._broker,
        )

    def _scope(
        self, lease: Lease, step: str | None, attempt: int
    ) -> AbstractContextManager[str | None]:
        return logs.LogScope(lease, step, attempt, self.tracing.scope(lease, step, attempt))

    @staticmethod
    def _on_worker_process() -> None:
        export_from_worker("beatless-worker", os.environ)

    def _broker(self) -> "Connection":
        return self.celery.connection_for_write()

    def redis(self) -> "redis.Redis":
        """A new Redis client for events."""
        return self.settings.redis.client(**REDIS_TIMEOUTS)

    def aredis(self) -> "aioredis.Redis":
        """`redis` for asyncio."""
        return self.settings.redis.aclient(socket_connect_timeout=5, socket_keepalive=True)

    def direct_connection(self) -> "DirectConnection":
        """A new session of the relay: autocommit, never through a pooler."""
        from beatless.outbox.direct_connection import DirectConnection

        return connect_directly(
            self.settings,
            f"{session_name('relay')} {process_name()}",
            DirectConnection,
            prepare_threshold=1,  # nearly all of its statements are repeated
        )

    def _fleet_watch(self) -> "partial[FleetWatch] | None":
        """Makes watches over workers; none behind a pooler, where no session is a process's."""
        from beatless.orchestrator.fleet_watch import FleetWatch

        if self.settings.pooled:
            return None
        return partial(FleetWatch, self.settings.schema, self.leases, self.watch_connection)

    def watch_connection(self, name: str) -> "DirectConnection":
        """A new session of a watch over workers."""
        from beatless.orchestrator.fleet_watch import CLIENT_CHECK_INTERVAL
        from beatless.outbox.direct_connection import DirectConnection

        return connect_directly(
            self.settings, name, DirectConnection, client_check=CLIENT_CHECK_INTERVAL
        )

    def chores(self) -> "list[Chore]":
        """The relay's periodic work beside its drains: retention."""
        from beatless.orchestrator.retention import Retention

        if self.settings.retention_days == 0:
            return []
        return [
            Retention(
                self.settings.schema,
                events_days=self.settings.retention_days,
                runs_days=self.settings.run_retention_days,
                faults=self.faults,
            )
        ]

    def firing(self) -> "Firing":
        """The part of a relay that fires the ticks of schedules."""
        from beatless.orchestrator.cancels import Cancels
        from beatless.orchestrator.firing import Firing

        return Firing(
            self.settings.schema,
            Cancels(self.settings.schema, max_event_bytes=self.settings.max_event_bytes),
            undo=on_cancel_steps(self.plans.values()),
            new_run_id=lambda namespace: stored_id(namespace, new_run_id()),
            faults=self.faults,
        )

    def relay(self, *, observer: Observer | None = None, **options: Any) -> "Relay":
        """A relay for this app's schema; options are fields of `RelayConfig`, in seconds."""
        from beatless.orchestrator.children import CancelsChildren
        from beatless.orchestrator.deadlines import AdoptsDeadlines, Deadlines
        from beatless.orchestrator.ended_runs import CountsEndedRuns
        from beatless.orchestrator.limits import LooksAtLimits
        from beatless.orchestrator.successors import NotesSuccessors
        from beatless.orchestrator.wakes import Wakes
        from beatless.orchestrator.watch_thread import WatchThread
        from beatless.outbox.config import RelayConfig
        from beatless.outbox.publishers import CeleryTaskPublisher, RedisEventPublisher
        from beatless.outbox.relay import Relay

        client = self.settings.redis.client(**REDIS_TIMEOUTS | PUBLISH_TIMEOUTS)
        self._relays_redis.append(client)
        cancels = CancelsChildren(self.journal, on_cancel_steps(self.plans.values()))
        watch, seen = self._fleet_watch(), fan_out(self.metrics.relay, observer)
        config = RelayConfig(
            connect=self.direct_connection,
            queries=self.queries,
            events=RedisEventPublisher(client, self.settings.prefix),
            tasks=CeleryTaskPublisher(self.celery, self.settings.prefix),
            redispatch=self.settings.redispatch_seconds,
            overdue=Deadlines(self.settings.schema).end,
            fire=self.firing().fire,
            wake=Wakes(self.settings.schema, cancels).wake,
            chores=[
                *self.chores(),
                AdoptsDeadlines(self.settings.schema),
                CountsEndedRuns(self.settings.schema),
                NotesSuccessors(self.settings.schema),
                LooksAtLimits(self.settings.schema),
            ],
            companions=[WatchThread(watch(observer=seen), observer=seen)] if watch else (),
            failing=self.metrics.relay.failing,
            faults=self.faults,
            observer=fan_out(self.metrics.relay, PublishSpans(), self._failures, observer),
        )
        return Relay(replace(config, **options))

    def close(self) -> None:
        """Close the connections of this process."""
        for each in (self.engine, self._steps_engine, *self._bounded_engines):
            dispose(each)
        if self._celery is not None:
            self._celery.close()
        for client in self._relays_redis:
            client.close()
