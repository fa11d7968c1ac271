"""Whether a schema is at the version that this code needs.

Apart from `beatless.migrations`, which brings it there: every process asks this when it starts, and
none but `beatless migrate` needs Alembic, a tenth of its memory, for the answer.
"""

from pathlib import Path

import sqlalchemy

from beatless.errors import SchemaBehind, WrongEncoding
from beatless.outbox.queries import Caller, execute

VERSION_TABLE = "beatless_version"

VERSIONS = Path(__file__).parent / "migrations" / "versions"


def head(versions: Path | None = None) -> str:
    """The revision that this code needs: the newest that is not for afterwards.

    `versions` is a directory with further revisions.
    """
    places = [VERSIONS, *([versions] if versions else [])]
    files = [file.name for place in places for file in place.glob("*.pre.sql")]
    return max(name.partition("_")[0] for name in files)


def current(connection: Caller, schema: str) -> str | None:
    """The revision of the schema, or None if it was never migrated."""
    table = f'"{schema}".{VERSION_TABLE}'
    if not execute(connection, "SELECT to_regclass(%(t)s) IS NOT NULL", {"t": table})[0][0]:
        return None
    rows = execute(connection, f"SELECT version_num FROM {table}", {})
    return rows[0][0] if rows else None


def check_encoding(connection: sqlalchemy.Connection) -> None:
    """Raises WrongEncoding for a database that cannot hold Unicode."""
    database, encoding = execute(
        connection, "SELECT current_database(), current_setting('server_encoding')", {}
    )[0]
    if encoding != "UTF8":
        raise WrongEncoding(database, encoding)


def check(engine: sqlalchemy.Engine, schema: str) -> None:
    """Raises SchemaBehind if the schema lacks a part that this code needs.

    One that is ahead is fine: while a fleet is upgraded, the older processes start on it too.
    """
    with engine.connect() as connection:
        found = current(connection, schema)
    if found is None or found < head():
        raise SchemaBehind(schema, found, head())
