"""The schema: the SQL files, the table definitions and the version agree."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.orm import Session

from beatless import App, SchemaBehind
from beatless.errors import SchemaTaken
from beatless.migrations import migrate, migration_sql
from beatless.orchestrator.tables import runs
from beatless.schema import VERSION_TABLE, check, current, head
from beatless.settings import libpq_url
from beatless.testing import Kit


@pytest.fixture
def schema(beatless_app: App, postgres: psycopg.Connection) -> Iterator[str]:
    """The name of a schema that does not exist yet."""
    name = f"{beatless_app.settings.prefix}_migrated"
    yield name
    postgres.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


def shape(postgres: psycopg.Connection, schema: str) -> list[tuple]:
    """Columns, defaults, constraints, indexes and storage settings, without the schema's name."""
    rows = postgres.execute(
        """
SELECT 'column', table_name, column_name, data_type, is_nullable, column_default, collation_name
  FROM information_schema.columns WHERE table_schema = %(s)s
UNION ALL
SELECT 'index', tablename, indexname, replace(indexdef, %(s)s, ''), '', '', ''
  FROM pg_indexes WHERE schemaname = %(s)s
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', ''
  FROM pg_constraint WHERE connamespace = %(s)s::regnamespace
UNION ALL
SELECT 'options', relname, array_to_string(reloptions, ','), '', '', '', ''
  FROM pg_class WHERE relnamespace = %(s)s::regnamespace
 ORDER BY 1, 2, 3, 4""",
        {"s": schema},
    ).fetchall()
    return [tuple(str(value).replace(f"{schema}.", "") for value in row) for row in rows]


def differences(connection: sqlalchemy.Connection, schema: str) -> list:
    connection.exec_driver_sql(f"SET LOCAL search_path TO {schema}")
    connection.dialect.default_schema_name = schema
    options = {
        "version_table": VERSION_TABLE,
        "compare_type": True,
        "compare_server_default": True,
    }
    context = MigrationContext.configure(connection, opts=options)
    return compare_metadata(context, runs.metadata)


def test_the_migrations_make_what_the_table_definitions_say(beatless_app: App) -> None:
    with beatless_app.engine.begin() as connection:
        assert differences(connection, beatless_app.settings.schema) == []


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE {}.runs ALTER worker TYPE varchar(9)",
        "ALTER TABLE {}.runs ALTER priority SET DEFAULT 5",
        "ALTER TABLE {}.run_events ADD colour text",
        "ALTER TABLE {}.queues ALTER paused_at SET NOT NULL",
        "DROP INDEX {}.dispatches_out",
        "CREATE TABLE {}.more ()",
    ],
)
def test_the_comparison_notices_every_kind_of_difference(beatless_app: App, change: str) -> None:
    schema = beatless_app.settings.schema
    with beatless_app.engine.connect() as connection:
        connection.exec_driver_sql(change.format(schema))
        assert differences(connection, schema)
        connection.rollback()


