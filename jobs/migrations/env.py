"""Alembic's entry: runs the revisions in the schema that `jobs.migrations` names."""

from typing import Any

from alembic import context

from jobs.migrations import VERSION_TABLE

schema: str = context.config.attributes["schema"]
connection = context.config.attributes["connection"]

PREPARE = (
    f'CREATE SCHEMA IF NOT EXISTS "{schema}"',
    f'SET search_path TO "{schema}"',
    # A migration that waits for a lock makes everybody behind it wait: give up early instead.
    "SET lock_timeout TO '2s'",
)
options: dict[str, Any] = {"version_table": VERSION_TABLE, "version_table_schema": schema}

if connection is None:
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    with context.begin_transaction():
        for statement in PREPARE:
            context.execute(statement)
        context.run_migrations()
else:
    with connection.begin():
        # Two deployments at once: the second waits here and then finds nothing to do.
        connection.exec_driver_sql(
            "SELECT pg_advisory_xact_lock(hashtext('beatless migrate'), hashtext(%(schema)s))",
            {"schema": schema},
        )
        for statement in PREPARE:
            connection.exec_driver_sql(statement.replace("SET ", "SET LOCAL "))
        context.configure(connection=connection, **options)
        context.run_migrations()
