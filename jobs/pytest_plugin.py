"""What the fixtures of the plugin `pytest_beatless` do, loaded when a test asks for one.

Each test has a schema, a prefix, a NOTIFY channel, advisory keys and a Celery app of its own, named
after the xdist worker and the number of the test. A test that leaves something outside of them
fails; what others have there is never touched. Nothing is started before a test asks for it.
"""

import importlib
import itertools
import json
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy
from sqlalchemy import make_url

from jobs.app import App
from jobs.cli.environment import load
from jobs.errors import ExtraMissing, JobsError, Unreachable
from jobs.migrations import migrate
from jobs.services import EmbeddedPostgres, EmbeddedValkey, ServiceFailed
from jobs.settings import Settings, engine_url, libpq_url
from jobs.testing import Kit
from orchestrator.plan import Plan
from orchestrator.tables import runs
from outbox.message import SHARDS
from outbox.publishers import worker_queue

FAST = {
    # A test's data need not survive a power cut; a killed server keeps it all the same.
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "500",
    "autovacuum_naptime": "5s",
}

# Whoever names this module as a plugin means that one.
pytest_plugins = ["pytest_beatless"]

OWN = frozenset({"database_url", "redis_url", "schema", "prefix"})
"""Settings that each test has for itself."""

OBJECTS = """
WITH schemas AS (
  SELECT oid, nspname AS name FROM pg_namespace
   WHERE nspname !~ '^(pg_|information_schema$)' AND (nspname !~ %(kit)s OR nspname ~ %(left)s)
), objects AS (
  SELECT 'schema' AS kind, name, '' AS object FROM schemas
  UNION ALL
  SELECT CASE relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' WHEN 'm' THEN 'view'
                      WHEN 'c' THEN 'type' ELSE 'table' END, name, relname
    FROM schemas JOIN pg_class ON relnamespace = schemas.oid AND relkind NOT IN ('i', 'I', 't')
  UNION ALL
  SELECT 'function', name, proname FROM schemas JOIN pg_proc ON pronamespace = schemas.oid
  UNION ALL
  SELECT 'type', name, typname
    FROM schemas JOIN pg_type ON typnamespace = schemas.oid AND typtype IN ('d', 'e', 'r')
)
SELECT kind, concat_ws('.', name, nullif(object, '')) FROM objects
 -- What else others make on servers of theirs is not ours to judge.
 WHERE %(ours)s OR name ~ %(left)s
    OR name = 'beatless' AND kind <> 'schema' OR name = 'public' AND object = ANY(%(tables)s)
"""
"""Everything that somebody has made, outside of the schemas that the kit gives to tests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Where this session's servers are."""

    database_url: str
    redis_url: str
    broker_url: str
    ours: bool
    """Whether nobody else uses them, so that whatever is on them was left by a test."""


def start_services(config: pytest.Config, stack: ExitStack) -> Services:
    """The servers that `--beatless-services` asks for, until the stack is closed.

    Raises UsageError if they cannot be had like this.
    """
    kind = config.getoption("--beatless-services")
    broker_url = config.getoption("--beatless-broker")
    try:
        if kind == "external":
            settings = Settings.from_env()
            ask(settings)
            return Services(
                database_url=settings.database_url,
                redis_url=settings.redis_url,
                broker_url=broker_url or settings.broker_url,
                ours=False,
            )
        start = start_containers if kind == "testcontainers" else start_embedded
        database_url, redis_url = start(config, stack)
    except JobsError as error:
        raise pytest.UsageError(f"--beatless-services={kind}: {error}") from error
    return Services(
        database_url=database_url,
        redis_url=redis_url,
        broker_url=broker_url or redis_url,
        ours=True,
    )


def ask(settings: Settings) -> None:
    """Raises Unreachable if one of the servers does not answer."""
    try:
        psycopg.connect(libpq_url(settings.database_url), connect_timeout=10).close()
    except psycopg.OperationalError as error:
        raise Unreachable("Postgres", str(error)) from error
    try:
        with settings.redis.client(socket_connect_timeout=10) as client:
            client.ping()
    except redis.RedisError as error:
        raise Unreachable("Redis", str(error)) from error


