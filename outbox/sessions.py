"""Settings of our sessions, independent of role, database and environment.

There is one list. A session of ours sets it when it begins: one round trip. Not as startup options,
which PgBouncer refuses; and not through a pooler at all, whose sessions are not ours to set.
Statements that run there, or in a caller's transaction, depend on nothing of it: see
`beatless.outbox.adapters` and `beatless.outbox.queries.execute`.
"""

import re
from collections.abc import Mapping
from typing import Any

import psycopg

FOR_WRITING = """
SELECT set_config(name, 'off', false) FROM pg_settings
 WHERE name = 'default_transaction_read_only'
   AND source IN ('user', 'database', 'database user', 'client')
"""
"""Not what the server's own configuration says: that is how providers keep a full disk from writes,
and it may be said at any time."""

CLIENT_CHECK_INTERVAL = "5s"
"""How often Postgres looks, during a statement, whether its client is still there."""

FIRST = "SET statement_timeout TO 0"

SET_ALL = """
SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s(name, value)
 WHERE current_setting(name, true) IS NOT NULL
"""

CLIENT_CHECK = "client_connection_check_interval"
"""One that waits for a lock would else stay, with its snapshot, when we are gone. A platform that
cannot look after its clients refuses it, and with it all that is set in its transaction."""

KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 1,
    "keepalives_count": 3,
    "tcp_user_timeout": 8000,
    "connect_timeout": 5,
}

SHARED = {
    # Its limits would end us: our long statements have limits of their own.
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "default_transaction_deferrable": "off",
    "array_nulls": "on",
    # Keepalives are each side's own: by default the server's are every two hours, and until then it
    # keeps the locks of a host that is gone.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "8000",
}
"""Of every session of ours, those in which steps run statements of their own too."""

OWN = SHARED | {
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "default_transaction_isolation": "read committed",
    "jit": "off",
    # Parallel workers begin with the settings of the database: its transaction_timeout may end one
    # before it has ours, and the statement with it.
    "max_parallel_workers_per_gather": "0",
}
"""Settings of the sessions that run only our statements."""


def prepare_session(
    connection: psycopg.Connection[Any],
    settings: Mapping[str, str] = OWN,
    *,
    options: str = "",
    client_check: str = CLIENT_CHECK_INTERVAL,
) -> None:
    """Set all that our session depends on. It is in autocommit mode, and closed if that fails.

    `options` are those of its URL: what is set there, as by `?options=-c statement_timeout=30s`, is
    meant for us and stays. Settings that this server lacks are left out. `client_check`
    has effect from here on: another one that is set later waits for the first to come round.
    """
    kept, wanted = _of_url(options), _wanted(settings, options)
    try:
        try:
            _set_all(connection, wanted | {CLIENT_CHECK: client_check})
        except psycopg.errors.InvalidParameterValue:
            _set_all(connection, wanted)
        read_only = connection.pgconn.parameter_status(b"default_transaction_read_only")
        if read_only == b"on" and "default_transaction_read_only" not in kept:
            connection.execute(FOR_WRITING)
    except BaseException:
        connection.close()
        raise


async def prepare_async_session(
    connection: psycopg.AsyncConnection[Any], settings: Mapping[str, str], *, options: str
) -> None:
    """`prepare_session` of an asynchronous one."""
    kept, wanted = _of_url(options), _wanted(settings, options)
    try:
        try:
            await _set_all_async(connection, wanted | {CLIENT_CHECK: CLIENT_CHECK_INTERVAL})
        except psycopg.errors.InvalidParameterValue:
            await _set_all_async(connection, wanted)
        read_only = connection.pgconn.parameter_status(b"default_transaction_read_only")
        if read_only == b"on" and "default_transaction_read_only" not in kept:
            await connection.execute(FOR_WRITING)
    except BaseException:
        await connection.close()
        raise


def _set_all(connection: psycopg.Connection[Any], settings: Mapping[str, str]) -> None:
    """Set these in one round trip and transaction."""
    with connection.pipeline():
        if "statement_timeout" in settings:
            # First, and by itself: the other statement could be too long already.
            connection.execute(FIRST)
        connection.execute(SET_ALL, (list(settings), list(settings.values())))


async def _set_all_async(
    connection: psycopg.AsyncConnection[Any], settings: Mapping[str, str]
) -> None:
    async with connection.pipeline():
        if "statement_timeout" in settings:
            await connection.execute(FIRST)
        await connection.execute(SET_ALL, (list(settings), list(settings.values())))


def _of_url(options: str) -> set[str]:
    """The names of the settings that these options of a URL set."""
    return {name.lower() for name in re.findall(r"(?:-c\s*|--)([\w.]+)\s*=", options)}


def _wanted(settings: Mapping[str, str], options: str) -> dict[str, str]:
    kept = _of_url(options)
    return {name: value for name, value in settings.items() if name.lower() not in kept}


def prepare_to_drain(connection: psycopg.Connection[Any]) -> None:
    """Session settings of a connection that drains.

    A queue table's statistics swing between empty and full, so the measured plans are pinned:
    without sorts only the index that gives an order is read for the first rows of it. A delete that
    a crash takes back is a duplicate that subscribers drop: no need to await its fsync.
    """
    connection.execute(
        "SELECT set_config(name, value, false) FROM (VALUES ('synchronous_commit', 'off'), "
        "('enable_hashjoin', 'off'), ('enable_mergejoin', 'off'), ('enable_seqscan', 'off'), "
        "('enable_bitmapscan', 'off'), ('enable_memoize', 'off'), ('enable_sort', 'off'), "
        "('enable_incremental_sort', 'off'), ('jit', 'off'), "
        "('plan_cache_mode', 'force_generic_plan')) AS s(name, value)"
    )
