"""Moves the times that a schema stores: time passes in every process, without waiting."""

import sqlalchemy

from beatless.outbox.doorbell import SCHEDULES_CHANGED
from beatless.outbox.queries import execute
from beatless.outbox.statements import fragment
from beatless.outbox.times import MOST_S, is_number

MAX_ADVANCE_S = 100 * MOST_S

TIMES_IN_EVENTS = (
    ("StepFailed", "retry_at"),
    ("RunStarted", "not_before"),
    ("InputReplaced", "not_before"),
    ("WaitStarted", "until"),
)
"""Types of events with the member of their data that is a time, in milliseconds."""


NAMES_OF_TICKS = ("tick", "last_tick")
"""Columns of times that name a tick of a schedule, whenever it is fired."""


def check_seconds(seconds: float) -> None:
    """Raises ValueError unless it is 0 seconds to a thousand years."""
    if not (is_number(seconds) and 0 <= seconds <= MAX_ADVANCE_S):
        raise ValueError(f"seconds is {seconds!r}, which is not 0 seconds to a thousand years")


def next_tick_in_s(connection: sqlalchemy.Connection, schema: str) -> float | None:
    """Seconds until the next tick of a schedule is due, below 0 if it is; None without one.

    Without those that wait for the end of a run that they replace: no worker ends it meanwhile.
    """
    statement = f"""
SELECT extract(epoch FROM min(look_at) - clock_timestamp())::float8 FROM {schema}.schedules s
 WHERE {fragment("firable", schema)}
   AND (look_at <= due_at
        OR NOT EXISTS (SELECT FROM {schema}.dispatches d WHERE d.schedule_id = s.id))"""
    ((seconds,),) = execute(connection, statement, {})
    return float(seconds) if seconds is not None else None


def move_into_past(
    connection: sqlalchemy.Connection, schema: str, channel: str, seconds: float
) -> None:
    """Every stored time becomes so many seconds earlier; relays that sleep look again.

    Raises ValueError unless it is 0 seconds to a thousand years.
    """
    check_seconds(seconds)
    execute(connection, _moving(schema, seconds), {})
    # A relay that stays awake knows the time of the next tick as it was.
    for message in ("", SCHEDULES_CHANGED):
        execute(connection, "SELECT pg_notify(%(c)s, %(m)s)", {"c": channel, "m": message})


def _moving(schema: str, seconds: float) -> str:
    """One statement for all tables: most are empty, and to plan an UPDATE of each takes longer.

    In the order in which writers lock: a run, its events, its dispatch.
    """
    times = f"- make_interval(secs => {seconds!r})"
    names = ", ".join(f"'{name}'" for name in NAMES_OF_TICKS)
    members = " ".join(f"WHEN '{type}' THEN '{member}'" for type, member in TIMES_IN_EVENTS)
    types = ", ".join(f"'{type}'" for type, _ in TIMES_IN_EVENTS)
    return f"""
DO $block$
DECLARE
  changes record;
  has_rows boolean;
BEGIN
  FOR changes IN
    SELECT a.attrelid::regclass AS of_table,
           string_agg(quote_ident(a.attname) || ' = ' || quote_ident(a.attname) || ' {times}', ', ')
             AS columns
      FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
     WHERE c.relnamespace = '{schema}'::regnamespace AND c.relkind = 'r'
       AND a.attnum > 0 AND NOT a.attisdropped
       AND a.atttypid = 'timestamptz'::regtype AND NOT a.attname = ANY(ARRAY[{names}])
     GROUP BY a.attrelid, c.relname ORDER BY c.relname = 'dispatches', c.relname DESC
  LOOP
    EXECUTE 'SELECT EXISTS (SELECT FROM ' || changes.of_table || ')' INTO has_rows;
    IF has_rows THEN
      EXECUTE 'UPDATE ' || changes.of_table || ' SET ' || changes.columns;
    END IF;
  END LOOP;
  UPDATE {schema}.run_events
     SET data = jsonb_set(data, ARRAY[CASE type {members} END], to_jsonb(
           (data ->> CASE type {members} END)::bigint - {round(seconds * 1000)}))
   WHERE type IN ({types}) AND jsonb_typeof(data -> CASE type {members} END) = 'number';
END
$block$"""
