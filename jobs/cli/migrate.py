"""`beatless migrate`."""

from collections.abc import Iterator
from contextlib import contextmanager

import click
import sqlalchemy

from beatless import migrations
from beatless.cli.environment import Environment
from beatless.declared import store_declared
from beatless.errors import BadRequest
from beatless.outbox.sessions import OWN
from beatless.postgres import engine as connect_engine
from beatless.schema import check as check_schema
from beatless.schema import current
from beatless.transactions import reaching_postgres


@click.command()
@click.option("--sql", is_flag=True, help="Print the SQL instead of running it.")
@click.option("--since", metavar="REVISION", help="With --sql: only the revisions after this one.")
@click.option("--check", is_flag=True, help="Only check whether the schema is up to date.")
@click.option("--post", is_flag=True, help="Also run revisions that break older code.")
@click.option(
    "--restored",
    is_flag=True,
    help="The database is a copy, from a backup or a snapshot: viewers must begin anew.",
)
@click.pass_obj
def migrate(
    env: Environment, sql: bool, since: str | None, check: bool, post: bool, restored: bool
) -> None:
    """Create the tables, or bring them to this version, while everything runs."""
    settings = env.app.settings
    schema = settings.schema
    if since is not None and not sql:
        raise BadRequest("--since", "only goes with --sql")
    if sql:
        text = migrations.migration_sql(schema, since)
        env.document({"schema": schema, "sql": text}) if env.as_json else click.echo(text)
        return
    env.log()
    # Not through a pooler: a migration keeps its lock and its settings from one statement to the
    # next.
    engine = connect_engine(
        settings.listen_url,
        "beatless migrate",
        direct=True,
        session=OWN,
        password=settings.password("database"),
    )
    with reaching_postgres(schema), closing_engine(engine):
        if not check:
            migrations.migrate(engine, schema, post=post)
        check_schema(engine, schema)
        if restored:
            with engine.begin() as connection:
                env.app.journal.renew(connection)
        with engine.connect() as connection:
            found = current(connection, schema)
    declares = bool(env.app_name) and not check
    changes = store_declared(env.app) if declares else []
    if env.as_json:
        env.document({"schema": schema, "migration": found})
    else:
        history = ", and a new history has begun" if restored else ""
        click.echo(f"schema {schema} is at migration {found}{history}")
    for change in changes:
        env.note(change)
    if not check and not declares:
        env.note(
            "no App is named, so stored schedules and plans stay as they are; those of yours: "
            "beatless --app MODULE:ATTRIBUTE migrate, or BEATLESS_APP"
        )


@contextmanager
def closing_engine(engine: sqlalchemy.Engine) -> Iterator[None]:
    """Its connections are closed at the end."""
    try:
        yield
    finally:
        engine.dispose()