def server_settings(config: pytest.Config) -> dict[str, str]:
    """The settings of a Postgres of ours. Raises UsageError."""
    found = dict(FAST)
    for line in config.getini("beatless_embedded_settings"):
        name, equals, value = line.partition("=")
        if not equals:
            raise pytest.UsageError(
                f"beatless_embedded_settings: {line!r} is not name=value, as in work_mem=64MB"
            )
        found[name.strip()] = value.strip()
    return found


def start_embedded(config: pytest.Config, stack: ExitStack) -> tuple[str, str]:
    """(database URL, Redis URL) of servers from wheels. Raises ServicesMissing, ServiceFailed."""
    settings = server_settings(config)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="beatless-test-")))
    postgres = stack.enter_context(EmbeddedPostgres(directory / "postgres", settings=settings))
    valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
    return postgres.url, valkey.url


def start_containers(config: pytest.Config, stack: ExitStack) -> tuple[str, str]:
    """(database URL, Redis URL) of containers. Raises ExtraMissing, ServiceFailed."""
    settings = server_settings(config)
    try:
        # Imported when it is asked for: the extra `docker` is not installed everywhere.
        containers = importlib.import_module("jobs.containers")
    except ModuleNotFoundError as error:
        raise ExtraMissing("it", "testcontainers", "docker") from error
    try:
        urls: tuple[str, str] = containers.start_containers(
            stack,
            postgres_image=config.getoption("--beatless-postgres-image"),
            redis_image=config.getoption("--beatless-redis-image"),
            settings=settings,
        )
    except Exception as error:  # of the engine's client, which is not always installed
        reason = f"{type(error).__name__}: {error}; is a Docker engine running?"
        raise ServiceFailed("a container", reason) from error
    return urls


def answer_of_services(config: pytest.Config, stack: ExitStack) -> str:
    """What the controller tells an xdist worker that asks for servers."""
    try:
        return json.dumps({"services": asdict(start_services(config, stack))})
    except pytest.UsageError as error:
        return json.dumps({"refused": str(error)})


def shared_services(port: int, token: str) -> Services:
    """The servers of the controller, which starts them now if nobody has asked before.

    Raises UsageError with what the controller says.
    """
    with socket.create_connection(("127.0.0.1", port)) as controller:
        controller.sendall(token.encode())
        with controller.makefile() as answer:
            said = json.loads(answer.read())
    if "refused" in said:
        raise pytest.UsageError(said["refused"])
    return Services(**said["services"])


@contextmanager
def beatless_services(pytestconfig: pytest.Config) -> Iterator[Services]:
    """Postgres and Redis: shared by all xdist workers of a session, or given from outside."""
    shared = getattr(pytestconfig, "workerinput", {}).get("beatless")
    if shared is not None:
        yield shared_services(*shared)
        return
    with ExitStack() as stack:
        yield start_services(pytestconfig, stack)


