"""Every statement of the outbox. Takes a connection, never commits.

The statements are SQL text with the schema written in, because the hot ones were measured at twice
the rate of the same statement through SQLAlchemy Core (ADR 0003). Writers embed `outbox_row` and
`doorbell` in their own statement, so that fact, outbox row and wake-up are one round trip.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import psycopg
import sqlalchemy
from psycopg import pq
from sqlalchemy import orm

from beatless.outbox.adapters import Cursor, our_cursors
from beatless.outbox.message import SHARDS, TaskMessage

Caller = (
    psycopg.Connection[Any] | sqlalchemy.Connection | orm.Session | orm.scoped_session[orm.Session]
)
Read = Callable[[Caller, str, Mapping[str, Any]], Iterable[Any]]
"""`execute`, or `execute_lazily`."""

AT_ONCE = 8
"""Rows that `execute_lazily` has in memory."""

EVENT_JSON = """'{"run_id":"' || e.run_id || '","seq":' || e.seq
 || ',"ts":' || (date_part('epoch', e.ts) * 1000)::bigint
 || ',"type":"' || e.type || '","v":' || e.v || ',"source":"' || e.source || '"'
 || CASE WHEN e.step IS NULL THEN '' ELSE ',"step":' || to_json(e.step)::text END
 || CASE WHEN e.attempt IS NULL THEN '' ELSE ',"attempt":' || e.attempt END
 || CASE WHEN e.data IS NULL THEN '' ELSE ',"data":' || e.data::text END || '}'"""
"""One event as the JSON text that every reader gets, built by Postgres (2.4 x json.dumps).

`date_part` is a float, `extract` a numeric: the event would take a tenth longer.
"""


RARELY = 4
"""Times the redispatch interval after which a message that was sent again, or is in the broker
still, is looked at again."""

DEFER_S = 2
"""Seconds until a dead worker's run that found its queue full is looked at again."""

BATCH_BYTES = 8 * 1024 * 1024
"""Bytes of events after which a batch takes no further row. A relay has them several times over."""

LAST_ATTEMPT = 2**31 - 1
"""The number of a run's messages stops there: the column is an integer."""

FEWER = 16
"""How many times fewer rows are looked at while events are large: what is left out was built."""


