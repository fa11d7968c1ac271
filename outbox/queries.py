"""The relay's statements, and how any statement is run. Takes a connection, never commits.

The statements are SQL text with the schema written in, because the hot ones were measured at twice
the rate of the same statement through SQLAlchemy Core (ADR 0003). Writers insert the outbox row and
have the fragment `doorbell` in their own statement, so that fact, outbox row and wake-up are one
round trip.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import psycopg
import sqlalchemy
from psycopg import pq

from beatless.outbox.adapters import Cursor, our_cursors
from beatless.outbox.awaited import Awaited, is_asynchronous
from beatless.outbox.message import SHARDS, TaskMessage
from beatless.outbox.statements import fragment, statements

if TYPE_CHECKING:
    from sqlalchemy import orm

Caller = Union[
    psycopg.Connection[Any],
    Awaited,
    sqlalchemy.Connection,
    "orm.Session",
    "orm.scoped_session[orm.Session]",
]
Read = Callable[[Caller, str, Mapping[str, Any]], Iterable[Any]]
"""`execute`, or `execute_lazily`."""

LAZY_BUFFER_ROWS = 8
"""Rows that `execute_lazily` has in memory."""

RECHECK_FACTOR = 4
"""Times the redispatch interval after which a message that was sent again, or is in the broker
still, is looked at again."""

DEFER_S = 2
"""Seconds until a dead worker's run that found its queue full is looked at again."""

BATCH_BYTES = 8 * 1024 * 1024
"""Bytes of events after which a batch takes no further row. A relay has them several times over."""

LAST_ATTEMPT = 2**31 - 1
"""The number of a run's messages stops there: the column is an integer."""

FAILED = (pq.TransactionStatus.INERROR, pq.TransactionStatus.UNKNOWN)
"""States of a session in which no statement is of any use."""

GROUPS_LOOKED_AT = 128
"""Groups of a queue among which one look shares out the turns."""

TURNS_FORGOTTEN = 256
"""Past turns of a queue that one statement forgets: more than one look adds."""

FEW_ROWS_DIVISOR = 16
"""How many times fewer rows are looked at while events are large: what is left out was built."""


def execute(connection: Caller, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
    """Run a statement in the caller's own transaction and return its rows as tuples.

    Independent of how the session or the process read and write values: adapters, row
    and cursor factories, a pipeline, an encoding. Raises TypeError for anything but a psycopg
    connection or an SQLAlchemy Connection or Session on a PostgreSQL driver that takes `%(name)s`
    parameters.
    """
    if isinstance(connection, psycopg.Connection):
        with _speaking_utf8(connection.pgconn, partial(_run, connection)):
            return _run(connection, statement, parameters)
    if isinstance(connection, Awaited):
        with _speaking_utf8(connection.connection.pgconn, connection.run):
            return connection.run(statement, parameters)
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
        # Without rows there is no number; `description` would describe each column.
        return [] if cursor.rownumber is None else cursor.fetchall()


def _run_in_sqlalchemy(
    connection: sqlalchemy.Connection, statement: str, parameters: Mapping[str, Any]
) -> list[Any]:
    result = connection.exec_driver_sql(statement, dict(parameters))
    return [tuple(row) for row in result] if result.returns_rows else []


def _sqlalchemy_connection(connection: Any) -> sqlalchemy.Connection:
    """The SQLAlchemy connection of the caller's object. Raises TypeError."""
    kind = type(connection)
    connection = _connection_of_session(connection)
    if is_asynchronous(connection):
        raise TypeError(
            f"connection= of this call takes no {kind.__module__.partition('.')[0]} "
            f"{kind.__name__}: await the call whose name has an a before it, as in await "
            "client.astart_run(…, connection=session)"
        )
    if not isinstance(connection, sqlalchemy.Connection):
        raise TypeError(
            "connection= takes an SQLAlchemy Connection or Session, or a psycopg 3 Connection; "
            f"not {kind.__name__}"
            + (
                " (Django: connection.connection, inside of atomic())"
                if kind.__module__.startswith("django.")
                else ""
            )
        )
    dialect = connection.dialect
    if dialect.name != "postgresql" or (
        dialect.paramstyle != "pyformat" and not dialect.driver.startswith("psycopg")
    ):
        raise TypeError(
            "connection= must reach PostgreSQL through psycopg (postgresql+psycopg://…), not "
            f"{dialect.name}+{dialect.driver}: make the engine of app.engine.url"
        )
    return connection


def _connection_of_session(connection: Any) -> Any:
    """The connection of a Session or a scoped_session; anything else as it is."""
    # Its import takes a fifth of ours, and who has a Session has imported it.
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is not None and isinstance(connection, orm.scoped_session):
        connection = connection()
    if orm is not None and isinstance(connection, orm.Session):
        connection = connection.connection()
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
        # A transaction that has failed takes it back when it ends; a lost connection has ended.
        if pgconn.transaction_status not in FAILED:
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
            execution_options={"stream_results": True, "max_row_buffer": LAZY_BUFFER_ROWS},
        )
    with result:
        for row in result:
            yield tuple(row)


def refuse_two_phase(connection: Caller) -> None:
    """Raises ValueError for a transaction that is to be prepared: Postgres prepares no NOTIFY.

    At once and always, instead of at its end and only while a relay sleeps.
    """
    connection = _connection_of_session(connection)
    if isinstance(connection, sqlalchemy.Connection):
        refused = isinstance(connection.get_transaction(), sqlalchemy.TwoPhaseTransaction)
    else:
        driver = connection.connection if isinstance(connection, Awaited) else connection
        refused = getattr(driver, "_tpc", None) is not None  # psycopg has no public name for it
    if refused:
        raise ValueError(
            "connection= is in a two-phase transaction, and Postgres cannot prepare one that wakes "
            "a relay: do this in a transaction of its own, with a key= so that it can be repeated"
        )


