"""What ANALYZE has noted of the columns of a test's tables."""

from typing import Any

import psycopg


def forget(session: psycopg.Connection[Any]) -> None:
    """Forget all of it: emptied tables keep that of a test before, or of autovacuum by chance."""
    session.execute(
        "DELETE FROM pg_statistic WHERE starelid IN"
        " (SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)"
    )