class Schemas:
    """Migrated schemas of one xdist worker, recycled, so that a test costs milliseconds."""

    def __init__(self, services: Services, worker: str) -> None:
        self.services = services
        self.tests = itertools.count(1)
        self.connection = psycopg.connect(libpq_url(services.database_url), autocommit=True)
        self.connection.execute("SET lock_timeout TO '3s'")
        self.worker = self._claim_name(worker)
        self.redis = redis.Redis.from_url(services.redis_url)
        self.reported = self._objects()
        self._numbers = itertools.count(1)
        self._free: list[str] = []
        self._abandoned: list[str] = []
        # Hears what is published under this worker's names, and under none of any test.
        self.ear = self.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
        anywhere = ("[^t]*", "t[^_]*") if services.ours else ()
        self.ear.psubscribe(f"t_{self.worker}_*", *anywhere)
        self.heard()

    def _claim_name(self, worker: str) -> str:
        """A name that no other session on the same servers uses, for as long as ours lives."""
        for number in itertools.count(1):
            name = worker if number == 1 else f"{worker}x{number}"
            row = self.connection.execute(
                "SELECT pg_try_advisory_lock(hashtext('beatless tests'), hashtext(%s))", (name,)
            ).fetchone()
            if row and row[0]:
                return name
        raise AssertionError("unreachable")

    def take(self) -> str:
        if self._free:
            return self._free.pop()
        schema = f"s_{self.worker}_{next(self._numbers)}"
        engine = sqlalchemy.create_engine(engine_url(self.services.database_url))
        for name in (schema, own_tables(schema)):
            self.connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())
        migrate(engine, schema)
        self.connection.execute(f'CREATE SCHEMA "{own_tables(schema)}"'.encode())
        engine.dispose()
        return schema

    def give_back(self, schema: str) -> list[str]:
        """Empty the schema for the next test, or tell who still holds something of it."""
        tables = ", ".join(f'"{schema}".{table.name}' for table in runs.metadata.sorted_tables)
        # A connection that was closed a moment ago still holds its locks: all of them are awaited.
        clean = (
            "SELECT pg_advisory_xact_lock(key::oid::int4, shard) FROM generate_series(-1, "
            f"{SHARDS}) AS shard, unnest(ARRAY['\"{schema}\".run_outbox'::regclass, "
            f"'\"{schema}\".dispatches'::regclass]) AS key; TRUNCATE {tables}"
        )
        own = own_tables(schema)
        used = self.connection.execute(
            "SELECT 1 FROM pg_class WHERE relnamespace = %s::regnamespace UNION ALL "
            "SELECT 1 FROM pg_proc WHERE pronamespace = %s::regnamespace UNION ALL "
            "SELECT 1 FROM pg_type WHERE typnamespace = %s::regnamespace LIMIT 1",
            (f'"{own}"',) * 3,
        ).fetchone()
        if used:
            clean += f'; DROP SCHEMA "{own}" CASCADE; CREATE SCHEMA "{own}"'
        try:
            self.connection.execute(clean.encode())
        except psycopg.errors.LockNotAvailable:
            self._abandoned.append(schema)
            return self._holders(schema)
        self._free.append(schema)
        return []

    def _holders(self, schema: str) -> list[str]:
        rows = self.connection.execute(
            """
SELECT a.application_name, a.state, a.query FROM pg_stat_activity a
 WHERE a.pid <> pg_backend_pid() AND a.backend_type = 'client backend' AND a.pid IN (
   SELECT l.pid FROM pg_locks l LEFT JOIN pg_class c ON c.oid IN (l.relation, l.classid)
    WHERE c.relnamespace IN (%s::regnamespace, %s::regnamespace))""",
            (f'"{schema}"', f'"{own_tables(schema)}"'),
        ).fetchall()
        return [
            f"a session of {name!r} ({state}) with a lock in the test's schema, last: {query[:200]}"
            for name, state, query in rows
        ]

    def left_outside(self, prefix: str) -> list[str]:
        """What has appeared outside of this test's names. Each is told once and left in place."""
        ours = re.compile(rf"{re.escape(prefix)}[:.]")
        # On servers that others use too, only names that this worker made can be judged.
        mine = re.compile(rf"t_{re.escape(self.worker)}_\d+[:.]")
        others = re.compile(r"t_\w+?_\d+[:.]")
        found = [
            f"the Redis key {name}"
            for name in (key.decode(errors="replace") for key in self.redis.scan_iter(count=1000))
            if not ours.match(name)
            and (mine.match(name) or (self.services.ours and not others.match(name)))
        ]
        found += [f"a message on {name}" for name in sorted(self.heard()) if not ours.match(name)]
        new = sorted({*found, *self._objects()} - self.reported)
        self.reported |= {name for name in new if not name.startswith("a message")}
        return new

    def _objects(self) -> set[str]:
        """What is in the database outside of the kit's schemas, and left in one named after us."""
        left = rf"^(t_{self.worker}_|s_{self.worker}_\d+_(?!own$))"
        rows = self.connection.execute(
            OBJECTS.encode(),
            {
                "ours": self.services.ours,
                "kit": r"^[st]_.+_\d+",
                "left": left,
                "tables": [table.name for table in runs.metadata.sorted_tables],
            },
        )
        return {f"the {kind} {name}" for kind, name in rows}

    def heard(self) -> set[str]:
        """The channels that something was published on since the last call."""
        self.redis.publish(f"t_{self.worker}_:end", "")
        channels = set()
        while message := self.ear.get_message(timeout=5):
            if message["type"] != "pmessage":
                continue
            channel = message["channel"].decode()
            if channel == f"t_{self.worker}_:end":
                break
            channels.add(channel)
        return channels

    def close(self) -> None:
        for schema in (*self._free, *self._abandoned):
            # Whoever held an abandoned one may hold it still; the next session drops it then.
            with suppress(psycopg.errors.LockNotAvailable):
                for name in (schema, own_tables(schema)):
                    self.connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())
        self.connection.close()
        self.ear.close()
        self.redis.close()


