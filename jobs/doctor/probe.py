"""Connections to the servers of one stack, and facts about it that several checks need."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import psycopg
import redis
from kombu.exceptions import KombuError, OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import exc

from beatless.app import App
from beatless.doctor.finding import Hop, Verdict, unreachable
from beatless.errors import JobsError
from beatless.orchestrator.errors import OrchestratorError
from beatless.outbox.statements import statements
from beatless.postgres import connect, connect_directly
from beatless.redis_urls import RedisUrl
from beatless.schema import current, head

APPLICATION_NAME = "beatless doctor"
"""Of its sessions in pg_stat_activity."""

REDIS_TIMEOUT_S = 2
"""In which a Redis must answer that may be frozen."""

BROKER_TIMEOUT_S = 5
BROKER_RETRY_S = 0.2
INSPECT_TIMEOUT_S = 1.5
"""Until workers have answered a broadcast."""

CLOCK_READINGS = 5
"""Of them the fastest round trip gives the offset, to half of its time."""

Row = tuple[Any, ...]

SERVER_ERRORS = (
    psycopg.Error,
    exc.SQLAlchemyError,
    redis.RedisError,
    KombuError,
    OperationalError,
    JobsError,
    OrchestratorError,
    OSError,
)
"""Errors of the stack, not of a fault in a check."""


class Need(Enum):
    """A precondition of checks. Its value is the name of the check that reports on it."""

    POSTGRES = "postgres"
    PRIMARY = "primary"
    SCHEMA = "schema"
    """A schema that this version can read."""
    REDIS = "redis"
    BROKER = "broker"


def impatient(server: RedisUrl) -> redis.Redis:
    """A client that asks once."""
    return server.client(
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


NEED_POSTGRES = frozenset({Need.POSTGRES, Need.PRIMARY, Need.SCHEMA})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Answers of the workers, by worker. Empty if none answers."""

    queues: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of those that it knows."""
    conf: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Its Celery settings."""
    active: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """The requests that it executes."""
    stats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Probe:
    """One examination of one stack: connections until its end, each fact found out at most once."""

    def __init__(
        self,
        app: App,
        *,
        api_url: str = "",
        flower_url: str = "",
        patience_s: float = 10.0,
        old_transaction_s: float = 60.0,
    ) -> None:
        self.app = app
        self.settings = app.settings
        self.schema = app.settings.schema
        self.api_url = api_url
        self.flower_url = flower_url
        self.patience_s = patience_s
        """Until a canary run counts as lost."""
        self.old_transaction_s = old_transaction_s
        """Age from which a transaction is reported."""
        self.hops: list[Hop] = []
        """The legs of the canary's way, once it is back."""
        self._postgres: psycopg.Connection[Any] | None = None
        self._redis: redis.Redis | None = None

    # Connections

    def open(self, stack: ExitStack, needs: Collection[Need]) -> Iterator[tuple[Need, Verdict]]:
        """Connect to the servers among the needs, until the stack ends.

        Yields one verdict for each that cannot be reached.
        """
        if not NEED_POSTGRES.isdisjoint(needs):
            try:
                self._postgres = stack.enter_context(connect(self.settings, APPLICATION_NAME))
            except psycopg.Error as error:
                verdict = unreachable("Postgres", error, setting="BEATLESS_DATABASE_URL")
                yield Need.POSTGRES, verdict
        if Need.REDIS in needs:
            try:
                client = stack.enter_context(impatient(self.settings.redis))
                client.ping()
                self._redis = client
            except (redis.RedisError, OSError) as error:
                yield Need.REDIS, unreachable("Redis", error, setting="BEATLESS_REDIS_URL")

    def missing(self, needs: Collection[Need]) -> str:
        """The reason why one of the needs is not met; empty if all are."""
        if not NEED_POSTGRES.isdisjoint(needs) and self._postgres is None:
            return "Postgres cannot be reached"
        if Need.PRIMARY in needs and self._is_replica:
            return "the database URL reaches a replica"
        if Need.SCHEMA in needs and not self._is_schema_usable:
            return f"schema {self.schema} is not what this version needs"
        if Need.REDIS in needs and self._redis is None:
            return "Redis cannot be reached"
        if Need.BROKER in needs and self.broker_error is not None:
            return "the broker cannot be reached"
        return ""

    @property
    def postgres(self) -> psycopg.Connection[Any]:
        """An autocommit connection to the database URL. Raises RuntimeError without the need."""
        if self._postgres is None:
            raise RuntimeError("the check does not name Need.POSTGRES")
        return self._postgres

    @property
    def redis(self) -> Any:
        """A client of the Redis URL: redis-py's answers are typed for both of its worlds.

        Raises RuntimeError without the need.
        """
        if self._redis is None:
            raise RuntimeError("the check does not name Need.REDIS")
        return self._redis

    def connect_directly(self) -> psycopg.Connection[Any]:
        """A connection to the listen URL. Raises psycopg.Error."""
        # Never prepared: the URL may lead through a pooler, which a check finds out.
        return connect_directly(
            self.settings, APPLICATION_NAME, psycopg.Connection, prepare_threshold=None
        )

    def sql(self, module: str, **numbers: float) -> dict[str, str]:
        """The statements of the `.sql` file beside a module of checks, which gives `__file__`."""
        return statements(module, self.schema, **numbers)

    def rows(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        """The rows of a statement on Postgres. Raises psycopg.Error."""
        return self.postgres.execute(statement.encode(), parameters).fetchall()

    # Facts about Postgres

    @cached_property
    def _is_replica(self) -> bool:
        sql = self.sql(__file__)
        try:
            return bool(self.rows(sql["is_replica"])[0][0])
        except psycopg.Error:
            return False  # the check `primary` reports it

    @cached_property
    def revision(self) -> str | None:
        """The migration that the schema is at; None if there is no schema. Raises psycopg.Error."""
        return current(self.postgres, self.schema)

    @property
    def _is_schema_usable(self) -> bool:
        try:
            return self.revision is not None and self.revision >= head()
        except psycopg.Error:
            return False  # the check `schema` reports it

    @cached_property
    def clock_offset_s(self) -> float:
        """Seconds by which Postgres' clock is ahead of this machine's. Raises psycopg.Error."""
        sql = self.sql(__file__)
        best, offset = float("inf"), 0.0
        for _ in range(CLOCK_READINGS):
            began = time.time()
            theirs = self.rows(sql["clock"])[0][0]
            ended = time.time()
            if ended - began < best:
                best, offset = ended - began, theirs - (began + ended) / 2
        return offset

    def leads(self) -> list[Row]:
        """(shard, session) of each lead of a relay; from `SHARDS` on they are the relays."""
        sql = self.sql(__file__)
        return self.rows(sql["leads"])

    # Facts about the broker and the workers

    @cached_property
    def broker_connected(self) -> tuple[str, float]:
        """The transport, and the seconds that a connection took. Raises kombu's errors."""
        began = time.perf_counter()
        if (server := self.settings.redis_broker) is not None:
            # kombu has no timeout for its first answer, and tries again.
            with impatient(server) as client:
                client.ping()
        with self.app.celery.connection_for_write() as connection:
            connection.ensure_connection(
                max_retries=1, interval_start=BROKER_RETRY_S, timeout=BROKER_TIMEOUT_S
            )
            return connection.transport_cls, time.perf_counter() - began

    @cached_property
    def broker_error(self) -> Exception | None:
        """The error of a connection to the broker; None if it can be reached."""
        try:
            _ = self.broker_connected
        except (KombuError, OperationalError, redis.RedisError, OSError) as error:
            return error
        return None

    @property
    def is_broker_redis(self) -> bool:
        """Whether the broker URL names a Redis."""
        return self.settings.broker_url.startswith(("redis", "rediss", "unix", "sentinel"))

    @cached_property
    def fleet(self) -> Fleet:
        """The answers of all workers to one broadcast each. Empty without a broker."""
        if self.broker_error is not None:
            return Fleet()
        control = self.app.celery.control
        with ThreadPoolExecutor(5) as pool:
            asked = {
                name: pool.submit(getattr(control.inspect(timeout=INSPECT_TIMEOUT_S), method))
                for name, method in (
                    ("queues", "active_queues"),
                    ("tasks", "registered"),
                    ("conf", "conf"),
                    ("active", "active"),
                    ("stats", "stats"),
                )
            }
            return Fleet(**{name: answer.result() or {} for name, answer in asked.items()})

    @cached_property
    def consumed_queues(self) -> dict[str, set[str]]:
        """The queues of each worker that answers, without the prefix."""
        prefix = f"{self.settings.prefix}."
        return {
            worker: {str(queue["name"]).removeprefix(prefix) for queue in found}
            for worker, found in self.fleet.queues.items()
        }

    def is_unconsumed(self, queue: str) -> bool:
        """Whether workers answer, and none of them consumes the queue."""
        consumed = self.consumed_queues.values()
        return bool(consumed) and not any(queue in names for names in consumed)
