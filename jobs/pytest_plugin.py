"""The fixtures `beatless_services`, `beatless_app` and `beatless`, for any project's tests.

Each test has a schema, a prefix, a NOTIFY channel, advisory keys and a Celery app of its own, named
after the xdist worker and the number of the test. A test that leaves something outside of them
fails. Nothing is started before a test asks for it.
"""

import itertools
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy

from jobs.app import App
from jobs.cli.environment import load
from jobs.migrations import migrate
from jobs.services import EmbeddedPostgres, EmbeddedValkey
from jobs.settings import Settings, engine_url, libpq_url
from jobs.testing import Kit
from orchestrator.plan import Plan
from orchestrator.tables import runs

FAST = {
    # A test's data need not survive a power cut; a killed server keeps it all the same.
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "500",
    "autovacuum_naptime": "5s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Where this session's servers are."""

    database_url: str
    redis_url: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beatless")
    group.addoption(
        "--beatless-services",
        choices=("embedded", "external"),
        default="embedded",
        help="embedded: from wheels; external: BEATLESS_DATABASE_URL and BEATLESS_REDIS_URL.",
    )
    parser.addini("beatless_app", "module:attribute of the App whose plans the tests run")
    parser.addini("beatless_embedded_settings", "Postgres settings, name=value", type="linelist")


class SharedServices:
    """Servers that the controller starts for all xdist workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._stack = ExitStack()
        self._services: Services | None = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self._services is None:
            self._services = start_services(self._config, self._stack)
        node.workerinput["beatless"] = (
            self._services.database_url,
            self._services.redis_url,
        )

    def pytest_unconfigure(self) -> None:
        self._stack.close()


def pytest_configure(config: pytest.Config) -> None:
    # Projects that have beatless installed and do not test with it start no servers.
    if config.getini("beatless_app") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SharedServices(config), "beatless-shared-services")


def start_services(config: pytest.Config, stack: ExitStack) -> Services:
    """The servers that `--beatless-services` asks for, until the stack is closed."""
    if config.getoption("--beatless-services") == "external":
        settings = Settings.from_env()
        return Services(database_url=settings.database_url, redis_url=settings.redis_url)
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="beatless-test-")))
    extra = dict(line.split("=", 1) for line in config.getini("beatless_embedded_settings"))
    postgres = stack.enter_context(EmbeddedPostgres(directory / "postgres", settings=FAST | extra))
    valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
    return Services(database_url=postgres.url, redis_url=valkey.url)


@pytest.fixture(scope="session")
def beatless_services(pytestconfig: pytest.Config) -> Iterator[Services]:
    """Postgres and Redis: shared by all xdist workers of a session, or given from outside."""
    shared = getattr(pytestconfig, "workerinput", {}).get("beatless")
    if shared is not None:
        yield Services(database_url=shared[0], redis_url=shared[1])
        return
    with ExitStack() as stack:
        yield start_services(pytestconfig, stack)


class Schemas:
    """Migrated schemas of one xdist worker, recycled, so that a test costs milliseconds."""

    def __init__(self, services: Services, worker: str) -> None:
        self.services = services
        self.worker = worker
        self.tests = itertools.count(1)
        self.connection = psycopg.connect(libpq_url(services.database_url), autocommit=True)
        self.redis = redis.Redis.from_url(services.redis_url)
        self._numbers = itertools.count(1)
        self._free: list[str] = []
        # Hears what is published under the default name and under this worker's names.
        self.ear = self.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
        self.ear.psubscribe("beatless:*", f"t_{worker}_*")
        self.heard()

    def take(self) -> str:
        if self._free:
            return self._free.pop()
        schema = f"s_{self.worker}_{next(self._numbers)}"
        engine = sqlalchemy.create_engine(engine_url(self.services.database_url))
        self.connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE'.encode())
        migrate(engine, schema)
        engine.dispose()
        return schema

    def give_back(self, schema: str) -> None:
        tables = ", ".join(f'"{schema}".{table.name}' for table in runs.metadata.sorted_tables)
        self.connection.execute(f"TRUNCATE {tables}".encode())
        self._free.append(schema)

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
        for schema in self._free:
            self.connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE'.encode())
        self.connection.close()
        self.ear.close()
        self.redis.close()


@pytest.fixture(scope="session")
def _beatless_schemas(
    beatless_services: Services, pytestconfig: pytest.Config
) -> Iterator[Schemas]:
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    schemas = Schemas(beatless_services, worker)
    yield schemas
    schemas.close()


@pytest.fixture
def beatless_plans(pytestconfig: pytest.Config) -> Sequence[Plan]:
    """The plans of the test's app. Override it, or set `beatless_app` in the pytest settings."""
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


@pytest.fixture
def beatless_settings() -> dict[str, Any]:
    """Settings of the test's app beside its own names. Override it."""
    return {}


@pytest.fixture
def beatless_app(
    _beatless_schemas: Schemas, beatless_plans: Sequence[Plan], beatless_settings: dict[str, Any]
) -> Iterator[App]:
    """An App with a schema, prefix and channel that only this test has."""
    schemas = _beatless_schemas
    prefix = f"t_{schemas.worker}_{next(schemas.tests)}"
    schema = schemas.take()
    app = App(
        Settings(
            database_url=schemas.services.database_url,
            redis_url=schemas.services.redis_url,
            schema=schema,
            prefix=prefix,
            **beatless_settings,
        ),
        beatless_plans,
    )
    app.celery.conf.broker_transport_options["polling_interval"] = 0.05
    yield app
    app.close()
    try:
        check_leaks(schemas, schema, prefix)
    finally:
        remove_keys(schemas.redis, f"{prefix}[:.]*")
    schemas.give_back(schema)


@pytest.fixture
def beatless(beatless_app: App, tmp_path: Path) -> Iterator[Kit]:
    """The helpers, bound to the test's own app."""
    prefix = beatless_app.settings.prefix.removeprefix("t_").replace("_", "-")
    kit = Kit(beatless_app, run_prefix=f"test-{prefix}", directory=tmp_path)
    yield kit
    kit.close()


def check_leaks(schemas: Schemas, schema: str, prefix: str) -> None:
    """Fail the test that wrote, published or kept a lock outside of its own names."""
    problems = []
    ours = re.compile(rf"{re.escape(prefix)}[:.]")
    others = re.compile(rf"t_(?!{schemas.worker}_)\w+?_\d+[:.]")
    for key in schemas.redis.scan_iter(count=1000):
        name = key.decode(errors="replace")
        if not ours.match(name) and not others.match(name):
            problems.append(f"Redis key {name}")
            schemas.redis.unlink(key)
    problems += [
        f"message published on {channel}"
        for channel in sorted(schemas.heard())
        if not ours.match(channel)
    ]
    for table in ("public", "beatless"):
        row = schemas.connection.execute("SELECT to_regclass(%s)", (f"{table}.runs",)).fetchone()
        if row and row[0] is not None:
            problems.append(f"table {row[0]}")
    problems += [
        f"a session of {name} ({state}) still holds a lock of the test's relay"
        for name, state in schemas.connection.execute(
            "SELECT a.application_name, a.state FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted"
            "   AND l.classid IN (%s::regclass, %s::regclass)",
            (f'"{schema}".run_outbox', f'"{schema}".dispatches'),
        ).fetchall()
    ]
    if problems:
        pytest.fail(
            "the test left something outside of its own names:\n  " + "\n  ".join(problems),
            pytrace=False,
        )


def remove_keys(client: "redis.Redis", pattern: str) -> None:
    """Remove the keys of one test, and no others."""
    keys = list(client.scan_iter(match=pattern, count=1000))
    if keys:
        client.unlink(*keys)