def execute(connection: Caller, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
    """Run a statement in the caller's own transaction and return its rows as tuples.

    Whatever the session or the process have set for how values are read and written: adapters, row
    and cursor factories, a pipeline, an encoding. Raises TypeError for anything but a psycopg
    connection or an SQLAlchemy Connection or Session on a PostgreSQL driver that takes `%(name)s`
    parameters.
    """
    if isinstance(connection, psycopg.Connection):
        with _speaking_utf8(connection.pgconn, partial(_run, connection)):
            return _run(connection, statement, parameters)
    given = _sqlalchemy_connection(connection)
    driver = given.connection.driver_connection
    pgconn = getattr(driver, "pgconn", None)
    with our_cursors(driver), _speaking_utf8(pgconn, partial(_run_in_sqlalchemy, given)):
        return _run_in_sqlalchemy(given, statement, parameters)


def _run(
    connection: psycopg.Connection[Any], statement: str, parameters: Mapping[str, Any]
) -> list[Any]:
    with Cursor(connection) as cursor:
        if connection.pgconn.pipeline_status == pq.PipelineStatus.OFF:
            cursor.execute(statement.encode(), parameters)
        else:
            with connection.pipeline():  # at its end the answers have come, also within another
                cursor.execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []


def _run_in_sqlalchemy(
    connection: sqlalchemy.Connection, statement: str, parameters: Mapping[str, Any]
) -> list[Any]:
    result = connection.exec_driver_sql(statement, dict(parameters))
    return [tuple(row) for row in result] if result.returns_rows else []


def _sqlalchemy_connection(connection: Any) -> sqlalchemy.Connection:
    """What of SQLAlchemy the caller has given. Raises TypeError."""
    kind = type(connection)
    if isinstance(connection, orm.scoped_session):
        connection = connection()
    if isinstance(connection, orm.Session):
        connection = connection.connection()
    if kind.__module__.startswith("sqlalchemy.ext.asyncio"):
        raise TypeError(
            f"connection= takes no {kind.__name__}: call from its run_sync, as in await "
            "session.run_sync(lambda session: client.start_run(…, connection=session))"
        )
    if isinstance(connection, psycopg.AsyncConnection):
        raise TypeError(
            "connection= takes no psycopg AsyncConnection: use a psycopg Connection, or an "
            "SQLAlchemy AsyncSession or AsyncConnection and its run_sync"
        )
    if not isinstance(connection, sqlalchemy.Connection):
        raise TypeError(
            "connection= takes an SQLAlchemy Connection or Session, or a psycopg 3 Connection; "
            f"not {kind.__name__}"
        )
    dialect = connection.dialect
    if dialect.name != "postgresql" or (
        dialect.paramstyle != "pyformat" and not dialect.driver.startswith("psycopg")
    ):
        raise TypeError(
            "connection= must reach PostgreSQL through psycopg (postgresql+psycopg://…), not "
            f"{dialect.name}+{dialect.driver}"
        )
    return connection


@contextmanager
def _speaking_utf8(
    pgconn: pq.abc.PGconn | None, run: Callable[[str, Mapping[str, Any]], list[Any]]
) -> Iterator[None]:
    """In this block the session's encoding holds every text; nearly always it does before."""
    before = pgconn.parameter_status(b"client_encoding") if pgconn is not None else None
    if pgconn is None or before in (b"UTF8", None):
        yield
        return
    change = "SELECT set_config('client_encoding', %(name)s, false)"
    run(change, {"name": "UTF8"})
    try:
        yield
    finally:
        # A transaction that has failed takes it back when it ends.
        if pgconn.transaction_status != pq.TransactionStatus.INERROR:
            run(change, {"name": before.decode() if before else ""})


def execute_lazily(
    connection: Caller, statement: str, parameters: Mapping[str, Any]
) -> Iterator[Any]:
    """`execute` for rows that may be large: few of them are in memory at once.

    For an SQLAlchemy Connection that is in a transaction, which the last row must not outlive.
    """
    if not isinstance(connection, sqlalchemy.Connection):
        raise TypeError(f"takes an SQLAlchemy Connection, not {type(connection).__name__}")
    with our_cursors(connection.connection.driver_connection):
        result = connection.exec_driver_sql(
            statement,
            dict(parameters),
            execution_options={"stream_results": True, "max_row_buffer": AT_ONCE},
        )
    with result:
        for row in result:
            yield tuple(row)


def refuse_two_phase(connection: Caller) -> None:
    """Raises ValueError for a transaction that is to be prepared: Postgres prepares no NOTIFY.

    At once and always, instead of at its end and only while a relay sleeps.
    """
    if isinstance(connection, orm.Session):
        connection = connection.connection()
    if isinstance(connection, sqlalchemy.Connection):
        refused = isinstance(connection.get_transaction(), sqlalchemy.TwoPhaseTransaction)
    else:
        refused = getattr(connection, "_tpc", None) is not None  # psycopg has no public name for it
    if refused:
        raise ValueError(
            "connection= is in a two-phase transaction, and Postgres cannot prepare one that wakes "
            "a relay: do this in a transaction of its own, with a key= so that it can be repeated"
        )


def channel_of(schema: str) -> str:
    """The NOTIFY channel of a schema. Channels are per database, so the schema is in the name.

    Raises ValueError above 63 bytes: LISTEN would truncate silently and hear nothing.
    """
    channel = f"beatless_{schema}"
    if len(channel.encode()) > 63:
        raise ValueError(f"the NOTIFY channel {channel!r} is longer than 63 bytes")
    return channel


def origin(schema: str) -> str:
    """SQL of what tells the history of this schema from every other: 16 hexadecimal digits at most.

    Of the cluster, the database, the table and the row. A dump that is restored makes another
    table, or at least another row (its xmin), be it into the same cluster. A copy of the whole
    cluster, as a snapshot of its disk, is the same until it is renewed.
    """
    return f"""(SELECT to_hex(hashtextextended(concat_ws('/', system_identifier,
  (SELECT oid FROM pg_database WHERE datname = current_database()),
  '{schema}.history'::regclass::oid,
  (SELECT concat_ws('/', xmin, token) FROM {schema}.history LIMIT 1)), 0))
  FROM pg_control_system())"""


def doorbell(schema: str, shard: str) -> str:
    """SQL that rings the relay, but only if it sleeps. Holds its probe until the commit.

    The shared advisory lock is released after the rows are visible, so the exclusive lock that the
    relay needs to fall asleep comes later and its last look sees them.
    """
    return (
        f"CASE WHEN NOT pg_try_advisory_xact_lock_shared('{schema}.run_outbox'::regclass::oid::int4"
        f", {shard}) THEN pg_notify('{channel_of(schema)}', ({shard})::text) END"
    )


def outbox_lag(schema: str) -> str:
    """Three columns: appends that are not published, the oldest's age in seconds, dead letters."""
    return f"""
       (SELECT count(*) FROM {schema}.run_outbox),
       (SELECT extract(epoch FROM clock_timestamp() - min(e.ts))::float8
          FROM generate_series(0, {SHARDS - 1}) AS own(shard) CROSS JOIN LATERAL (
            SELECT run_id, from_seq FROM {schema}.run_outbox o WHERE o.shard = own.shard
             ORDER BY id LIMIT 1) o
          JOIN {schema}.run_events e ON e.run_id = o.run_id AND e.seq = o.from_seq),
       (SELECT count(*) FROM {schema}.dead_letters)"""


def outbox_row(schema: str, source: str, shard: str, count: str) -> str:
    """SQL that records an append: one row for all of its events."""
    return (
        f"INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq) "
        f"SELECT {shard}, run_id, last_seq - ({count}) + 1, last_seq FROM {source}"
    )


class PickedEvents(NamedTuple):
    """One outbox row with the events it stands for."""

    shard: int
    id: int
    run_id: bytes
    body: bytes


class Floor(NamedTuple):
    """Outbox ids up to `id` are all decided once every transaction below `xmax` has ended."""

    id: int
    xmax: int


class Queries:
    """The relay's statements for one schema."""

    def __init__(self, schema: str, *, per_shard: int = 128, window: int = 64) -> None:
        s = schema
        self.schema = schema
        self.per_shard = per_shard
        self.window = window
        self.channel = channel_of(schema)
        self.origin = origin(s)
        self.bell_key = f"'{s}.run_outbox'::regclass::oid::int4"
        self.leader_key = f"'{s}.dispatches'::regclass::oid::int4"
        self.chore_key = f"'{s}.run_events'::regclass::oid::int4"
        # Whatever a row holds, no expression over its columns may fail: it would stop all runs.
        next_attempt = f"least(d.attempts, {LAST_ATTEMPT - 1}) + 1"
        # LIMIT is a literal: a generic plan would guess 10 % of the table for a parameter.
        pick_events = _picked(
            s,
            f"""SELECT o.* FROM unnest(%(shards)s::int[]) AS own(shard) CROSS JOIN LATERAL (
   SELECT * FROM {s}.run_outbox o
    WHERE o.shard = own.shard AND o.id > %(floor)s AND o.run_id <> ALL(%(aside)s::text[])
    ORDER BY o.id LIMIT {{limit}}) o
  ORDER BY o.id""",
        )
        self.pick_events_sql = pick_events.replace("{limit}", str(per_shard))
        self.few_per_shard = max(1, per_shard // FEWER)
        self.pick_few_events_sql = pick_events.replace("{limit}", str(self.few_per_shard))
        self.pick_run_sql = _picked(
            s,
            f"""SELECT * FROM {s}.run_outbox
    WHERE shard = %(shard)s AND run_id = %(run_id)s AND run_id <> ALL(%(aside)s::text[])
    ORDER BY id LIMIT 500""",
        )
        self.heads_sql = f"""
SELECT o.shard, o.id, o.run_id FROM unnest(%(shards)s::int[]) AS own(shard) CROSS JOIN LATERAL (
   SELECT * FROM {s}.run_outbox o
    WHERE o.shard = own.shard AND o.id > %(floor)s AND o.run_id <> ALL(%(aside)s::text[])
      AND (%(run_id)s::text IS NULL OR o.run_id = %(run_id)s)
    ORDER BY o.id LIMIT {per_shard}) o"""
        self.pick_one_sql = _picked(
            s, f"SELECT * FROM {s}.run_outbox WHERE shard = %(shard)s AND id = %(id)s"
        )
        # No write of the relay waits for a row: whoever holds it would stop all runs. Arrays as
        # text: psycopg takes half as long to write one as to write the list. Row by row,
        # by LIMIT: told by an ANALYZE of the empty table that it has one row, the planner would
        # join the other way round and read the whole backlog.
        self.forget_events_sql = f"""
DELETE FROM {s}.run_outbox WHERE ctid = ANY(ARRAY(
  SELECT o.ctid
    FROM unnest(%(shards)s::text::int[], %(ids)s::text::bigint[]) AS done(shard, id)
   CROSS JOIN LATERAL (
     SELECT ctid FROM {s}.run_outbox r WHERE r.shard = done.shard AND r.id = done.id
      LIMIT 1 FOR UPDATE SKIP LOCKED) o))"""
        lanes = f"""
WITH RECURSIVE lane(queue, priority) AS (
  (SELECT queue, priority FROM {s}.dispatches WHERE state = 'waiting'
    ORDER BY queue, priority LIMIT 1)
  UNION ALL
  SELECT n.queue, n.priority FROM lane CROSS JOIN LATERAL (
    SELECT queue, priority FROM {s}.dispatches
     WHERE state = 'waiting' AND (queue, priority) > (lane.queue, lane.priority)
     ORDER BY queue, priority LIMIT 1) n
), open AS (
  SELECT lane.* FROM lane LEFT JOIN {s}.queues q ON q.name = lane.queue WHERE q.paused_at IS NULL
)"""
        # Lanes are walked by index, so a long queue costs nothing to the others, and neither does
        # one whose runs are all for later: they are `delayed`, and found by their time. A paused
        # queue is not looked at. Lost messages, dead workers and what has become due are rows of
        # `dispatches_out` that are due; a run that a dead worker had begun goes on even if its
        # queue was paused meanwhile. The time is a subquery: compared with a volatile function,
        # every delayed run would be read. While a message of a plan is out that was lost once, no
        # other of the plan is sent in that queue: the workers may not have it, and drop them all.
        now = "(SELECT coalesce(%(now)s, clock_timestamp()))"
        mine = """shard = ANY(%(shards)s)
         AND (%(run_id)s::text IS NULL OR d.run_id = %(run_id)s)
         AND d.run_id <> ALL(%(aside)s::text[])"""
        columns = "d.run_id, d.task, d.queue, d.priority, d.due_at, d.attempts, d.reason, d.state"
        pick_tasks = f"""{lanes}, out AS MATERIALIZED (
  SELECT queue, task, shard, reason FROM {s}.dispatches WHERE state = 'sent'
), messages AS MATERIALIZED (
  SELECT queue, count(*) AS sent,
         least({window} - count(*),
               %(places)s - count(*) FILTER (WHERE shard = ANY(%(shards)s))) AS free
    FROM out GROUP BY queue
), doubted AS MATERIALIZED (
  SELECT DISTINCT queue, task FROM out WHERE reason = 'unclaimed' AND shard = ANY(%(shards)s)
), due AS MATERIALIZED (
  SELECT {columns}, q.paused_at IS NOT NULL AS paused
    FROM {s}.dispatches d LEFT JOIN {s}.queues q ON q.name = d.queue
   WHERE d.state <> 'waiting' AND d.due_at <= {now} AND d.{mine}
     AND (d.state <> 'sent' OR d.reason = 'lease' OR q.paused_at IS NULL)
   ORDER BY d.due_at LIMIT {window}{{lock}}
), ready AS (
  SELECT d.*, row_number() OVER (
           PARTITION BY d.queue
           ORDER BY d.state = 'running' DESC, d.priority DESC, d.due_at) AS place
    FROM (
      SELECT d.*, false AS paused FROM open CROSS JOIN LATERAL (
        SELECT {columns} FROM {s}.dispatches d
         WHERE d.state = 'waiting' AND d.queue = open.queue AND d.priority = open.priority
           AND d.due_at <= {now} AND d.{mine}
           AND NOT EXISTS (
             SELECT FROM doubted o WHERE o.queue = d.queue AND o.task = d.task)
         ORDER BY d.due_at LIMIT {window}{{lock}}) d
      UNION ALL
      SELECT * FROM due WHERE state = 'running' OR state = 'delayed' AND NOT paused) d
)
SELECT d.run_id, d.task, d.queue, {next_attempt}, d.reason, 'send' AS act, coalesce(sent, 0)
  FROM ready d LEFT JOIN messages USING (queue) WHERE place <= coalesce(free, %(places)s)
UNION ALL
(SELECT d.run_id, d.task, d.queue, {next_attempt},
        CASE WHEN d.reason IN ('lease', 'broker_lost') THEN d.reason ELSE 'unclaimed' END,
        'look', coalesce(sent, 0)
   FROM due d LEFT JOIN messages USING (queue) WHERE d.state = 'sent' ORDER BY d.due_at)
UNION ALL
SELECT d.run_id, d.task, d.queue, {next_attempt}, d.reason, 'defer', 0
  FROM due d
 WHERE d.state = 'delayed' AND d.paused
    OR d.state <> 'sent' AND d.run_id IN (
      SELECT run_id FROM ready r LEFT JOIN messages USING (queue)
       WHERE r.state <> 'waiting' AND place > coalesce(free, %(places)s))"""
        self.pick_tasks_sql = pick_tasks.replace("{lock}", "")
        # Without those that another transaction holds. Locks are written: only while there are any.
        self.pick_free_tasks_sql = pick_tasks.replace(
            "{lock}", " FOR NO KEY UPDATE OF d SKIP LOCKED"
        )
        self.still_held_sql = f"""
SELECT m.run_id || '.' || m.attempt
  FROM unnest(%(run_ids)s::text[], %(attempts)s::int[]) AS m(run_id, attempt) CROSS JOIN LATERAL (
    SELECT attempts FROM {s}.dispatches d
     WHERE d.run_id = m.run_id AND due_at <= {now} AND {next_attempt} = m.attempt LIMIT 1) d
 WHERE NOT EXISTS (SELECT FROM {s}.dispatches d
                    WHERE d.run_id = m.run_id FOR NO KEY UPDATE SKIP LOCKED)"""
        # A worker may have claimed the run before this statement came: its due time has moved.
        unclaimed = f"""run_id = ANY(ARRAY(
   SELECT free.run_id
     FROM unnest(%(run_ids)s::text[], %(attempts)s::int[]) AS m(run_id, attempt)
    CROSS JOIN LATERAL (
      SELECT run_id FROM {s}.dispatches d
       WHERE run_id = m.run_id AND {next_attempt} = m.attempt
         AND due_at <= coalesce(%(now)s, clock_timestamp())
       LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) free))"""
        self.mark_sent_sql = f"""
UPDATE {s}.dispatches d
   SET state = 'sent', attempts = {next_attempt},
       reason = CASE WHEN d.state = 'sent' AND d.reason <> 'lease' THEN 'unclaimed'
                     ELSE d.reason END,
       due_at = clock_timestamp() + make_interval(secs => %(redispatch)s
         * CASE WHEN d.state = 'sent' THEN {RARELY} ELSE 1 END)
 WHERE {unclaimed}"""
        # Their messages are in the broker still.
        self.mark_kept_sql = f"""
UPDATE {s}.dispatches d
   SET due_at = clock_timestamp() + make_interval(secs => %(redispatch)s * {RARELY})
 WHERE {unclaimed}"""
        # Their messages are lost: they wait for a place in the window again.
        self.mark_lost_sql = f"""
UPDATE {s}.dispatches d
   SET state = 'waiting', due_at = clock_timestamp(),
       reason = CASE reason WHEN 'broker_lost' THEN reason ELSE 'unclaimed' END
 WHERE {unclaimed}"""
        # What has become due and finds no place: a delayed run waits in its lane from now on, so
        # that those behind it are seen; the run of a dead worker is tried again soon.
        self.defer_sql = f"""
UPDATE {s}.dispatches d
   SET state = CASE state WHEN 'delayed' THEN 'waiting' ELSE state END,
       due_at = CASE state WHEN 'delayed' THEN due_at
                     ELSE clock_timestamp() + make_interval(secs => {DEFER_S}) END
 WHERE state <> 'sent' AND {unclaimed}"""
        # Part of what was refused may have arrived, and be claimed. The next attempt is another: it
        # declares its queue anew.
        self.postpone_sql = f"""
UPDATE {s}.dispatches d
   SET state = CASE WHEN state = 'running' OR reason = 'lease' THEN state ELSE 'delayed' END,
       attempts = {next_attempt},
       due_at = clock_timestamp() + make_interval(secs => %(redispatch)s),
       reason = CASE reason WHEN 'lease' THEN reason ELSE 'refused' END
 WHERE {unclaimed}"""
        # What is due and was not taken waits for a place in the window, which the claims of another
        # relay's shards may free without a ring: look again soon.
        # Before PostgreSQL 17 an infinite time has no distance from another.
        deadline = """least(greatest(deadline_at, clock_timestamp() - interval '1 day'),
                                  clock_timestamp() + interval '1 day')"""
        self.next_due_sql = f"""{lanes}
SELECT extract(epoch FROM CASE WHEN min(t.due_at) > clock_timestamp() + interval '1 day'
         THEN interval '1 day' ELSE min(t.due_at) - clock_timestamp() END)::float8,
       (SELECT extract(epoch FROM {deadline} - clock_timestamp())::float8 FROM {s}.dispatches
         WHERE deadline_at IS NOT NULL AND shard = ANY(%(shards)s) ORDER BY deadline_at LIMIT 1)
  FROM (
  SELECT min(due_at) AS due_at FROM {s}.dispatches
   WHERE state <> 'waiting' AND due_at > clock_timestamp() AND shard = ANY(%(shards)s)
  UNION ALL
  SELECT n.due_at FROM open CROSS JOIN LATERAL (
    SELECT CASE WHEN due_at > clock_timestamp() THEN due_at
                ELSE clock_timestamp() + interval '0.25 s' END AS due_at
      FROM {s}.dispatches
     WHERE state = 'waiting' AND queue = open.queue AND priority = open.priority
       AND shard = ANY(%(shards)s)
     ORDER BY dispatches.due_at LIMIT 1) n
) t"""
        # They are due now, and what the broker has lost of them is sent again.
        self.resend_unclaimed_sql = f"""
UPDATE {s}.dispatches
   SET due_at = clock_timestamp(),
       reason = CASE reason WHEN 'lease' THEN reason ELSE 'broker_lost' END
 WHERE run_id = ANY(ARRAY(
   SELECT run_id FROM {s}.dispatches WHERE state = 'sent' AND shard = ANY(%(shards)s)
      FOR NO KEY UPDATE SKIP LOCKED))"""
        self.park_sql = f"""
WITH gone AS (
  DELETE FROM {s}.run_outbox WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {s}.run_outbox WHERE shard = %(shard)s AND id = ANY(%(ids)s)
       FOR UPDATE SKIP LOCKED))
  RETURNING shard, from_seq, to_seq
)
INSERT INTO {s}.dead_letters (kind, run_id, reason, message)
SELECT 'event', %(run_id)s, %(reason)s,
       jsonb_build_object('shard', min(shard), 'from_seq', min(from_seq), 'to_seq', max(to_seq))
  FROM gone
HAVING count(*) > 0"""


def _picked(schema: str, rows: str) -> str:
    # The rows come by id, so they are sorted before they have bodies. One at least is given out.
    return f"""
SELECT shard, id, run_id, body FROM (
  SELECT p.shard, p.id, p.run_id, coalesce(b.body, '') AS body,
         sum(octet_length(b.body)) OVER (
           ORDER BY p.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before
    FROM ({rows}) p
   CROSS JOIN LATERAL (
     SELECT string_agg({EVENT_JSON}, E'\\n' ORDER BY e.seq) AS body
       FROM {schema}.run_events e
      WHERE e.run_id = p.run_id AND e.seq BETWEEN p.from_seq AND p.to_seq) b) q
 WHERE coalesce(bytes_before, 0) < {BATCH_BYTES} ORDER BY id"""


class PickedTask(NamedTuple):
    """One run that is due, and what is to be done about it."""

    message: TaskMessage
    act: str
    """`send` it; `look` whether its last message is lost; `defer` it, for its queue is full."""
    sent: int
    """How many messages of its queue are out as far as Postgres knows, of all relays."""


def picked_tasks(rows: Iterable[tuple[str, str, str, int, str, str, int]]) -> list[PickedTask]:
    """The rows of `pick_tasks_sql`."""
    return [
        PickedTask(
            TaskMessage(run_id=run_id, task=task, queue=queue, attempt=attempt, reason=reason),
            act,
            sent,
        )
        for run_id, task, queue, attempt, reason, act, sent in rows
    ]


ALL_SHARDS = tuple(range(SHARDS))
