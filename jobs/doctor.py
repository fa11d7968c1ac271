"""A live self-test of a stack: a run through every hop, and checks for what is known to go wrong.

Changes nothing but for its canary runs, which are in a namespace of their own and are removed. What
may not be asked (Redis' CONFIG on a managed server, say) is skipped and said.
"""

import json
import logging
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib import metadata
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psycopg
import redis
from kombu.exceptions import KombuError, OperationalError
from sqlalchemy import exc

from beatless import loopback
from beatless.app import REDIS_TIMEOUTS, App
from beatless.client import Client
from beatless.client.requests import new_run_id
from beatless.errors import BadRequest, JobsError, WaitTimeout, WrongEncoding
from beatless.namespaces import id_prefix
from beatless.orchestrator.errors import OrchestratorError
from beatless.orchestrator.events import EventType
from beatless.orchestrator.progress import UNKNOWN_STEP
from beatless.orchestrator.queues import PRESENCE_EXPIRES_S, QueueStatements
from beatless.outbox.clock import monotonic
from beatless.outbox.message import SHARDS, shard_of
from beatless.outbox.queries import channel_of, outbox_lag
from beatless.places import places
from beatless.postgres import connect, connect_directly
from beatless.redis_urls import is_replica
from beatless.schema import head
from beatless.streams.subscription import Subscription
from beatless.unfit_rows import unfit_rows
from beatless.worker import canary

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]

LONG_WAIT_S = 60.0
"""A run that has been due for longer is told."""

CANARIES = 3
"""Runs through the first queue; each hop's latency is their median."""

NAME = "beatless doctor"
"""What Postgres shows as the application of its sessions."""

PACKAGES = (
    ("celery", (5, 6), "a prefork worker takes one more message for each place than it executes"),
    ("kombu", (5, 7), "a relay makes a round trip to the broker for each message, not each batch"),
)
"""Since when a package lacks which weakness."""

POSTGRES = {
    # https://www.postgresql.org/support/security/ , release of 2026-08-13 (28 CVEs)
    18: (6, "CVE-2026-6471"),
    17: (11, "CVE-2026-6471"),
    16: (15, "CVE-2026-6471"),
    15: (19, "CVE-2026-6471"),
}
"""The minor version of each supported major that closes the last known holes, and one of them."""

REDIS = {
    # https://github.com/redis/docs/pull/3292 (2026-05), docker-library/official-images#20011
    (8, 6): (3, "CVE-2026-23479"),
    (8, 4): (3, "CVE-2026-23479"),
    (8, 2): (6, "CVE-2026-23479"),
    (8, 0): (4, "CVE-2025-49844"),
    (7, 4): (9, "CVE-2026-23479"),
    (7, 2): (11, "CVE-2025-49844"),
    (6, 2): (20, "CVE-2025-49844"),
}
VALKEY = {
    # https://github.com/valkey-io/valkey/releases , 2026-05 and 2026-07
    (9, 1): (1, "CVE-2026-56684"),
    (9, 0): (5, "CVE-2026-56684"),
    (8, 1): (7, "CVE-2026-23479"),
    (8, 0): (8, "CVE-2026-23479"),
    (7, 2): (13, "CVE-2026-23479"),
}

PEEKED = 50
"""Messages of each queue that are looked at."""

POOLED = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",
}
"""Limits by which sessions end that are not ours to set."""

BACKPORTS = (
    "unless the package is one of a distribution that has mended it under the old number: its "
    "changelog says so"
)
"""A server only tells its number."""

TROUBLE = (
    psycopg.Error,
    exc.SQLAlchemyError,
    redis.RedisError,
    KombuError,
    OperationalError,
    JobsError,
    OrchestratorError,
    OSError,
)


LOST_AFTER_S = 2.0
"""After a run's last event, until a body that is in it still counts as one that has lost it."""


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    PROBLEM = "problem"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check has found, and what to do about it."""

    check: str
    status: Status
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One leg of the canary's way. `seconds` is None if it could not be seen."""

    name: str
    seconds: float | None
    text: str


