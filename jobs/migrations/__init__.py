"""Brings a schema to the version that this code needs. The DDL is plain SQL beside this file.

Every statement names its tables without a schema: `env.py` sets the search path, so the same files
work in any schema. Files are named `<revision>_<what>.<pre|post>.sql`: `pre` is safe before the new
code runs, `post` only when no old code runs any more.
"""

import io
from importlib import resources

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobs.errors import SchemaBehind

VERSION_TABLE = "beatless_version"


def _config(schema: str, connection: sqlalchemy.Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", "jobs:migrations")
    config.attributes["schema"] = schema
    config.attributes["connection"] = connection
    return config


def sql(name: str) -> str:
    """The text of a migration file."""
    return resources.files(__name__).joinpath("versions", name).read_text()


def head() -> str:
    """The newest revision that this code knows."""
    return str(ScriptDirectory.from_config(_config("", None)).get_current_head())


def revisions() -> frozenset[str]:
    """All revisions that this code knows."""
    scripts = ScriptDirectory.from_config(_config("", None))
    return frozenset(script.revision for script in scripts.walk_revisions())


def current(connection: sqlalchemy.Connection, schema: str) -> str | None:
    """The revision of the schema, or None if it was never migrated."""
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema}
    )
    return context.get_current_revision()


def migrate(engine: sqlalchemy.Engine, schema: str) -> None:
    """Create the schema and bring it to `head`. Two at once wait for each other."""
    with engine.connect() as connection:
        command.upgrade(_config(schema, connection), "head")


def migration_sql(schema: str) -> str:
    """The whole migration as SQL text, for people who run it themselves."""
    text = io.StringIO()
    config = _config(schema, None)
    config.output_buffer = text
    command.upgrade(config, "head", sql=True)
    return text.getvalue()


def check(engine: sqlalchemy.Engine, schema: str) -> None:
    """Raises SchemaBehind if the schema is not at `head`."""
    with engine.connect() as connection:
        found = current(connection, schema)
    if found != (needed := head()):
        raise SchemaBehind(schema, found, needed)