def test_what_alembic_does_not_compare_agrees_too(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    schema = beatless_app.settings.schema
    for table in runs.metadata.sorted_tables:
        wanted = table.info.get("postgresql_with", {})
        (found,) = postgres.execute(
            "SELECT reloptions FROM pg_class WHERE oid = %s::regclass", (f"{schema}.{table.name}",)
        ).fetchone()
        options = dict(option.split("=") for option in found or [])
        assert options.items() >= wanted.items()
        for column in table.columns:
            collation = getattr(column.type, "collation", None)
            (stored,) = postgres.execute(
                "SELECT collation_name FROM information_schema.columns "
                "WHERE (table_schema, table_name, column_name) = (%s, %s, %s)",
                (schema, table.name, column.name),
            ).fetchone()
            assert stored == collation, f"{table.name}.{column.name}"


def test_the_sql_for_people_makes_the_same_schema(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    script = migration_sql(schema)
    assert 'CREATE SCHEMA IF NOT EXISTS "' + schema in script

    with psycopg.connect(postgres.info.dsn, password=postgres.info.password) as own:
        own.execute(script)

    assert shape(postgres, schema) == shape(postgres, beatless_app.settings.schema)
    check(beatless_app.engine, schema)


def test_the_owner_of_a_schema_who_may_create_none_runs_the_sql_as_it_is(
    postgres: psycopg.Connection, schema: str
) -> None:
    with psycopg.connect(postgres.info.dsn, password=postgres.info.password) as own:
        own.execute(f"CREATE ROLE {schema}")
        own.execute(f"CREATE SCHEMA {schema} AUTHORIZATION {schema}")
        own.execute(f"SET LOCAL ROLE {schema}")
        own.execute(migration_sql(schema).replace("BEGIN;\n", "").replace("COMMIT;\n", ""))
        assert own.execute("SELECT version_num FROM beatless_version").fetchall() == [(head(),)]
        own.rollback()


def test_a_schema_that_is_behind_is_told_from_one_that_is_not(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    with pytest.raises(SchemaBehind, match=f"{schema}' is at migration none.*beatless migrate"):
        check(beatless_app.engine, schema)

    migrate(beatless_app.engine, schema)
    check(beatless_app.engine, schema)

    postgres.execute(f"UPDATE {schema}.{VERSION_TABLE} SET version_num = '0000'")
    with pytest.raises(SchemaBehind, match="at migration 0000, this version needs"):
        check(beatless_app.engine, schema)


def test_a_connection_to_where_our_tables_are_not_is_refused_with_the_way_out(
    beatless_app: App, schema: str
) -> None:
    settings = replace(beatless_app.settings, schema=schema)
    app = App(settings, list(beatless_app.plans.values()))
    with (
        closing(app),
        Session(app.engine) as session,
        psycopg.connect(libpq_url(settings.database_url)) as raw,
    ):
        for given in (session, raw):
            with pytest.raises(SchemaBehind, match=r"migrate`, or pass a connection= of the data"):
                app.client.start_run("two_steps", connection=given)
        with pytest.raises(SchemaBehind, match=r"migrate`$"):
            app.client.start_run("two_steps")


def test_tables_of_an_earlier_version_are_told_as_such_by_every_call(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    postgres.execute(f"ALTER TABLE {schema}.runs DROP COLUMN parent_id CASCADE")
    app = App(replace(beatless_app.settings, schema=schema), list(beatless_app.plans.values()))
    told = (
        f"schema '{schema}' lacks what this version needs: migration {head()}: run `beatless migr"
    )
    with closing(app), Session(app.engine) as session:
        for call in (
            lambda: app.client.start_run("two_steps"),
            lambda: app.client.start_run("two_steps", connection=session),
            app.client.list_runs,
            lambda: app.client.get_run("none"),
        ):
            with pytest.raises(SchemaBehind, match=told):
                call()
            session.rollback()


def test_a_process_that_is_older_than_the_schema_is_told_to_be_updated(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    postgres.execute(f"UPDATE {schema}.{VERSION_TABLE} SET version_num = '9999'")
    postgres.execute(f"ALTER TABLE {schema}.runs DROP COLUMN parent_id CASCADE")
    app = App(replace(beatless_app.settings, schema=schema), list(beatless_app.plans.values()))
    with closing(app), Session(app.engine) as session:
        for call in (
            lambda: app.client.start_run("two_steps"),
            lambda: app.client.start_run("two_steps", connection=session),
            app.client.list_runs,
        ):
            with pytest.raises(
                SchemaBehind, match=r"9999 and no longer has .*: update this process"
            ):
                call()
            session.rollback()


def test_migrating_again_changes_nothing(
    beatless_app: App, beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    before = shape(postgres, beatless_app.settings.schema)
    migrate(beatless_app.engine, beatless_app.settings.schema)
    assert shape(postgres, beatless_app.settings.schema) == before
    assert beatless.client.get_run(run.run_id) == run


@pytest.mark.slow
def test_two_deployments_at_once_wait_for_each_other(beatless_app: App, schema: str) -> None:
    environ = os.environ | beatless_app.settings.to_env() | {"BEATLESS_SCHEMA": schema}
    deployments = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "beatless", "migrate"],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [deployment.communicate(timeout=60)[0] for deployment in deployments]
    assert [deployment.returncode for deployment in deployments] == [0, 0], said
    with beatless_app.engine.connect() as connection:
        assert current(connection, schema) == head()


def test_a_migration_leaves_the_session_as_it_was(beatless_app: App, schema: str) -> None:
    """Its connection goes back to the pool of the app."""

    def settings() -> list[str]:
        with beatless_app.engine.connect() as connection:
            return [
                connection.exec_driver_sql(f"SHOW {name}").scalar()
                for name in ("search_path", "lock_timeout")
            ]

    before = settings()
    assert schema not in before
    migrate(beatless_app.engine, schema)
    assert settings() == before


def test_a_client_without_its_schema_says_what_to_do(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    settings = beatless_app.settings
    app = App(
        type(settings).from_env(settings.to_env(), schema=schema), list(beatless_app.plans.values())
    )
    with pytest.raises(SchemaBehind, match="run `beatless migrate`"):
        app.client.start_run("two_steps")
    app.close()


@pytest.mark.slow
def test_two_schemas_in_one_database_do_not_see_each_other(
    beatless: Kit, beatless_app: App, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    settings = beatless_app.settings
    other = App(
        type(settings).from_env(settings.to_env(), schema=schema), list(beatless_app.plans.values())
    )
    run = beatless.client.start_run("two_steps", {"n": 1}, run_id="same", key="same")
    theirs = other.client.start_run("two_steps", {"n": 2}, run_id="same", key="same")

    assert beatless.client.get_run("same") == run
    assert other.client.get_run("same") == theirs
    relay = other.relay()
    relay.drain_once()
    relay.stop()
    other.close()
    with pytest.raises(AssertionError, match="outbox 1 to 1"):
        beatless.wait_for_outbox_flush("same", timeout=0.05)


@pytest.mark.parametrize(
    "theirs",
    [
        "CREATE TABLE {}.api_tokens (id bigint, token text, expires_at timestamptz)",
        "CREATE TABLE {}.queues (name text)",
        "CREATE VIEW {}.history AS SELECT 1 AS token",
        "CREATE TABLE {0}.mine (a int); CREATE INDEX runs_key ON {0}.mine (a)",
        "CREATE TYPE {}.signals AS ENUM ('red')",
        "CREATE FUNCTION {}.start_run(text) RETURNS text LANGUAGE sql AS 'SELECT 1'",
        "CREATE FUNCTION {}.shard_of(run_id text) RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "CREATE PROCEDURE {}.let_in(who text) LANGUAGE sql AS 'SELECT 1'",
    ],
)
def test_a_schema_with_tables_of_others_is_refused_before_the_first_change(
    beatless_app: App, postgres: psycopg.Connection, schema: str, theirs: str
) -> None:
    postgres.execute(f"CREATE SCHEMA {schema}; {theirs.format(schema)}".encode())
    before = shape(postgres, schema)
    with pytest.raises(SchemaTaken, match="BEATLESS_SCHEMA name a schema of its own"):
        migrate(beatless_app.engine, schema)
    assert shape(postgres, schema) == before


def test_a_table_of_others_under_a_name_that_is_still_to_be_made_is_refused(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    postgres.execute(
        f"UPDATE {schema}.beatless_version SET version_num = '0001'; "
        f"DROP TABLE {schema}.api_tokens; CREATE TABLE {schema}.api_tokens (id bigint)".encode()
    )
    before = shape(postgres, schema)
    with pytest.raises(SchemaTaken, match="has api_tokens, not made by beatless"):
        migrate(beatless_app.engine, schema)
    assert shape(postgres, schema) == before


def test_a_function_of_others_under_a_name_that_is_still_to_be_made_is_refused(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    theirs = f"CREATE FUNCTION {schema}.start_run(text) RETURNS text LANGUAGE sql AS 'SELECT 1'"
    postgres.execute(f"UPDATE {schema}.beatless_version SET version_num = '0019'".encode())
    postgres.execute(theirs.encode())
    with pytest.raises(SchemaTaken, match=r"has start_run\(\), not made by beatless"):
        migrate(beatless_app.engine, schema)


@pytest.mark.slow
def test_what_an_interrupted_migration_has_made_is_ours(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    migrate(beatless_app.engine, schema)
    postgres.execute(f"UPDATE {schema}.beatless_version SET version_num = '0001'".encode())
    assert migrate(beatless_app.engine, schema) == head()


def test_other_tables_may_be_in_the_schema(
    beatless_app: App, postgres: psycopg.Connection, schema: str
) -> None:
    postgres.execute(f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.orders (id int)".encode())
    assert migrate(beatless_app.engine, schema) == head()
