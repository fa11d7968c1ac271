"""Migrations of a schema that is in use: whom they wait for, and who waits for them."""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from beatless.errors import MigrationBlocked
from beatless.local.postgres import EmbeddedPostgres
from beatless.migrations import migrate, migration_sql, statements
from beatless.schema import VERSION_TABLE, check, current, head
from beatless.settings import engine_url
from tests.integration.test_migrations import shape
from tests.valkeys import until

FIRST = "0001"
VERSIONS = Path(__file__).parents[2] / "jobs" / "migrations" / "versions"

Revision = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server of this module's own: a concurrent build waits for everybody in the database."""
    settings = {
        "fsync": "off",
        "log_lock_waits": "on",
        "deadlock_timeout": "1s",
        "log_line_prefix": "%a: ",
    }
    directory = tmp_path_factory.mktemp("online")
    with EmbeddedPostgres(directory / "postgres", settings=settings) as server:
        yield server


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    return (f"online_{number}" for number in count(1))


@pytest.fixture
def engine(server: EmbeddedPostgres) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(
        engine_url(server.url), connect_args={"application_name": "beatless migrate"}
    )
    yield engine
    engine.dispose()


@pytest.fixture
def old(server: EmbeddedPostgres, names: Iterator[str]) -> str:
    """A schema as the first release made it, with a run in it."""
    schema = next(names)
    with psycopg.connect(server.url) as own:
        own.execute(f'CREATE SCHEMA "{schema}"; SET search_path TO "{schema}"')
        own.execute((VERSIONS / "0001_runs.pre.sql").read_text())
        own.execute(
            f"CREATE TABLE {VERSION_TABLE} (version_num varchar(32) "
            f"CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY)"
        )
        own.execute(f"INSERT INTO {VERSION_TABLE} VALUES (%s)", (FIRST,))
        own.execute(
            "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq) "
            "VALUES ('old', 'p', 'v', 'default', 'running', 1)"
        )
    return schema


@pytest.fixture
def session(server: EmbeddedPostgres, old: str) -> Iterator[Callable[[str], psycopg.Connection]]:
    """Opens sessions in the old schema."""
    opened = []

    def connect(name: str) -> psycopg.Connection:
        options = f"-csearch_path={old}"
        opened.append(psycopg.connect(server.url, application_name=name, options=options))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


@pytest.fixture
def revision(tmp_path: Path) -> Revision:
    """Writes a revision: its number, the one before it, and its file's suffix with the SQL."""
    (tmp_path / "versions").mkdir()

    def write(number: str, before: str, sql: str, suffix: str = "pre") -> None:
        (tmp_path / "versions" / f"{number}_x.{suffix}.sql").write_text(sql)
        (tmp_path / "versions" / f"{number}_x.py").write_text(
            f"from beatless.migrations import apply\n\nrevision = {number!r}\n"
            f"down_revision = {before!r}\n\n\ndef upgrade():\n    apply(__file__)\n"
        )

    return write


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Heard(logging.Handler):
    """Sets an event at the message that a migration is held up."""

    def __init__(self) -> None:
        super().__init__()
        self.held_up = threading.Event()
        self.holders: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "a table is in use":
            self.holders.append(vars(record)["holder"])
            self.held_up.set()


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    logging.getLogger("beatless.migrations").addHandler(handler)
    yield handler
    logging.getLogger("beatless.migrations").removeHandler(handler)


def version(engine: sqlalchemy.Engine, schema: str) -> str | None:
    with engine.connect() as connection:
        return current(connection, schema)


def waited(server: EmbeddedPostgres, name: str) -> bool:
    """Whether a session of this name is said to have waited over a second for a lock."""
    lines = server.log.read_text().splitlines()
    return any(line.startswith(f"{name}: ") and "still waiting for" in line for line in lines)


def test_a_schema_that_was_upgraded_is_as_one_that_is_new(
    engine: sqlalchemy.Engine, old: str, session: Any, names: Iterator[str]
) -> None:
    assert migrate(engine, old) == head()
    new = next(names)
    migrate(engine, new)

    looking = session("test")
    assert shape(looking, old) == shape(looking, new)


def test_what_was_interrupted_is_done_again_without_harm(
    engine: sqlalchemy.Engine, old: str, session: Any
) -> None:
    migrate(engine, old)
    looking = session("test")
    done = shape(looking, old)
    looking.execute(f"UPDATE {VERSION_TABLE} SET version_num = %s", (FIRST,))
    looking.execute("DROP INDEX runs_pruned")  # the last steps were not reached
    # As an interrupted build leaves it: there, and of no use.
    looking.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'run_events_finished'::regclass"
    )
    looking.commit()

    assert migrate(engine, old) == head()

    assert shape(looking, old) == done
    invalid = looking.execute("SELECT count(*) FROM pg_index WHERE NOT indisvalid").fetchone()
    assert invalid == (0,)