def refuse_autocommit(connection: Caller) -> None:
    """Raises ValueError for a connection in autocommit that is in no transaction (ADR 0074)."""
    driver = _connection_of_session(connection)
    if isinstance(driver, sqlalchemy.Connection):
        driver = driver.connection.driver_connection
    elif isinstance(driver, Awaited):
        driver = driver.connection
    info = getattr(driver, "info", None)
    is_idle = getattr(info, "transaction_status", None) == pq.TransactionStatus.IDLE
    if is_idle and getattr(driver, "autocommit", False):
        raise ValueError(
            "connection= is in autocommit and in no transaction: this would be committed at once, "
            "whatever becomes of your own statements. Begin a transaction (psycopg: with "
            "connection.transaction(); Django: with atomic(); SQLAlchemy: an engine without "
            'isolation_level="AUTOCOMMIT", whose begin() begins none), or leave connection= out'
        )


def channel_of(schema: str) -> str:
    """The NOTIFY channel of a schema. Channels are per database, so the schema is in the name.

    Raises ValueError above 63 bytes: LISTEN would truncate silently and hear nothing.
    """
    channel = f"beatless_{schema}"
    if len(channel.encode()) > 63:
        raise ValueError(f"the NOTIFY channel {channel!r} is longer than 63 bytes")
    return channel


class Queries:
    """The relay's statements for one schema."""

    def __init__(
        self,
        schema: str,
        *,
        per_shard: int = 128,
        window: int = 64,
        groups_looked_at: int | None = None,
    ) -> None:
        few_per_shard = max(1, per_shard // FEW_ROWS_DIVISOR)
        sql = statements(
            __file__,
            schema,
            per_shard=per_shard,
            few_per_shard=few_per_shard,
            window=window,
            groups_looked_at=groups_looked_at or max(GROUPS_LOOKED_AT, window),
            turns_forgotten=max(TURNS_FORGOTTEN, 2 * window),
            batch_bytes=BATCH_BYTES,
            recheck_factor=RECHECK_FACTOR,
            defer_s=DEFER_S,
        )
        self.schema = schema
        self.per_shard = per_shard
        self.few_per_shard = few_per_shard
        self.window = window
        self.channel = channel_of(schema)
        self.bell_key = fragment("bell_key", schema)
        self.leader_key = fragment("leader_key", schema)
        self.chore_key = fragment("chore_key", schema)
        self.history_sql = sql["history"]
        self.pick_events_sql = sql["pick_events"]
        self.pick_few_events_sql = sql["pick_few_events"]
        self.pick_run_sql = sql["pick_run"]
        self.pick_one_sql = sql["pick_one"]
        self.heads_sql = sql["heads"]
        self.forget_events_sql = sql["forget_events"]
        self.dead_letter_sql = sql["dead_letter"]
        self.pick_tasks_sql = sql["pick_tasks"]
        self.pick_free_tasks_sql = sql["pick_free_tasks"]
        self.still_held_sql = sql["still_held"]
        self.count_turns_sql = sql["count_turns"]
        self.mark_sent_sql = sql["mark_sent"]
        self.mark_kept_sql = sql["mark_kept"]
        self.mark_lost_sql = sql["mark_lost"]
        self.defer_sql = sql["defer"]
        self.postpone_sql = sql["postpone"]
        self.next_due_sql = sql["next_due"]
        self.next_tick_sql = sql["next_tick"]
        self.resend_unclaimed_sql = sql["resend_unclaimed"]


class Turn(NamedTuple):
    """A turn of a group of a queue, which its run has when it is sent."""

    queue: str
    group: str | None
    """With the name of its namespace; empty for runs without a group. None: none has the turn."""
    start: float
    """Where it begins: of the turns of a queue the least is the next."""
    finish: float | None
    """Where the next one of its group can begin."""
    cursor: str | None
    """The last group that was looked at, if there are more."""
    is_short: bool
    """Places of the queue stay free though runs may wait: another pick finds these."""


class PickedTask(NamedTuple):
    """One due run, and the action for it."""

    message: TaskMessage
    act: str
    """`send` it; `look` whether its last message is lost; `defer` it, for its queue is full; `wake`
    it, and all others that are to be woken; `pass` by groups of which no run can be sent."""
    sent: int
    """How many messages of its queue are out as far as Postgres knows, of all relays."""
    turn: Turn | None
    """None in a queue without groups."""


def picked_tasks(
    rows: Iterable[tuple[str, str, str, int, str, str, int, str | None]],
) -> list[PickedTask]:
    """The rows of `pick_tasks_sql`."""
    return [
        PickedTask(
            TaskMessage(run_id=run_id, task=task, queue=queue, attempt=attempt, reason=reason),
            act,
            sent,
            None if note is None else Turn(queue, *json.loads(note)),
        )
        for run_id, task, queue, attempt, reason, act, sent, note in rows
    ]


def int_array(numbers: Iterable[int]) -> str:
    """An array of Postgres as text: psycopg takes many times as long to write the list."""
    return f"{{{','.join(map(str, numbers))}}}"


def array(values: Iterable[str | bool | int | float | None]) -> str:
    """As `int_array`, of any values: one that a cast then takes for an array of their type."""
    elements = [
        "NULL"
        if value is None
        # In quotes, within which only these two mean anything.
        else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if isinstance(value, str)
        else str(value)
        for value in values
    ]
    return f"{{{','.join(elements)}}}"


ALL_SHARDS = tuple(range(SHARDS))