@dataclass(slots=True, kw_only=True)
class Flight:
    """What was seen of one canary run. Times are this process's."""

    run_id: str
    queue: str
    began: float = 0.0
    committed: float = 0.0
    rang: float | None = None
    heard: dict[str, float] = field(default_factory=dict)
    """When an event's type first came over Redis."""
    written: dict[str, float] = field(default_factory=dict)
    """When it was written."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    state: str = ""
    """Of its dispatch, at the end."""


Check = tuple[str, Callable[[], Iterable[Finding]], str]
"""Its name, what makes it, and what it needs: a server, the schema, or all for the canary."""


class Broken(Exception):
    """A canary run did not come back."""

    def __init__(self, hop: str, text: str, advice: str) -> None:
        super().__init__(hop, text, advice)
        self.hop = hop
        self.text = text
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.hop}: {self.text}"


class Doctor:
    """Examines the stack of one app.

    1. `examine` gives one finding after another, the servers first
    2. `fly` sends canary runs through the queues and measures each hop
    """

    def __init__(
        self,
        app: App,
        *,
        api_url: str = "",
        flower_url: str = "",
        patience: float = 10.0,
        old_transaction: float = 60.0,
    ) -> None:
        """`patience` is how many seconds a canary may take; `old_transaction` is seconds, too."""
        self._app = app
        self._settings = app.settings
        self._api_url = api_url
        self._flower_url = flower_url
        self._patience = patience
        self._old = old_transaction
        self._postgres: psycopg.Connection[Any] | None = None
        self._redis: redis.Redis | None = None
        self._schema_ok = False
        self.hops: list[Hop] = []

    # Everything, in order

    def examine(self, only: Collection[str] = ()) -> Iterator[Finding]:
        """Every check, or only the named ones. Closes what it has opened.

        Alone a check says what it says among all. One that cannot be made tells why, and so does
        the server that it needs. Raises BadRequest for a name that no check has.
        """
        checks = self._checks()
        if unknown := sorted(set(only) - {name for name, _, _ in checks}):
            names = ", ".join(name for name, _, _ in checks)
            raise BadRequest("--check", f"{unknown[0]!r} is none of these: {names}")
        return self._examine(checks, set(only))

    def _examine(self, checks: Sequence[Check], only: Collection[str]) -> Iterator[Finding]:
        chosen = [name for name, _, _ in checks if not only or name in only]
        needs = {need for name, _, need in checks if name in chosen}
        with ExitStack() as stack:
            if needs & {"postgres", "schema", "canary"}:
                try:
                    self._postgres = stack.enter_context(connect(self._settings, NAME))
                except psycopg.Error as error:
                    yield self._unreachable("postgres", "Postgres", error, "BEATLESS_DATABASE_URL")
            if needs & {"redis", "canary"} or "clocks" in chosen:
                try:
                    self._redis = stack.enter_context(self._app.redis())
                    self._redis.ping()
                except (redis.RedisError, OSError) as error:
                    self._redis = None
                    yield self._unreachable("redis", "Redis", error, "BEATLESS_REDIS_URL")
            for name, check, need in checks:
                needed = name == "schema" and needs & {"schema", "canary"}
                if name not in chosen and not needed:
                    continue
                if missing := self._missing(need):
                    if (name in only and name != need) or name == "canary":
                        text = f"not looked at: {missing}"
                        yield Finding(check=name, status=Status.SKIPPED, text=text)
                    continue
                try:
                    for finding in check():
                        if name in chosen or finding.status is Status.PROBLEM:
                            yield finding
                except redis.exceptions.NoPermissionError as error:
                    # The users of `deploy/redis` have no more rights than they need.
                    text = f"this server does not let its user look: {_said(error)}"
                    yield Finding(check=name, status=Status.SKIPPED, text=text)
                except TROUBLE as error:
                    yield Finding(
                        check=name,
                        status=Status.PROBLEM,
                        text=f"could not be checked: {_said(error)}",
                        advice="see whether the user of the URL has the rights for it",
                    )

    def _missing(self, need: str) -> str:
        """Why a check that needs this cannot be made; empty if it can."""
        if need in ("postgres", "schema", "canary") and self._postgres is None:
            return "Postgres cannot be reached"
        if need in ("schema", "canary") and not self._schema_ok:
            return f"schema {self._settings.schema} is not what this version needs"
        if need in ("redis", "canary") and self._redis is None:
            return "Redis cannot be reached"
        if need in ("broker", "canary") and self._broker_fault is not None:
            return "the broker cannot be reached"
        return ""

    def _checks(self) -> list[Check]:
        return [
            ("postgres", self._versions_postgres, "postgres"),
            ("primary", self._primary, "postgres"),
            ("encoding", self._encoding, "postgres"),
            ("sessions", self._sessions, "postgres"),
            ("schema", self._schema, "postgres"),
            ("listen", self._listen, "postgres"),
            ("notify queue", self._notify_queue, "postgres"),
            ("durability", self._durability, "postgres"),
            ("transactions", self._transactions, "postgres"),
            ("connections", self._connections, "postgres"),
            ("wraparound", self._wraparound, "postgres"),
            ("bloat", self._bloat, "schema"),
            ("redis", self._versions_redis, "redis"),
            ("eviction", self._eviction, "redis"),
            ("output buffers", self._buffers, "redis"),
            ("broker", self._broker, ""),
            ("shared broker", self._shared_broker, "schema"),
            ("clocks", self._clocks, "postgres"),
            ("packages", self._packages, ""),
            ("celery", self._celery, ""),
            ("visibility timeout", self._visibility, ""),
            ("relays", self._relays, "schema"),
            ("workers", self._workers, "broker"),
            ("places", self._places, "schema"),
            ("threads", self._threads, "schema"),
            ("plans", self._plans, "schema"),
            ("outbox", self._outbox, "schema"),
            ("queues", self._queues, "schema"),
            ("rows", self._unfit_rows, "schema"),
            ("api", self._api, ""),
            ("flower", self._flower, ""),
            ("canary", self._canary, "canary"),
        ]

    # What several checks need, whichever of them is asked for first

    @cached_property
    def _offset(self) -> float:
        """Seconds by which Postgres' clock is ahead of ours."""
        return self._measure_offset()

    @cached_property
    def _broker_took(self) -> tuple[str, float]:
        """The transport, and the seconds that a connection took."""
        began = time.perf_counter()
        with self._app.celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            return connection.transport_cls, time.perf_counter() - began

    @cached_property
    def _broker_fault(self) -> Exception | None:
        """Why the broker cannot be reached."""
        try:
            _ = self._broker_took
        except (KombuError, OperationalError, redis.RedisError, OSError) as error:
            return error
        return None

    @cached_property
    def _fleet(self) -> list[dict[str, Any]]:
        """Of each worker that answers: its queues, tasks and settings, what it does, its pool."""
        control = self._app.celery.control
        with ThreadPoolExecutor(5) as pool:
            asked = [
                pool.submit(getattr(control.inspect(timeout=1.5), name))
                for name in ("active_queues", "registered", "conf", "active", "stats")
            ]
            return [answer.result() or {} for answer in asked]

    @cached_property
    def _consumed(self) -> dict[str, set[str]]:
        """The queues that each worker consumes; empty if none answers."""
        prefix = f"{self._settings.prefix}."
        if self._broker_fault is not None:
            return {}
        return {
            worker: {str(queue["name"]).removeprefix(prefix) for queue in found}
            for worker, found in self._fleet[0].items()
        }

    def _unconsumed(self, queue: str) -> bool:
        """Whether workers answer, and none of them consumes the queue."""
        return bool(self._consumed) and not any(queue in names for names in self._consumed.values())

    @staticmethod
    def _unreachable(check: str, server: str, error: Exception, setting: str) -> Finding:
        return Finding(
            check=check,
            status=Status.UNREACHABLE,
            text=f"{server} cannot be reached: {_said(error)}",
            advice=f"see whether it runs, and what {setting} says",
        )

    def _connect_directly(self) -> psycopg.Connection[Any]:
        # Never prepared: the listen URL may lead through a pooler, which is what we find out.
        return connect_directly(self._settings, NAME, psycopg.Connection, prepare_threshold=None)

    def _rows(self, statement: str, parameters: Mapping[str, Any] | None = None) -> list[Row]:
        assert self._postgres is not None  # noqa: S101 - see `needs` of the checks
        return self._postgres.execute(statement.encode(), parameters).fetchall()

    @property
    def _client(self) -> Any:
        """Redis: redis-py's answers are typed for both of its worlds."""
        return self._redis

    # Postgres

    def _versions_postgres(self) -> Iterator[Finding]:
        number = int(self._rows("SHOW server_version_num")[0][0])
        major, minor = divmod(number, 10_000)
        began = time.perf_counter()
        self._rows("SELECT 1")
        took = (time.perf_counter() - began) * 1000
        text = f"PostgreSQL {major}.{minor}, {took:.1f} ms away"
        needed, hole = POSTGRES.get(major, (0, ""))
        if major < min(POSTGRES):
            yield Finding(
                check="postgres",
                status=Status.PROBLEM,
                text=f"{text}: too old",
                advice=f"beatless needs PostgreSQL {min(POSTGRES)} or newer",
            )
        elif minor < needed:
            yield Finding(
                check="postgres",
                status=Status.WARNING,
                text=f"{text}, older than {major}.{needed}, which closes {hole} and others",
                advice=f"update to {major}.{needed} or newer, {BACKPORTS}",
            )
        else:
            yield Finding(check="postgres", status=Status.OK, text=text)

    def _primary(self) -> Iterator[Finding]:
        standby, read_only = self._rows(
            "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on'"
        )[0]
        if standby:
            yield Finding(
                check="primary",
                status=Status.PROBLEM,
                text="the database URL reaches a replica: nothing can be started or executed",
                advice="let BEATLESS_DATABASE_URL name the primary, or add "
                "?target_session_attrs=read-write with all hosts",
            )
        elif read_only:
            yield Finding(
                check="primary",
                status=Status.PROBLEM,
                text="transactions are read-only by default for this user or database",
                advice="ALTER DATABASE … RESET default_transaction_read_only",
            )
        else:
            yield Finding(check="primary", status=Status.OK, text="the primary, and writable")

    def _encoding(self) -> Iterator[Finding]:
        name, encoding = self._rows(
            "SELECT current_database(), current_setting('server_encoding')"
        )[0]
        if encoding == "UTF8":
            yield Finding(check="encoding", status=Status.OK, text="UTF8: it holds every text")
            return
        error = WrongEncoding(name, encoding)
        yield Finding(
            check="encoding", status=Status.PROBLEM, text=error.problem, advice=error.advice
        )

    def _sessions(self) -> Iterator[Finding]:
        if not self._settings.pooled:
            text = "they set what they depend on, whatever role and database say"
            yield Finding(check="sessions", status=Status.OK, text=text)
            return
        wanted = {**POOLED, "default_transaction_isolation": "read committed"}
        found = self._rows(
            """
SELECT name, current_setting(name, true)
  FROM unnest(%(names)s::text[], %(values)s::text[]) AS s(name, value)
 WHERE current_setting(name, true) <> value""",
            {"names": list(wanted), "values": list(wanted.values())},
        )
        if not found:
            text = "role and database set no limits for what comes through the pooler"
            yield Finding(check="sessions", status=Status.OK, text=text)
            return
        yield Finding(
            check="sessions",
            status=Status.WARNING,
            text="through the pooler, whose sessions beatless cannot set, come "
            + ", ".join(f"{name} = {value}" for name, value in found),
            advice="ALTER ROLE … SET them, for beatless' role, to "
            + ", ".join(f"{name} = {wanted[name]}" for name, _ in found),
        )

    def _schema(self) -> Iterator[Finding]:
        name = self._settings.schema
        if not self._rows("SELECT to_regclass(%(t)s)", {"t": f"{name}.beatless_version"})[0][0]:
            found = None
        else:
            rows = self._rows(f"SELECT version_num FROM {name}.beatless_version")
            found = rows[0][0] if rows else None
        needed = head()
        if found == needed:
            self._schema_ok = True
            yield Finding(
                check="schema", status=Status.OK, text=f"schema {name} is at migration {needed}"
            )
        elif found is None:
            yield Finding(
                check="schema",
                status=Status.PROBLEM,
                text=f"schema {name} does not exist here",
                advice="run `beatless migrate`, or see what BEATLESS_SCHEMA says",
            )
        elif found < needed:
            yield Finding(
                check="schema",
                status=Status.PROBLEM,
                text=f"schema {name} is at migration {found}, behind this version's {needed}",
                advice="run `beatless migrate` before the new version",
            )
        else:
            self._schema_ok = True
            yield Finding(
                check="schema",
                status=Status.WARNING,
                text=f"schema {name} is at migration {found}, ahead of this version's {needed}",
                advice="this is an old version beside newer ones: finish the rollout",
            )

    def _listen(self) -> Iterator[Finding]:
        channel = channel_of(self._settings.schema)
        if len(channel.encode()) > 63:
            yield Finding(
                check="listen",
                status=Status.PROBLEM,
                text=f"the channel {channel} is longer than 63 bytes: LISTEN cuts it off silently",
                advice="choose a shorter BEATLESS_SCHEMA",
            )
            return
        try:
            ear = self._connect_directly()
        except psycopg.Error as error:
            yield self._unreachable("listen", "the listen URL", error, "BEATLESS_LISTEN_URL")
            return
        same = (
            "SELECT current_database(), pg_is_in_recovery(), system_identifier "
            "FROM pg_control_system()"
        )
        with ear:
            here = ear.execute(same.encode()).fetchone()
            there = self._rows(same)[0]
            if here is not None and (here[0], here[2]) != (there[0], there[2]):
                yield Finding(
                    check="listen",
                    status=Status.PROBLEM,
                    text=f"the listen URL reaches another database ({here[0]}) than the database "
                    f"URL ({there[0]}): relays would hear nothing",
                    advice="let both name the same server and database",
                )
                return
            private = f"beatless_doctor_{secrets.token_hex(6)}"
            ear.execute(f'LISTEN "{private}"'.encode())
            began = time.perf_counter()
            with self._connect_directly() as mouth:
                mouth.execute("SELECT pg_notify(%s, '')", (private,))
            came = list(ear.notifies(timeout=2.0, stop_after=1))
            took = (time.perf_counter() - began) * 1000
        if came:
            text = f"a NOTIFY arrives, {took:.1f} ms with a connection of its own"
            yield Finding(check="listen", status=Status.OK, text=text)
        else:
            yield Finding(
                check="listen",
                status=Status.PROBLEM,
                text="a NOTIFY does not arrive: a pooler in transaction mode, as PgBouncer, takes "
                "LISTEN and never delivers",
                advice="set BEATLESS_LISTEN_URL to a direct connection; the database URL may stay "
                "with the pooler",
            )

    def _notify_queue(self) -> Iterator[Finding]:
        usage = float(self._rows("SELECT pg_notification_queue_usage()")[0][0])
        text = f"{usage:.2%} of Postgres' queue of notifications is in use"
        if usage <= 0.01:
            yield Finding(check="notify queue", status=Status.OK, text=text)
            return
        yield Finding(
            check="notify queue",
            status=Status.PROBLEM if usage > 0.5 else Status.WARNING,
            text=f"{text}: a session listens and does not read, for it is in a transaction",
            advice="SELECT pid, application_name, xact_start FROM pg_stat_activity WHERE state = "
            "'idle in transaction' ORDER BY xact_start; end it. At 100 % commits fail",
        )

    def _durability(self) -> Iterator[Finding]:
        off = [
            name
            for name in ("fsync", "synchronous_commit", "full_page_writes")
            if self._rows(f"SHOW {name}")[0][0] == "off"
        ]
        if off:
            yield Finding(
                check="durability",
                status=Status.WARNING,
                text=f"{' and '.join(off)} off: a power cut takes back what was acknowledged",
                advice="leave them on wherever runs matter",
            )
        else:
            yield Finding(check="durability", status=Status.OK, text="what is committed is on disk")

    def _transactions(self) -> Iterator[Finding]:
        rows = self._rows(
            """
SELECT pid, coalesce(nullif(application_name, ''), backend_type), state,
       extract(epoch FROM clock_timestamp() - xact_start)::float8
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND xact_start < clock_timestamp() - make_interval(secs => %(old)s)
   AND backend_type = 'client backend'
 ORDER BY xact_start LIMIT 1""",
            {"old": self._old},
        )
        prepared = self._rows("SELECT count(*) FROM pg_prepared_xacts")[0][0]
        if prepared:
            yield Finding(
                check="transactions",
                status=Status.WARNING,
                text=f"{prepared} prepared transactions wait for somebody to end them",
                advice="SELECT * FROM pg_prepared_xacts; COMMIT or ROLLBACK PREPARED",
            )
        if rows:
            pid, name, state, age = rows[0]
            yield Finding(
                check="transactions",
                status=Status.WARNING,
                text=f"{name} (pid {pid}) is {state} in a transaction for {age:.0f} s: what is "
                "deleted meanwhile cannot be vacuumed",
                advice=f"SELECT pg_terminate_backend({pid}), or shorten it",
            )
        elif not prepared:
            text = f"none is older than {self._old:.0f} s"
            yield Finding(check="transactions", status=Status.OK, text=text)

    def _connections(self) -> Iterator[Finding]:
        used, limit = self._rows(
            """
SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')
         ::int"""
        )[0]
        text = f"{used} of {limit} connections are in use"
        if used > 0.8 * limit:
            yield Finding(
                check="connections",
                status=Status.WARNING,
                text=text,
                advice="raise max_connections, or put a pooler before workers and API "
                "(docs/settings.md has the number for each process)",
            )
        else:
            yield Finding(check="connections", status=Status.OK, text=text)

    def _wraparound(self) -> Iterator[Finding]:
        age = self._rows(
            "SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()"
        )[0][0]
        text = f"the oldest transaction id is {age:,} back; at 2,100,000,000 writing stops"
        if age > 1_500_000_000:
            yield Finding(
                check="wraparound",
                status=Status.PROBLEM,
                text=text,
                advice="VACUUM FREEZE, and find what holds it: an old slot or transaction",
            )
        else:
            yield Finding(check="wraparound", status=Status.OK, text=text)

    def _bloat(self) -> Iterator[Finding]:
        rows = self._rows(
            """
SELECT s.relname, s.n_dead_tup, s.n_live_tup,
       coalesce('autovacuum_enabled=false' = ANY(c.reloptions), false)
         OR current_setting('autovacuum') = 'off'
  FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
 WHERE s.schemaname = %(schema)s ORDER BY s.n_dead_tup DESC""",
            {"schema": self._settings.schema},
        )
        off = [name for name, _, _, without in rows if without]
        if off:
            yield Finding(
                check="bloat",
                status=Status.PROBLEM,
                text=f"autovacuum is off for {', '.join(sorted(off))}: the outbox grows for ever",
                advice="turn it on: ALTER TABLE … RESET (autovacuum_enabled), or autovacuum = on",
            )
        full = [row for row in rows if row[1] > 20_000 + 2 * row[2]]
        if full:
            name, dead, live, _ = full[0]
            yield Finding(
                check="bloat",
                status=Status.WARNING,
                text=f"{name} has {dead:,} dead rows beside {live:,} living ones",
                advice=f"find what keeps VACUUM from it (transactions, above), then VACUUM "
                f"{self._settings.schema}.{name}",
            )
        if not off and not full:
            text = f"{sum(row[1] for row in rows):,} dead rows in all tables"
            yield Finding(check="bloat", status=Status.OK, text=text)

    # Redis and the broker

    def _versions_redis(self) -> Iterator[Finding]:
        began = time.perf_counter()
        self._client.ping()
        took = (time.perf_counter() - began) * 1000
        if is_replica(self._client):
            yield Finding(
                check="redis",
                status=Status.WARNING,
                text="the Redis URL reaches a replica: events that are published there reach "
                "nobody who listens at the master",
                advice="set BEATLESS_REDIS_URL to the master, or to its Sentinels",
            )
            return
        facts = self._client.info("server")
        valkey = "valkey_version" in facts
        name = "Valkey" if valkey else "Redis"
        text = str(facts["valkey_version" if valkey else "redis_version"])
        shown = f"{name} {text}, {took:.1f} ms away"
        known = holes(VALKEY if valkey else REDIS, text)
        if known is None:
            yield Finding(check="redis", status=Status.OK, text=shown)
        else:
            yield Finding(
                check="redis",
                status=Status.WARNING,
                text=f"{shown}, older than {known[0]}, which closes {known[1]} and others",
                advice=f"update to {known[0]} or newer, {BACKPORTS}",
            )

    def _config(self, pattern: str) -> dict[str, str] | None:
        """Redis' own settings, or None where they may not be asked."""
        try:
            return dict(self._client.config_get(pattern))
        except redis.ResponseError:
            return None

    @property
    def _on_redis(self) -> bool:
        return self._settings.broker_url.startswith(("redis", "rediss", "unix", "sentinel"))

    def _eviction(self) -> Iterator[Finding]:
        memory = self._client.info("memory")
        policy = memory.get("maxmemory_policy") or (self._config("maxmemory-policy") or {}).get(
            "maxmemory-policy"
        )
        used, limit = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
        if policy is None:
            text = "this server does not tell its policy"
            yield Finding(check="eviction", status=Status.SKIPPED, text=text)
        elif self._on_redis and str(policy).startswith("allkeys"):
            yield Finding(
                check="eviction",
                status=Status.PROBLEM,
                text=f"maxmemory-policy is {policy}: when memory is short, Redis throws queues "
                "away; every run in them waits for its redispatch",
                advice="CONFIG SET maxmemory-policy noeviction, or a Redis for the broker alone",
            )
        elif limit and used > 0.8 * limit:
            yield Finding(
                check="eviction",
                status=Status.WARNING,
                text=f"{used / limit:.0%} of maxmemory is used",
                advice="raise maxmemory, or find what else lives on this Redis",
            )
        else:
            yield Finding(check="eviction", status=Status.OK, text=f"policy {policy}")

    def _buffers(self) -> Iterator[Finding]:
        given = (self._config("client-output-buffer-limit") or {}).get("client-output-buffer-limit")
        found = re.search(r"pubsub (\d+) (\d+) (\d+)", given or "")
        if found is None:
            yield Finding(
                check="output buffers",
                status=Status.SKIPPED,
                text="this server does not tell its client-output-buffer-limit",
            )
            return
        hard, soft, seconds = map(int, found.groups())
        text = f"pubsub {hard / 1e6:.0f} MB, or {soft / 1e6:.0f} MB for {seconds} s"
        advice = "CONFIG SET client-output-buffer-limit 'pubsub 32mb 8mb 60'"
        if hard == 0 and soft == 0:
            yield Finding(
                check="output buffers",
                status=Status.WARNING,
                text="a subscriber's buffer has no limit: one that is stuck fills Redis' memory",
                advice=advice,
            )
        elif 0 < hard < 8_000_000:
            yield Finding(
                check="output buffers",
                status=Status.WARNING,
                text=f"a subscriber is cut off after {hard / 1e6:.1f} MB: bursts end streams, "
                "which then read Postgres",
                advice=advice,
            )
        else:
            yield Finding(check="output buffers", status=Status.OK, text=text)

    def _broker(self) -> Iterator[Finding]:
        if self._broker_fault is not None:
            yield self._unreachable(
                "broker", "the broker", self._broker_fault, "BEATLESS_BROKER_URL"
            )
            return
        if self._settings.redis_broker is not None:
            with self._settings.redis_broker.client(**REDIS_TIMEOUTS) as client:
                if is_replica(client):
                    yield Finding(
                        check="broker",
                        status=Status.PROBLEM,
                        text="the broker URL reaches a replica: nothing can be sent to a worker",
                        advice="set BEATLESS_BROKER_URL, or BEATLESS_REDIS_URL without it, to the "
                        "master, or to its Sentinels",
                    )
                    return
        name, took = self._broker_took
        text = f"{name}, connected in {took * 1000:.1f} ms"
        yield Finding(check="broker", status=Status.OK, text=text)

    def _shared_broker(self) -> Iterator[Finding]:
        """Whether another database has the same prefix there: each takes the other's messages."""
        broker = self._settings.redis_broker
        if broker is None or self._broker_fault is not None:
            return
        prefix = self._settings.prefix
        names = {queue.name for queue in self._app.client.queues()} | {"default"}
        waiting: set[str] = set()
        with broker.client(**REDIS_TIMEOUTS) as found:
            client: Any = found  # redis-py's answers are typed for both of its worlds
            for name in names:
                for message in client.lrange(f"{prefix}:{prefix}.{name}", -PEEKED, -1):
                    with suppress(ValueError, KeyError, TypeError):
                        waiting.add(str(json.loads(message)["headers"]["id"]).rpartition(".")[0])
        known = self._rows(
            f"SELECT run_id FROM {self._settings.schema}.runs WHERE run_id = ANY(%(ids)s)",
            {"ids": list(waiting)},
        )
        strange = sorted(waiting - {run_id for (run_id,) in known})
        if strange:
            yield Finding(
                check="shared broker",
                status=Status.WARNING,
                text=f"{len(strange)} of {len(waiting)} waiting messages are of runs that this "
                f"database does not have, as {strange[0]}: another database seems to use this "
                f"broker with the prefix {prefix}, and each takes the other's messages",
                advice="give each its own BEATLESS_PREFIX, or its own database number of the Redis",
            )
        else:
            text = f"{len(waiting)} messages were looked at, all of this database's runs"
            yield Finding(check="shared broker", status=Status.OK, text=text)

    def _clocks(self) -> Iterator[Finding]:
        skews = {"this machine": -self._offset}
        if self._redis is not None:
            with suppress(redis.RedisError):
                seconds, micros = self._client.time()
                skews["Redis"] = seconds + micros / 1e6 - (time.time() + self._offset)
        name, skew = max(skews.items(), key=lambda item: abs(item[1]))
        text = ", ".join(f"{who} {by * 1000:+.0f} ms" for who, by in skews.items())
        if abs(skew) > 1.0:
            yield Finding(
                check="clocks",
                status=Status.WARNING,
                text=f"{name} is {skew:+.1f} s off Postgres' clock",
                advice="let NTP or chrony run there. Leases use Postgres' clock alone, but the "
                "times you give and read are off",
            )
        else:
            yield Finding(check="clocks", status=Status.OK, text=f"against Postgres: {text}")

    def _measure_offset(self) -> float:
        best, offset = float("inf"), 0.0
        for _ in range(5):
            began = time.time()
            theirs = self._rows("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0]
            ended = time.time()
            if ended - began < best:
                best, offset = ended - began, theirs - (began + ended) / 2
        return offset

    # Celery and the fleet

    def _packages(self) -> Iterator[Finding]:
        weak = 0
        for package, since, weakness in PACKAGES:
            version = metadata.version(package)
            if tuple(map(int, re.findall(r"\d+", version)[:2])) < since:
                weak += 1
                newer = ".".join(map(str, since))
                yield Finding(
                    check="packages",
                    status=Status.WARNING,
                    text=f"{package} {version}: {weakness}",
                    advice=f"pip install '{package}>={newer}' when your project can",
                )
        if not weak:
            text = ", ".join(f"{package} {metadata.version(package)}" for package, *_ in PACKAGES)
            yield Finding(check="packages", status=Status.OK, text=text)

    def _celery(self) -> Iterator[Finding]:
        conf = self._app.celery.conf
        accepted = {"this app": conf.accept_content}
        if self._broker_fault is None:
            accepted |= {
                worker: theirs.get("accept_content") or ()
                for worker, theirs in sorted(self._fleet[2].items())
            }
        dangerous = {who: found for who, names in accepted.items() if (found := _dangerous(names))}
        for who, found in dangerous.items():
            yield _pickle(who, found)
        if conf.task_always_eager:
            yield Finding(
                check="celery",
                status=Status.PROBLEM,
                text="task_always_eager is on: relays would execute runs themselves",
                advice="turn it off; the test kit executes runs in the test's process",
            )
        if not dangerous and not conf.task_always_eager:
            yield Finding(check="celery", status=Status.OK, text="messages are JSON, and ids only")

    def _visibility(self) -> Iterator[Finding]:
        options = self._app.celery.conf.broker_transport_options or {}
        if not self._on_redis or options.get("ack_emulation") is False:
            text = "no message is delivered again while its run is executed"
            yield Finding(check="visibility timeout", status=Status.OK, text=text)
            return
        timeout = float(options.get("visibility_timeout", 3600))
        longest = {
            f"{plan.name}.{step.name}": step.timeout or float("inf")
            for plan in self._app.plans.values()
            for step in plan.steps
        }
        name, seconds = max(longest.items(), key=lambda item: item[1])
        if seconds >= timeout:
            allowed = "without end" if seconds == float("inf") else f"for {seconds:g} s"
            yield Finding(
                check="visibility timeout",
                status=Status.WARNING,
                text=f"Redis delivers a message again after {timeout:g} s, and step {name} may run "
                f"{allowed}: workers are sent what others execute, and drop it",
                advice="leave broker_transport_options['ack_emulation'] at False, as beatless sets "
                "it, or raise visibility_timeout above the longest step",
            )
        else:
            text = f"{timeout:g} s, above the longest step"
            yield Finding(check="visibility timeout", status=Status.OK, text=text)

    def _leaders(self) -> list[Row]:
        """(shard, session) of each lead; from `SHARDS` on they are the relays themselves."""
        return self._rows(
            f"""
SELECT l.objid::int8, l.pid FROM pg_locks l
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({self._app.queries.leader_key})::oid"""
        )

    def _relays(self) -> Iterator[Finding]:
        rows = self._leaders()
        members = {pid for shard, pid in rows if shard >= SHARDS}
        leaders = {shard: pid for shard, pid in rows if shard < SHARDS}
        if not members:
            yield Finding(
                check="relays",
                status=Status.PROBLEM,
                text="no relay runs: nothing is dispatched, and no event is live",
                advice="start `beatless relay`, two of them on different machines",
            )
        elif len(leaders) < SHARDS:
            missing = ", ".join(str(shard) for shard in range(SHARDS) if shard not in leaders)
            yield Finding(
                check="relays",
                status=Status.PROBLEM,
                text=f"{_count(len(members), 'relay')}, but nobody leads shard {missing}",
                advice="ask again in some seconds; if it stays so, restart the relays",
            )
        elif len(members) == 1:
            text = "one relay leads all shards; a second one would take over at once if it died"
            yield Finding(check="relays", status=Status.OK, text=text)
        else:
            text = f"{len(members)} relays share {SHARDS} shards"
            yield Finding(check="relays", status=Status.OK, text=text)

    def _workers(self) -> Iterator[Finding]:
        tasks, consumed = self._fleet[1], self._consumed
        if not consumed:
            yield Finding(
                check="workers",
                status=Status.PROBLEM,
                text="no worker answers: runs wait for one",
                advice="start `beatless worker`; if some run, see whether they have the same "
                "BEATLESS_BROKER_URL and BEATLESS_PREFIX",
            )
            return
        for worker, names in sorted(tasks.items()):
            unknown = sorted(
                plan.name
                for plan in self._app.plans.values()
                if plan.queue in consumed.get(worker, ()) and plan.name not in names
            )
            if unknown:
                yield Finding(
                    check="workers",
                    status=Status.PROBLEM,
                    text=f"{worker} does not know {', '.join(unknown)} and takes its messages",
                    advice="deploy the version with these plans to it, or give them a queue of "
                    "their own",
                )
        queues = set().union(*consumed.values())
        lost = sorted({plan.queue for plan in self._app.plans.values()} - queues)
        if lost:
            yield Finding(
                check="workers",
                status=Status.PROBLEM,
                text=f"nobody consumes queue {', '.join(lost)}",
                advice=f"start `beatless worker --queues {','.join(lost)}`",
            )
        else:
            text = f"{_count(len(consumed), 'worker')} for {', '.join(sorted(queues))}"
            yield Finding(check="workers", status=Status.OK, text=text)

    def _places(self) -> Iterator[Finding]:
        """Places that a body keeps whose run it has no more: its end was forced, and it goes on."""
        if self._broker_fault is not None:
            text = "not looked at: the broker cannot be reached"
            yield Finding(check="places", status=Status.SKIPPED, text=text)
            return
        all_there = True
        for worker, requests in sorted(self._fleet[3].items()):
            ours = [
                (str(request["args"][0]), f"%:{request['worker_pid']}:%")
                for request in requests
                if request["name"] in self._app.plans and request.get("args")
            ]
            ((lost,),) = self._rows(
                f"SELECT count(*) FROM unnest(%(run_ids)s::text[], %(workers)s::text[]) "
                f"AS held(run_id, worker) JOIN {self._settings.schema}.runs r USING (run_id) "
                "WHERE NOT (r.state = 'running' AND r.worker LIKE held.worker) AND "
                f"(SELECT max(ts) FROM {self._settings.schema}.run_events e "
                f"WHERE e.run_id = r.run_id) < clock_timestamp() - interval '{LOST_AFTER_S:g} s'",
                {"run_ids": [run for run, _ in ours], "workers": [like for _, like in ours]},
            )
            if not lost:
                continue
            all_there = False
            places = self._fleet[4].get(worker, {}).get("pool", {}).get("max-concurrency", lost)
            yield Finding(
                check="places",
                status=Status.PROBLEM if lost >= places else Status.WARNING,
                text=f"{worker} has lost {lost} of {places} places: bodies whose end was forced "
                "go on in them",
                advice="restart it; give steps that hang a timeout in the prefork pool, which ends "
                "them",
            )
        if all_there:
            yield Finding(check="places", status=Status.OK, text="no worker has lost a place")

    def _threads(self) -> Iterator[Finding]:
        """What workers tell of their own threads."""
        rows = self._rows(
            f"SELECT hostname, failing FROM {self._settings.schema}.workers "
            "WHERE failing <> '{}' AND seen_at > clock_timestamp() "
            f"- interval '{PRESENCE_EXPIRES_S:g} s' ORDER BY hostname"
        )
        for worker, failing in rows:
            yield Finding(
                check="threads",
                status=Status.PROBLEM,
                text=f"in {worker} these fail, and have not worked since: {', '.join(failing)}",
                advice="its log says why (thread_failed, heartbeat_failed, watchdog_failed, "
                "keeping_failed); if Postgres can be reached from there, restart it",
            )
        if not rows:
            yield Finding(check="threads", status=Status.OK, text="those of all workers work")

    def _plans(self) -> Iterator[Finding]:
        rows = self._rows(
            f"SELECT task, queue, count(*) FROM {self._settings.schema}.dispatches "
            "WHERE NOT task = ANY(%(known)s) GROUP BY 1, 2 ORDER BY 3 DESC",
            {"known": [*self._app.plans, canary.NAME]},
        )
        if rows:
            told = ", ".join(f"{task} ({runs})" for task, _, runs in rows[:5])
            yield Finding(
                check="plans",
                status=Status.WARNING,
                text=f"runs wait whose plan this app does not have: {told}",
                advice="if no other app has it, deploy the plan again or cancel the runs",
            )
        waiting = places(self._app.engine, self._app.journal, self._app.plans, reason=UNKNOWN_STEP)
        if waiting:
            told = ", ".join(
                f"{place.plan}.{place.step} ({place.runs}: {place.run_ids[0]})"
                for place in waiting[:5]
            )
            yield Finding(
                check="plans",
                status=Status.WARNING,
                text=f"runs wait in a step that the workers' version of the plan lacks: {told}",
                advice="deploy a version that has it, or say what it is called now: "
                'Plan(…, renamed={"before": "now"}); `beatless plan check` names all',
            )
        if not rows and not waiting:
            text = f"all unfinished runs are of the {len(self._app.plans)} plans of this app"
            yield Finding(check="plans", status=Status.OK, text=text)

    def _outbox(self) -> Iterator[Finding]:
        s = self._settings.schema
        pending, age, letters = self._rows(f"SELECT {outbox_lag(s)}")[0]
        if (age or 0) > 10:
            yield Finding(
                check="outbox",
                status=Status.PROBLEM if age > 60 else Status.WARNING,
                text=f"{pending:,} appends are not published, the oldest for {age:.0f} s",
                advice="look at relays and redis above, then at a relay's log",
            )
        if letters:
            yield Finding(
                check="outbox",
                status=Status.WARNING,
                text=f"{_count(letters, 'dead letter')}: messages that Redis refuses",
                advice="beatless dead-letters, then requeue or discard",
            )
        if (age or 0) <= 10 and not letters:
            yield Finding(check="outbox", status=Status.OK, text="everything is published")

    def _queues(self) -> Iterator[Finding]:
        assert self._postgres is not None  # noqa: S101 - see `needs` of the checks
        states = QueueStatements(self._settings.schema).states(self._postgres, ended=False)
        now = self._rows("SELECT clock_timestamp()")[0][0]
        waits = [
            ((now - state.oldest).total_seconds(), state)
            for state in states
            if state.oldest is not None and state.paused_at is None
        ]
        long = sorted(
            ((age, state) for age, state in waits if age > LONG_WAIT_S),
            key=lambda wait: wait[0],
            reverse=True,
        )
        paused = [state.name for state in states if state.paused_at is not None]
        for age, state in long[:3]:
            yield Finding(
                check="queues",
                status=Status.WARNING,
                text=f"{_count(state.waiting, 'run')} of queue {state.name} wait, the oldest for "
                f"{age:.0f} s",
                advice=self._what_it_waits_for(state.name),
            )
        if paused:
            yield Finding(
                check="queues",
                status=Status.WARNING,
                text=f"paused: {', '.join(paused)}",
                advice="beatless resume Q, if that is not wanted any more",
            )
        if not long and not paused:
            text = f"no run has been due for more than {LONG_WAIT_S:.0f} s"
            yield Finding(check="queues", status=Status.OK, text=text)

    def _what_it_waits_for(self, queue: str) -> str:
        if self._broker_fault is not None:
            return "the broker cannot be reached: mend that first"
        if not self._consumed:
            return f"no worker answers: beatless worker --queues {queue}"
        if self._unconsumed(queue):
            return f"nobody consumes it: beatless worker --queues {queue}"
        return "more workers, or more concurrency"

    def _unfit_rows(self) -> Iterator[Finding]:
        assert self._postgres is not None  # noqa: S101 - see `needs` of the checks
        found = unfit_rows(self._postgres, self._settings.schema, limit=3)
        for violation in found:
            yield Finding(
                check="rows",
                status=Status.PROBLEM,
                text=f"run {violation.run_id}: {violation.problem}",
                advice="beatless did not write that: mend the row, or beatless remove RUN",
            )
        if not found:
            yield Finding(check="rows", status=Status.OK, text="a relay can act on all of them")

    # What listens

    def _api(self) -> Iterator[Finding]:
        yield self._door(
            "api",
            self._api_url,
            f"{self._api_url.rstrip('/')}/v1/runs?limit=1",
            "make a token: `beatless token create --scope admin`; from then on one is needed",
        )

    def _flower(self) -> Iterator[Finding]:
        yield self._door(
            "flower",
            self._flower_url,
            self._flower_url,
            "start it with --basic-auth USER:PASSWORD, or let it listen on loopback only",
        )

    def _door(self, check: str, base: str, url: str, advice: str) -> Finding:
        """Whether it lets anybody in."""
        if not base:
            text = f"not looked at: give its address with --{check} URL"
            return Finding(check=check, status=Status.SKIPPED, text=text)
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return Finding(
                check=check,
                status=Status.PROBLEM,
                text=f"{base} is no http address",
                advice=f"write --{check} https://…",
            )
        status = _status_of(url)
        if isinstance(status, str):
            return Finding(
                check=check,
                status=Status.PROBLEM,
                text=f"{base} does not answer: {status}",
                advice="see whether it runs, and whether it can be reached from here",
            )
        if status >= 500:
            return Finding(
                check=check,
                status=Status.PROBLEM,
                text=f"{base} answers with status {status}",
                advice="look at its log",
            )
        if status >= 300:
            text = f"{base} asks who is there (status {status})"
            return Finding(check=check, status=Status.OK, text=text)
        if parts.hostname in loopback.NAMES:
            text = f"{base} asks for no password, on this machine only"
            return Finding(check=check, status=Status.OK, text=text)
        return Finding(
            check=check,
            status=Status.PROBLEM,
            text=f"{base} lets everybody in who can reach it",
            advice=advice,
        )

    # The canary

    def _canary(self) -> Iterator[Finding]:
        paused = {
            name
            for (name,) in self._rows(
                f"SELECT name FROM {self._settings.schema}.queues WHERE paused_at IS NOT NULL"
            )
        }
        queues = sorted({plan.queue for plan in self._app.plans.values()} or {"default"})
        flights: list[Flight] = []
        flown = []
        for queue in queues:
            if queue in paused or self._unconsumed(queue):
                continue  # told by other checks
            try:
                flights.extend(self._fly(queue) for _ in range(1 if flights else CANARIES))
            except Broken as broken:
                yield Finding(
                    check="canary",
                    status=Status.PROBLEM,
                    text=f"a run through queue {queue} did not come back; {broken}",
                    advice=broken.advice,
                )
                if not flights:
                    return
            else:
                flown.append(queue)
        if not flights:
            text = "no queue to send a run through"
            yield Finding(check="canary", status=Status.SKIPPED, text=text)
            return
        self.hops = self._hops(flights[:CANARIES])
        total = sum(hop.seconds or 0.0 for hop in self.hops)
        if flown:
            text = f"a run went through queue {', '.join(flown)} and back in {total * 1000:.1f} ms"
            yield Finding(check="canary", status=Status.OK, text=text)
        for flight in flights[:1]:
            skew = flight.answer.get("clock", 0.0) - flight.written[EventType.STEP_STARTED]
            if abs(skew) > 1.0 + self._patience:
                yield Finding(
                    check="canary",
                    status=Status.WARNING,
                    text=f"worker {flight.answer.get('host')} is {skew:+.1f} s off Postgres' clock",
                    advice="let NTP or chrony run there",
                )

    def _fly(self, queue: str) -> Flight:
        """One canary run, there and back. Raises Broken, naming the hop where it was lost."""
        flight = Flight(run_id=f"{id_prefix(canary.NAMESPACE)}canary-{new_run_id()}", queue=queue)
        client = self._app.client_for(canary.NAMESPACE, canary=True)
        with ExitStack() as stack:
            ear = stack.enter_context(self._connect_directly())
            ear.execute(f'LISTEN "{channel_of(self._settings.schema)}"'.encode())
            subscription = Subscription(self._app.redis, self._app.streams.channel(flight.run_id))
            stack.callback(subscription.close)
            live = subscription.ensure()
            over = threading.Event()
            listening = threading.Thread(target=_hear_bell, args=(ear, flight, over), daemon=True)
            flight.began = time.time()
            listening.start()
            try:
                client.start_run(canary.NAME, run_id=flight.run_id, queue=queue)
                flight.committed = time.time()
                if live:
                    self._await(subscription, flight)
                else:  # the journal tells how far it comes
                    with suppress(WaitTimeout):
                        client.wait_for_run(flight.run_id, timeout=self._patience)
            finally:
                over.set()
                listening.join()
                self._look(client, flight)
                self._remove(client, flight)
        if EventType.RUN_FINISHED not in flight.written:
            raise self._lost(flight)
        if EventType.RUN_FINISHED not in flight.heard:
            raise Broken(
                "event",
                "it was executed, but its events did not come over Redis",
                "see whether relays and this machine have the same BEATLESS_REDIS_URL and "
                "BEATLESS_PREFIX, whether its user may subscribe, and what a relay's log says",
            )
        return flight

    def _await(self, subscription: Subscription, flight: Flight) -> None:
        deadline = monotonic() + self._patience
        while EventType.RUN_FINISHED not in flight.heard and monotonic() < deadline:
            for event in subscription.next(deadline - monotonic()) or ():
                flight.heard.setdefault(event.type, time.time())

    def _look(self, client: Client, flight: Flight) -> None:
        """Read in the journal what became of it."""
        with suppress(*TROUBLE):
            for type, at in self._rows(
                f"SELECT type, extract(epoch FROM ts)::float8 FROM {self._settings.schema}"
                ".run_events WHERE run_id = %(run_id)s ORDER BY seq",
                {"run_id": flight.run_id},
            ):
                flight.written.setdefault(type, at)
            for event in client.events(flight.run_id):
                if event.type == EventType.STEP_FINISHED:
                    flight.answer = (event.data or {}).get("result") or {}

    def _lost(self, flight: Flight) -> Broken:
        if EventType.STEP_STARTED in flight.written:
            return Broken(
                "step",
                f"a worker has it and did not end it in {self._patience:g} s",
                "look at the worker's log",
            )
        if flight.state == "sent":
            return Broken(
                "broker",
                f"a relay sent it to the broker, and no worker took it in {self._patience:g} s",
                "see whether a worker of this queue runs, is busy, and has the same "
                "BEATLESS_BROKER_URL and BEATLESS_PREFIX",
            )
        return Broken(
            "relay",
            f"no relay took it in {self._patience:g} s",
            "look at the log of a relay" if self._leaders() else "start `beatless relay`",
        )

    def _remove(self, client: Client, flight: Flight) -> None:
        with suppress(*TROUBLE):
            rows = self._rows(
                f"SELECT state FROM {self._settings.schema}.dispatches WHERE run_id = %(run_id)s",
                {"run_id": flight.run_id},
            )
            flight.state = rows[0][0] if rows else "ended"
            client.cancel_run(flight.run_id, reason="the doctor has gone")
            client.remove_run(flight.run_id)

    def _hops(self, flights: Sequence[Flight]) -> list[Hop]:
        def typical(measure: Callable[[Flight], float | None]) -> float | None:
            seen = [value for value in map(measure, flights) if value is not None]
            return max(0.0, median(seen)) if seen else None

        def ours(flight: Flight, type: str) -> float:
            return flight.written[type] - self._offset

        def heard(flight: Flight) -> float:
            return flight.heard.get(EventType.RUN_STARTED, flight.committed)

        def rang(flight: Flight) -> float:
            return max(flight.committed, flight.rang or 0.0)

        return [
            Hop(
                name="commit",
                seconds=typical(lambda f: f.committed - f.began),
                text="start_run, one transaction",
            ),
            Hop(
                name="doorbell",
                seconds=typical(lambda f: None if f.rang is None else f.rang - f.committed),
                text="NOTIFY to the relay"
                if any(f.rang for f in flights)
                else "not rung: the relay was awake",
            ),
            Hop(
                name="relay",
                seconds=typical(lambda f: heard(f) - rang(f)),
                text="picks it up and publishes to Redis",
            ),
            Hop(
                name="broker",
                seconds=typical(lambda f: ours(f, EventType.STEP_STARTED) - heard(f)),
                text="relay, broker, worker, to the claim",
            ),
            Hop(
                name="step",
                seconds=typical(
                    lambda f: ours(f, EventType.RUN_FINISHED) - ours(f, EventType.STEP_STARTED)
                ),
                text=f"executed by {flights[0].answer.get('host', 'a worker')}",
            ),
            Hop(
                name="event",
                seconds=typical(
                    lambda f: f.heard[EventType.RUN_FINISHED] - ours(f, EventType.RUN_FINISHED)
                ),
                text="RunFinished at a subscriber",
            ),
        ]


def holes(table: Mapping[tuple[int, int], tuple[int, str]], version: str) -> tuple[str, str] | None:
    """The version that closes the known holes of this one, and one of them; None if it has none."""
    major, minor, patch = ([int(part) for part in re.findall(r"\d+", version)] + [0, 0, 0])[:3]
    branch = (major, minor)
    if branch > max(table):
        return None
    if branch not in table:
        branch = max(table)  # no longer mended: another branch is the way
    needed, hole = table[branch]
    if branch == (major, minor) and patch >= needed:
        return None
    return f"{branch[0]}.{branch[1]}.{needed}", hole


def _hear_bell(ear: psycopg.Connection[Any], flight: Flight, over: threading.Event) -> None:
    """Note when the relay is rung for our shard. Others' rings are no news."""
    shard = str(shard_of(flight.run_id))
    with suppress(psycopg.Error):
        while not over.is_set():
            for notification in ear.notifies(timeout=0.05):
                if notification.payload == shard and flight.rang is None:
                    flight.rang = time.time()


def _dangerous(accepted: Iterable[str]) -> list[str]:
    return sorted({name for name in accepted if re.search("pickle|yaml|x-python", str(name))})


def _pickle(who: str, dangerous: Sequence[str]) -> Finding:
    return Finding(
        check="celery",
        status=Status.PROBLEM,
        text=f"{who} accepts {', '.join(dangerous)}: who can write to the broker can run any code "
        "on the workers",
        advice="accept_content = ['json'], as beatless sets it; old tasks that need it belong on "
        "an app and a broker user of their own",
    )


def _status_of(url: str) -> int | str:
    """The status of a GET without any credentials, or why there is none."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    opener = urllib.request.build_opener(Stay)
    try:
        with opener.open(urllib.request.Request(url), timeout=5) as response:  # noqa: S310 - http(s)
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, ValueError) as error:
        return _said(error)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _said(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or getattr(error, "reason", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
