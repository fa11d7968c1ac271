"""Statements sent without waiting for their results: these, their cancel or their failure."""

import itertools
from typing import Any

import psycopg
from psycopg import errors as pg_errors
from psycopg import pq

from beatless.outbox.clock import monotonic
from beatless.outbox.direct_connection import STATEMENT_TIMEOUT_S, DirectConnection
from beatless.outbox.sockets import readable

CANCEL_RESEND_S = 0.05
"""Seconds after which a cancel that had no effect is sent again."""

_numbers = itertools.count()


def cancel(connection: DirectConnection) -> bool:
    """End a statement that was sent without waiting; whether it had success before.

    A cancel may overtake its statement, and Postgres ignores one that finds nothing to cancel.
    """
    deadline = monotonic() + STATEMENT_TIMEOUT_S
    while connection.pgconn.is_busy() and monotonic() < deadline:
        connection.cancel_safe(timeout=STATEMENT_TIMEOUT_S)
        if readable([connection], CANCEL_RESEND_S):
            connection.pgconn.consume_input()
    return finish(connection, ignore=pg_errors.QueryCanceled)


def finish(connection: DirectConnection, ignore: type[psycopg.Error] | None = None) -> bool:
    """Take the results of a statement that was sent without waiting; whether it had success."""
    pgconn = connection.pgconn
    deadline = monotonic() + STATEMENT_TIMEOUT_S
    while pgconn.is_busy():
        if not readable([connection], deadline - monotonic()):
            raise psycopg.OperationalError("a session of the relay does not answer")
        pgconn.consume_input()
    done = True
    while result := pgconn.get_result():
        if result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            continue
        done = False
        error = psycopg.errors.error_from_result(result)
        if ignore is None or not isinstance(error, ignore):
            raise error
    return done


def prepare_anew(connection: psycopg.Connection[Any]) -> None:
    """Forget which statements are prepared, after a failure in a pipeline without a transaction.

    psycopg takes the statements behind the failure for prepared. Nor does it check the effect of a
    statement that it has seen before: this one has another text each time. Behind a pooler nothing
    is prepared, and the session may be somebody else's too.
    """
    if connection.prepare_threshold is not None:
        connection.execute(f"DEALLOCATE ALL -- {next(_numbers)}", prepare=False)