def test_the_sql_of_an_upgrade_makes_the_same(
    engine: sqlalchemy.Engine, old: str, session: Any, names: Iterator[str]
) -> None:
    person = session("person")
    person.autocommit = True
    for statement in statements(migration_sql(old, since=FIRST)):
        person.execute(statement)

    new = next(names)
    migrate(engine, new)
    assert shape(person, old) == shape(person, new)
    check(engine, old)


def test_the_sql_of_an_upgrade_gives_concurrent_builds_all_the_time_they_need() -> None:
    limits, dropped = {}, set()
    for statement in statements(migration_sql("shop", since=FIRST)):
        sql = " ".join(re.sub(r"--.*", "", statement).split())
        if found := re.search(r"SET (\w+) TO (\d+)$", sql):
            limits[found[1]] = int(found[2])
        elif found := re.match(r"DROP INDEX CONCURRENTLY IF EXISTS (\w+)", sql):
            assert limits["lock_timeout"] == 0
            dropped.add(found[1])
        elif found := re.match(r"CREATE (?:UNIQUE )?INDEX CONCURRENTLY IF NOT EXISTS (\w+)", sql):
            assert limits["lock_timeout"] == limits["statement_timeout"] == 0
            assert found[1] in dropped, "what an interrupted build has left counts as done"
        elif re.match(r"ALTER TABLE runs\b", sql):
            assert 0 < limits["lock_timeout"] <= 1000
    assert dropped


def test_a_table_that_is_read_holds_up_the_migration_and_nobody_else(
    engine: sqlalchemy.Engine, old: str, session: Any, heard: Heard, thread: ThreadPoolExecutor
) -> None:
    reader, worker = session("report"), session("beatless worker")
    reader.execute("SELECT count(*) FROM runs")  # and thinks about it
    upgrade = thread.submit(migrate, engine, old)
    assert heard.held_up.wait(60)
    assert "report" in heard.holders[0]

    worker.execute("SET lock_timeout TO '20s'")
    worker.execute("UPDATE runs SET last_seq = 2 WHERE run_id = 'old'")
    worker.commit()
    assert not upgrade.done()
    assert version(engine, old) < head()

    reader.rollback()
    assert upgrade.result(60) == head()


@pytest.mark.slow
def test_a_table_that_is_never_free_is_told_with_who_holds_it(
    engine: sqlalchemy.Engine, old: str, session: Any
) -> None:
    reader = session("report")
    reader.execute("SELECT count(*) FROM runs")

    with pytest.raises(MigrationBlocked, match=r"ALTER TABLE runs.*of report.*migrate` again"):
        migrate(engine, old, tries=2)

    assert version(engine, old) == "0002"
    reader.rollback()
    assert migrate(engine, old) == head()


def gate(session: Any) -> tuple[psycopg.Connection, str]:
    """A shut gate in an index expression, where the build of an index stops at an old row."""
    keeper = session("keeper")
    keeper.execute(
        "CREATE FUNCTION gate(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_advisory_xact_lock_shared(4711); RETURN $1; END $$"
    )
    keeper.commit()
    keeper.autocommit = True
    keeper.execute("SELECT pg_advisory_lock(4711)")
    return keeper, "gated ON runs (gate(run_id)) WHERE run_id = 'old';\n"


def at_the_gate(keeper: psycopg.Connection) -> bool:
    found = keeper.execute(
        "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711 AND NOT granted"
    )
    return found.fetchone() is not None


def insert(worker: psycopg.Connection, number: int) -> None:
    worker.execute(
        "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq) "
        "VALUES (%s, 'p', 'v', 'default', 'running', 1)",
        (f"new-{number}",),
    )
    worker.commit()


def test_everybody_works_while_an_index_is_built(
    engine: sqlalchemy.Engine,
    old: str,
    session: Any,
    revision: Revision,
    tmp_path: Path,
    thread: ThreadPoolExecutor,
) -> None:
    keeper, index = gate(session)
    revision("0900", head(), f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index}")
    upgrade = thread.submit(migrate, engine, old, versions=tmp_path / "versions")
    until(lambda: at_the_gate(keeper))

    worker = session("beatless worker")
    worker.execute("SET lock_timeout TO '10s'")
    for number in range(20):
        insert(worker, number)

    assert not upgrade.done()
    keeper.execute("SELECT pg_advisory_unlock(4711)")
    assert upgrade.result(60) == "0900"
    check(engine, old)  # ahead of this code, which may start on it


