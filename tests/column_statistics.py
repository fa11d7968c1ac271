"""What ANALYZE and VACUUM have noted of a test's tables and their columns."""

from typing import Any

import psycopg


def forget(session: psycopg.Connection[Any]) -> None:
    """Forget all of it: emptied tables keep that of a test before, or of autovacuum by chance."""
    session.execute(
        "DELETE FROM pg_statistic WHERE starelid IN"
        " (SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)"
    )


def forget_sizes(session: psycopg.Connection[Any]) -> None:
    """Forget how long the tables are: one that autovacuum has seen empty is planned as such.

    As they are at first, they are taken for short ones.
    """
    session.execute(
        "UPDATE pg_class SET reltuples = -1, relpages = 0, relallvisible = 0"
        " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'"
    )