@contextmanager
def beatless_schemas(services: Services, pytestconfig: pytest.Config) -> Iterator[Schemas]:
    """The schemas of this process's tests."""
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    schemas = Schemas(services, worker)
    yield schemas
    schemas.close()


def beatless_plans(pytestconfig: pytest.Config) -> Sequence[Plan]:
    """The plans of the App that `beatless_app` in the pytest settings names."""
    name = pytestconfig.getini("beatless_app")
    if not name:
        raise pytest.UsageError(
            "no plans to test: set beatless_app = module:attribute in the pytest settings, or "
            "override the fixture beatless_plans"
        )
    with pytest.MonkeyPatch.context() as patch:
        # The module makes its App from the environment; the tests only take the plans from it.
        patch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-in-tests/")
        patch.setenv("BEATLESS_REDIS_URL", "redis://not-used-in-tests/")
        return list(load(name).plans.values())


@contextmanager
def beatless_app(
    schemas: Schemas, beatless_plans: Sequence[Plan], beatless_settings: dict[str, Any]
) -> Iterator[App]:
    """An App with a schema, prefix and channel that only this test has."""
    if taken := sorted(OWN & beatless_settings.keys()):
        raise pytest.UsageError(
            f"beatless_settings sets {', '.join(taken)}, which the kit gives to each test anew: "
            "remove it; to use other servers see --beatless-services, and for one test with "
            "another Redis make an App of dataclasses.replace(beatless_app.settings, redis_url=…)"
        )
    prefix = f"t_{schemas.worker}_{next(schemas.tests)}"
    schema = schemas.take()
    app = App(
        Settings(
            database_url=search(schemas.services.database_url, own_tables(schema)),
            redis_url=schemas.services.redis_url,
            schema=schema,
            prefix=prefix,
            **{"broker_url": schemas.services.broker_url} | beatless_settings,
        ),
        beatless_plans,
    )
    app.celery.conf.broker_transport_options["polling_interval"] = 0.05
    yield app
    if app.settings.redis_broker is None:
        remove_queues(app)
    app.close()
    # Even if the test failed: what it has left says more about why.
    problems = schemas.left_outside(prefix)
    remove_keys(schemas.redis, f"{prefix}[:.]*")
    problems += schemas.give_back(schema)
    if problems:
        pytest.fail(
            "this test, or one that ran beside it, left something outside of its own names:\n  "
            + "\n  ".join(problems),
            pytrace=False,
        )


@contextmanager
def beatless(beatless_app: App, tmp_path: Path) -> Iterator[Kit]:
    """The helpers, bound to the test's own app."""
    prefix = beatless_app.settings.prefix.removeprefix("t_").replace("_", "-")
    kit = Kit(beatless_app, run_prefix=f"test-{prefix}", directory=tmp_path)
    yield kit
    kit.close()


def own_tables(schema: str) -> str:
    """Beside a test's schema there is one for the tables of the code under test."""
    return f"{schema}_own"


def search(url: str, path: str) -> str:
    """The URL of sessions that look for tables without a schema in this path, and make them there.

    What the URL itself sets for its sessions stays.
    """
    found = make_url(url)
    given = found.query.get("options", ())
    options = [given] if isinstance(given, str) else given
    return libpq_url(
        found.update_query_dict({"options": " ".join([*options, f"-csearch_path={path}"])})
    )


def remove_queues(app: App) -> None:
    """Remove the queues of one test from a broker that is not Redis."""
    names = {queue.name for queue in app.client.queues()} | {"default"}
    with app.celery.connection_for_write() as broker:
        channel = broker.default_channel
        for queue in [worker_queue(app.settings.prefix, name) for name in sorted(names)]:
            queue = queue(channel)
            queue.delete()
            queue.exchange.delete()


def remove_keys(client: "redis.Redis", pattern: str) -> None:
    """Remove the keys of one test, and no others."""
    keys = list(client.scan_iter(match=pattern, count=1000))
    if keys:
        client.unlink(*keys)