@pytest.mark.slow
def test_an_index_whose_build_a_deadlock_has_ended_is_built_anew(
    engine: sqlalchemy.Engine,
    old: str,
    session: Any,
    revision: Revision,
    tmp_path: Path,
    heard: Heard,
    thread: ThreadPoolExecutor,
) -> None:
    keeper, index = gate(session)
    revision("0900", head(), f"CREATE INDEX CONCURRENTLY IF NOT EXISTS {index}")
    upgrade = thread.submit(migrate, engine, old, versions=tmp_path / "versions")
    until(lambda: at_the_gate(keeper))

    # It has written what the build will wait for, and waits for the build: which is the victim.
    person = session("person")
    person.execute("SET deadlock_timeout TO '1h'")
    person.execute("UPDATE runs SET last_seq = 2 WHERE run_id = 'old'")
    waits = thread.submit(person.execute, "LOCK TABLE runs IN SHARE UPDATE EXCLUSIVE MODE")
    until(lambda: waiting(keeper, "person"))
    keeper.execute("SELECT pg_advisory_unlock(4711)")
    waits.result(60)
    assert heard.held_up.wait(60)
    assert not upgrade.done()
    person.commit()

    assert upgrade.result(60) == "0900"
    found = keeper.execute("SELECT indisvalid FROM pg_index WHERE indexrelid = 'gated'::regclass")
    assert found.fetchall() == [(True,)]


def waiting(keeper: psycopg.Connection, name: str) -> bool:
    found = keeper.execute(
        "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'",
        (name,),
    )
    return found.fetchone() is not None


def test_an_index_that_is_not_built_concurrently_makes_others_wait_and_the_log_tells(
    server: EmbeddedPostgres, session: Any, thread: ThreadPoolExecutor
) -> None:
    """The control: without it, nobody knows whether the log of the server tells anything."""
    keeper, index = gate(session)
    person, worker = session("person"), session("impatient worker")
    build: Future[Any] = thread.submit(person.execute, f"CREATE INDEX {index}")
    until(lambda: at_the_gate(keeper))

    appending = thread.submit(insert, worker, 1)
    until(lambda: waited(server, "impatient worker"))

    assert not appending.done()
    keeper.execute("SELECT pg_advisory_unlock(4711)")
    build.result(60)
    person.commit()
    appending.result(60)
    assert not waited(server, "beatless worker")


@pytest.mark.slow
def test_what_older_code_needs_stays_until_somebody_says_that_none_runs(
    engine: sqlalchemy.Engine, old: str, session: Any, revision: Revision, tmp_path: Path
) -> None:
    versions = tmp_path / "versions"
    revision("0900", head(), "CREATE TABLE IF NOT EXISTS more ();\n")
    revision("0901", "0900", "ALTER TABLE runs DROP COLUMN IF EXISTS worker;\n", "post")

    assert migrate(engine, old, versions=versions) == "0900"
    assert migrate(engine, old, versions=versions) == "0900"
    looking = session("test")
    looking.autocommit = True
    assert looking.execute("SELECT worker FROM runs").fetchall() == [(None,)]

    assert migrate(engine, old, post=True, versions=versions) == "0901"
    with pytest.raises(psycopg.errors.UndefinedColumn):
        looking.execute("SELECT worker FROM runs")


@pytest.mark.slow
def test_every_later_revision_can_be_repeated_and_blocks_nobody_for_long() -> None:
    """What `docs/migrations.md` asks of authors, as far as a text can show it."""
    for file in sorted(VERSIONS.glob("*.sql"))[1:]:
        for statement in statements(file.read_text()):
            words = " ".join(
                line for line in statement.splitlines() if not line.startswith("--")
            ).split()
            text = " ".join(words)
            if text.startswith(("CREATE INDEX", "CREATE UNIQUE INDEX", "DROP INDEX")):
                assert "CONCURRENTLY IF " in text, f"{file.name}: {text}"
            if text.startswith(("CREATE TABLE", "DROP TABLE")) or "COLUMN" in text:
                assert "IF NOT EXISTS" in text or "IF EXISTS" in text, f"{file.name}: {text}"
            if "ADD CONSTRAINT" in text:
                assert "NOT VALID" in text or "USING INDEX" in text, f"{file.name}: {text}"
