"""Alembic's entry: runs the revisions in the schema that `beatless.migrations` names."""

from typing import Any

from alembic import context

from beatless.migrations import LOCK_TIMEOUT_MS
from beatless.schema import VERSION_TABLE

schema: str = context.config.attributes["schema"]
connection = context.config.attributes["connection"]
new: bool = context.config.attributes["new"]

# Asked first: even IF NOT EXISTS wants the right to create one, which the owner of one may lack.
CREATE = f"""DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = '{schema}') THEN
    CREATE SCHEMA IF NOT EXISTS "{schema}";
  END IF;
END $$"""
PREPARE = (
    f'SET search_path TO "{schema}"',
    f"SET lock_timeout TO {LOCK_TIMEOUT_MS}",
)
options: dict[str, Any] = {
    "version_table": VERSION_TABLE,
    "version_table_schema": schema,
    # All at once for a schema that is not in use; else each statement by itself, see `apply`.
    "transaction_per_migration": not new,
}

if connection is None:
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    if new:
        with context.begin_transaction():
            for statement in (CREATE, *PREPARE):
                context.execute(statement)
            context.run_migrations()
    else:
        for statement in PREPARE:
            context.execute(statement)
        with context.begin_transaction():
            context.run_migrations()
else:
    for statement in (CREATE, *PREPARE):
        connection.exec_driver_sql(statement)
    connection.commit()
    context.configure(connection=connection, **options)
    with context.begin_transaction():
        context.run_migrations()
