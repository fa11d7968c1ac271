"""Moves the times that a schema stores: time passes in every process, without waiting."""

import sqlalchemy

from beatless.outbox.queries import execute
from beatless.outbox.times import MOST_S, is_number

MAX_ADVANCE_S = 100 * MOST_S

TIMES_IN_EVENTS = (
    ("StepFailed", "retry_at"),
    ("RunStarted", "not_before"),
    ("WaitStarted", "until"),
)
"""Types of events with the member of their data that is a time, in milliseconds."""


def move_into_past(
    connection: sqlalchemy.Connection, schema: str, channel: str, seconds: float
) -> None:
    """Every stored time becomes so many seconds earlier; relays that sleep look again.

    Raises ValueError unless it is 0 seconds to a thousand years.
    """
    if not (is_number(seconds) and 0 <= seconds <= MAX_ADVANCE_S):
        raise ValueError(f"seconds is {seconds!r}, which is not 0 seconds to a thousand years")
    moved = {"schema": schema, "seconds": seconds, "milliseconds": round(seconds * 1000)}
    # In the order in which writers lock: a run, its events, its dispatch.
    tables = execute(
        connection,
        """
SELECT c.relname, array_agg(a.attname::text)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE n.nspname = %(schema)s AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
   AND a.atttypid = 'timestamptz'::regtype
 GROUP BY c.relname ORDER BY c.relname = 'dispatches', c.relname DESC""",
        moved,
    )
    for table, columns in tables:
        changes = ", ".join(
            f"{column} = {column} - make_interval(secs => %(seconds)s)" for column in columns
        )
        execute(connection, f"UPDATE {schema}.{table} SET {changes}", moved)
    for type, member in TIMES_IN_EVENTS:
        execute(
            connection,
            f"""
UPDATE {schema}.run_events
   SET data = jsonb_set(data, '{{{member}}}', to_jsonb(
         (data ->> '{member}')::bigint - %(milliseconds)s))
 WHERE type = '{type}' AND jsonb_typeof(data -> '{member}') = 'number'""",
            moved,
        )
    execute(connection, "SELECT pg_notify(%(c)s, '')", {"c": channel})
