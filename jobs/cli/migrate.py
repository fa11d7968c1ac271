"""`beatless migrate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
import sqlalchemy

from beatless import migrations
from beatless.cli.environment import Environment
from beatless.errors import BadRequest
from beatless.orchestrator.schedules import AppliedSchedules
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
    applied = env.app.client.apply_schedules(env.app.schedules) if declares else None
    undeclared = env.app.client.apply_plans() if declares else []
    if env.as_json:
        env.document({"schema": schema, "migration": found})
    else:
        history = ", and a new history has begun" if restored else ""
        click.echo(f"schema {schema} is at migration {found}{history}")
    if applied:
        tell_schedules(env, applied)
    tell_plans(env, undeclared)
    if not check and not declares:
        env.note(
            "no App is named, so stored schedules and plans stay as they are; those of yours: "
            "beatless --app MODULE:ATTRIBUTE migrate, or BEATLESS_APP"
        )


def tell_schedules(env: Environment, applied: AppliedSchedules) -> None:
    """A line for each schedule that a deploy has changed."""
    for name in applied.created:
        env.note(f"schedule {name} is new")
    for name in applied.changed:
        env.note(f"schedule {name} is changed")
    for name in applied.undeclared:
        env.note(f"schedule {name} is paused: the app {env.app.name} declares it no more")
    for name in applied.stopped:
        env.note(
            f"schedule {name} is stopped: the app {env.app.name} has no such plan any more, or the "
            "plan has a limit without a key for its input"
        )


def tell_plans(env: Environment, undeclared: Sequence[str]) -> None:
    """A line for each plan that SQL can start no more."""
    for name in undeclared:
        env.note(
            f"plan {name} cannot be started from SQL any more: the app {env.app.name} declares it "
            "no more"
        )


@contextmanager
def closing_engine(engine: sqlalchemy.Engine) -> Iterator[None]:
    """Its connections are closed at the end."""
    try:
        yield
    finally:
        engine.dispose()
