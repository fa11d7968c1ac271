"""What of a fleet runs now: relays, workers, versions, and how far publishing is behind."""

import platform
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

import celery
import redis
import sqlalchemy
from kombu.exceptions import KombuError, OperationalError

from beatless.app import App
from beatless.outbox.clock import monotonic
from beatless.outbox.message import SHARDS
from beatless.outbox.queries import execute, outbox_lag
from beatless.schema import current, head

ASK_SECONDS = 1.0
"""How long workers have for their answer: how many there are nobody knows beforehand."""

FRESH_SECONDS = 3.0
"""An answer is given to all who ask meanwhile: it asks every worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayState:
    """One relay, by its session in Postgres."""

    pid: int
    """Of the session, not of the relay's process."""
    version: str | None
    """None where the server does not show sessions of other users."""
    address: str | None
    since: datetime | None
    shards: list[int]
    """Those that it leads, which it alone publishes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker, as it answered. Those of versions that have no answer yet have a name only."""

    name: str
    version: str | None
    python: str | None
    celery: str | None
    queues: list[str]
    concurrency: int | None
    executing: int | None
    """Runs that its processes have now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemState:
    """All of it."""

    version: str
    """Of the process that tells this."""
    python: str
    celery: str
    postgres: str
    redis: str | None
    """None while it cannot be reached."""
    revision: str | None
    """Of the schema."""
    revision_needed: str
    shards: int
    relays: list[RelayState]
    workers: list[WorkerState] | None
    """None while the broker cannot be reached, through which they are asked."""
    unpublished: int
    """Appends whose events were not published yet."""
    lag_seconds: float
    """Age of the oldest of these; 0 if there is none."""
    dead_letters: int


class System:
    """Looks for one app, and asks no more often than an answer is fresh."""

    def __init__(self, app: App, engine: sqlalchemy.Engine) -> None:
        self._app = app
        self._engine = engine
        self._mutex = threading.Lock()
        self._found: SystemState | None = None
        self._until = 0.0

    def look(self) -> SystemState:
        """Raises what SQLAlchemy does for a Postgres that cannot be reached."""
        with self._mutex:
            if self._found is None or monotonic() >= self._until:
                self._found = self._look()
                self._until = monotonic() + FRESH_SECONDS
            return self._found

    def _look(self) -> SystemState:
        schema = self._app.settings.schema
        with self._engine.connect() as connection:
            revision = current(connection, schema)
            version, unpublished, lag, letters = execute(
                connection, f"SELECT current_setting('server_version'), {outbox_lag(schema)}", {}
            )[0]
            sessions = execute(connection, _sessions(self._app.queries.leader_key), {})
        return SystemState(
            version=metadata.version("beatless"),
            python=platform.python_version(),
            celery=celery.__version__,
            postgres=version.partition(" ")[0],
            redis=self._redis_version(),
            revision=revision,
            revision_needed=head(),
            shards=SHARDS,
            relays=list(_relays(sessions)),
            workers=self._workers(),
            unpublished=unpublished,
            lag_seconds=max(0.0, lag or 0.0),
            dead_letters=letters,
        )

    def _redis_version(self) -> str | None:
        client = self._app.redis()
        try:
            found = client.info("server")
            name = "Valkey" if "valkey_version" in found else "Redis"
            return f"{name} {found.get('valkey_version', found.get('redis_version'))}"
        except (redis.RedisError, OSError):
            return None
        finally:
            client.close()

    def _workers(self) -> list[WorkerState] | None:
        control = self._app.celery.control
        try:
            with self._app.celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, timeout=ASK_SECONDS)
                answers = control.broadcast(
                    "beatless_status", reply=True, timeout=ASK_SECONDS, connection=connection
                )
        except (KombuError, OperationalError, redis.RedisError, OSError):
            return None
        told = {name: facts for answer in answers or () for name, facts in answer.items()}
        prefix = f"{self._app.settings.prefix}."
        return [_worker(name, facts, prefix) for name, facts in sorted(told.items())]


def _sessions(leader_key: str) -> str:
    return f"""
SELECT l.pid, l.objid::int8, a.application_name, host(a.client_addr), a.backend_start
  FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({leader_key})::oid
 ORDER BY a.backend_start, l.pid, l.objid"""


def _relays(rows: list[Any]) -> Iterator[RelayState]:
    shards: dict[int, list[int]] = {}
    for pid, shard, *_ in rows:
        if shard < SHARDS:
            shards.setdefault(pid, []).append(shard)
    for pid, shard, name, address, since in rows:
        if shard >= SHARDS:  # each relay has this lock, whatever it leads
            yield RelayState(
                pid=pid,
                version=name.removeprefix("beatless relay ") if name else None,
                address=address,
                since=since,
                shards=shards.get(pid, []),
            )


def _worker(name: str, facts: Mapping[str, Any], prefix: str) -> WorkerState:
    return WorkerState(
        name=name,
        version=facts.get("version"),
        python=facts.get("python"),
        celery=facts.get("celery"),
        queues=sorted(queue.removeprefix(prefix) for queue in facts.get("queues", ())),
        concurrency=facts.get("concurrency"),
        executing=facts.get("executing"),
    )
