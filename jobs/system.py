"""The state of a fleet: relays, workers, versions, and the delay of publishing."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

import celery
import redis
import sqlalchemy

from beatless.app import App
from beatless.orchestrator.queues import QueueStatements, WorkerState
from beatless.outbox.message import SHARDS
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.schema import current, head


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayState:
    """One relay, by its session in Postgres."""

    pid: int
    """Of the session, not of the relay's process."""
    process: str | None
    """Of the relay: `pid@host`. None where it is not known, as the version."""
    version: str | None
    """None where it is not known: of older ones, or of sessions of another role."""
    address: str | None
    since: datetime | None
    shards: list[int]
    """Those that it leads, which it alone publishes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemState:
    """All of it."""

    version: str
    """Of the process that reports this."""
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
    workers: list[WorkerState]
    unpublished: int
    """Appends whose events were not published yet."""
    lag_seconds: float
    """Age of the oldest of these; 0 if there is none."""
    dead_letters: int


def look(app: App, engine: sqlalchemy.Engine) -> SystemState:
    """Raises SQLAlchemy's errors for a Postgres that cannot be reached."""
    schema = app.settings.schema
    sql = statements(__file__, schema, last_shard=SHARDS - 1)
    with engine.connect() as connection:
        revision = current(connection, schema)
        version, unpublished, lag, letters = execute(connection, sql["versions_and_lag"], {})[0]
        sessions = execute(connection, sql["relays"], {})
        workers = QueueStatements(schema).workers(connection)
    return SystemState(
        version=metadata.version("beatless"),
        python=platform.python_version(),
        celery=celery.__version__,
        postgres=version.partition(" ")[0],
        redis=_redis_version(app),
        revision=revision,
        revision_needed=head(),
        shards=SHARDS,
        relays=list(_relays(sessions)),
        workers=workers,
        unpublished=unpublished,
        lag_seconds=max(0.0, lag or 0.0),
        dead_letters=letters,
    )


def _redis_version(app: App) -> str | None:
    """From HELLO: INFO is for few users, and HELLO for each."""
    client = app.redis()
    try:
        found = client.execute_command("HELLO")  # type: ignore[no-untyped-call]  # redis-py's gap
        if isinstance(found, list):  # RESP2 has no maps
            found = dict(zip(found[::2], found[1::2], strict=True))
        return f"{found[b'server'].decode().capitalize()} {found[b'version'].decode()}"
    except (redis.RedisError, OSError):
        return None
    finally:
        client.close()


def version_in(application_name: str) -> str | None:
    """The version in the name of a relay's session, which may go on with threads that fail."""
    return _words(application_name)[0]


def process_in(application_name: str) -> str | None:
    """The process and host in the name of a relay's session."""
    return _words(application_name)[1]


def _words(application_name: str) -> list[str | None]:
    words = application_name.removeprefix("beatless relay").partition(";")[0].split()
    return [*words, None, None]


def _relays(rows: list[Any]) -> Iterator[RelayState]:
    shards: dict[int, list[int]] = {}
    for pid, shard, *_ in rows:
        if shard < SHARDS:
            shards.setdefault(pid, []).append(shard)
    for pid, shard, name, address, since in rows:
        if shard >= SHARDS:  # each relay has this lock, also one that leads no shard
            yield RelayState(
                pid=pid,
                process=process_in(name or ""),
                version=version_in(name or ""),
                address=address,
                since=since,
                shards=shards.get(pid, []),
            )
