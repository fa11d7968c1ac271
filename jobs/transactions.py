"""Our own transactions: repeated after a conflict, with errors that name an absent server."""

import itertools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.errors import (
    SchemaBehind,
    StatementTimeout,
    TransactionConflict,
    Unreachable,
    WrongEncoding,
)
from beatless.outbox.backoff import Backoff
from beatless.outbox.queries import Caller
from beatless.schema import current, head

T = TypeVar("T")
Connection = TypeVar("Connection")

TRIES = 5
"""How often a call is tried that Postgres ends for the sake of another."""

CONFLICTS = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
"""The codes of such errors. A serialization failure needs a session that is not ours to set."""


ENDED = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
)
"""Errors by which a server that is there ends a statement."""

ABSENT = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InvalidSchemaName,
)
"""Errors of a database without our tables, or with those of an earlier version."""

NEEDS_TRANSACTIONS = "beatless_needs_transactions"
"""The execution option of an engine on which autocommit is not used."""


def transact(
    engine: sqlalchemy.Engine,
    act: Callable[[sqlalchemy.Connection], T],
    *,
    twice: bool,
) -> T:
    """Act in a transaction of its own.

    A pooled connection may have died since its last use, and another transaction that locks the
    same rows in another order may deadlock. With `twice` it is also repeated when the answer to its
    commit was lost, although it may be stored.
    """
    return _repeated(engine.begin, act, twice=twice)


def transact_by_driver(
    engine: sqlalchemy.Engine,
    act: Callable[[Caller], T],
    *,
    twice: bool,
    each_statement: bool = False,
) -> T:
    """`transact` on the driver's connection, for an act that does nothing but `execute`.

    Without SQLAlchemy's own work for each connection, statement and row (ADR 0107). With
    `each_statement` Postgres begins and commits each itself, in the round trip of the statement.
    An engine that `needs_transactions` has none of both.
    """
    if needs_transactions(engine):
        return transact(engine, act, twice=twice)
    return _repeated(partial(_driver, engine, autocommit=each_statement), act, twice=twice)


def _repeated(
    begin: Callable[[], AbstractContextManager[Connection]],
    act: Callable[[Connection], T],
    *,
    twice: bool,
) -> T:
    backoff, pause = Backoff(initial=0.02, cap=0.5), threading.Event()
    for tried in itertools.count(1):
        acted = False
        try:
            with begin() as connection:
                result = act(connection)
                acted = True
            return result
        except TransactionConflict:
            if tried == TRIES:
                raise
            pause.wait(backoff.delay(tried))
        except exc.DBAPIError as error:
            conflict = isinstance(error.orig, CONFLICTS)
            lost = error.connection_invalidated and tried == 1 and (twice or not acted)
            if not lost and (not conflict or tried == TRIES):
                raise
            if conflict:
                # At once, we would take from the winner the lock that it was just given.
                pause.wait(backoff.delay(tried))
    raise AssertionError("unreachable")


def set_in_each_transaction(engine: sqlalchemy.Engine, settings: Mapping[str, str]) -> None:
    """Set these when a transaction begins: of a pooler, whose sessions are not ours to set.

    Statements of this engine need a transaction from then on.
    """
    sets = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql(f"SELECT {sets}")

    sqlalchemy.event.listen(engine, "begin", begin)
    engine.update_execution_options(**{NEEDS_TRANSACTIONS: True})


def needs_transactions(engine: sqlalchemy.Engine) -> bool:
    """Whether a statement in autocommit would lack what is set in each transaction."""
    return NEEDS_TRANSACTIONS in engine.get_execution_options()


@contextmanager
def _driver(engine: sqlalchemy.Engine, *, autocommit: bool) -> Iterator[psycopg.Connection[Any]]:
    """A pooled connection of the driver, in a transaction or in autocommit; SQLAlchemy's errors.

    The pool takes back what is left of a transaction.
    """
    pooled = engine.raw_connection()
    connection: Any = pooled.driver_connection
    try:
        connection.autocommit = autocommit
        yield connection
        if not autocommit:
            connection.commit()
    except psycopg.Error as error:
        lost = connection.closed
        if lost:
            pooled.invalidate(error)
            engine.dispose()  # the others in the pool have died with it, or are as old
        raise exc.DBAPIError.instance(
            None, None, error, psycopg.Error, connection_invalidated=lost, dialect=engine.dialect
        ) from error
    finally:
        if autocommit and not connection.closed:
            try:
                connection.autocommit = False
            except psycopg.Error as error:  # an interrupted statement goes on
                pooled.invalidate(error)
        pooled.close()


def first_line(error: BaseException) -> str:
    """What the driver says in one line: SQLAlchemy adds the statement and its parameters."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


@contextmanager
def reaching_postgres(schema: str, engine: sqlalchemy.Engine | None = None) -> Iterator[None]:
    """Turn the errors of an absent server or schema into ours, which have advice.

    With an `engine` a schema that is ahead is told from one that is behind.
    """
    try:
        yield
    except (exc.OperationalError, psycopg.OperationalError) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        reason = first_line(error)
        if isinstance(cause, ENDED):
            raise StatementTimeout(reason) from error
        raise Unreachable("Postgres", reason) from error
    except exc.TimeoutError as error:
        reason = "all connections of this process's pool are in use"
        raise Unreachable("Postgres", reason) from error
    except exc.DataError as error:
        # Only the database can be at fault: invalid text was refused before.
        if isinstance(error.orig, psycopg.errors.UntranslatableCharacter):
            found = re.search(r'in encoding "(\w+)"$', error.orig.diag.message_primary or "")
            raise WrongEncoding(
                f"of schema {schema}", found[1] if found else "another encoding"
            ) from error
        raise
    except exc.ProgrammingError as error:
        if isinstance(error.orig, ABSENT):
            raise SchemaBehind(schema, _found(schema, engine), head()) from error
        raise


@contextmanager
def on_a_given_connection(schema: str, engine: sqlalchemy.Engine) -> Iterator[None]:
    """Turn the errors of an absent schema, and of a lost race, into ours.

    Others stay as the caller's driver has them. The transaction of the connection has failed: the
    `engine` is asked for the schema's revision.
    """
    try:
        yield
    except (exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        if isinstance(cause, ABSENT):
            raise SchemaBehind(schema, _found(schema, engine), head(), given=True) from error
        if isinstance(cause, psycopg.errors.SerializationFailure) or _is_unseen(cause, schema):
            raise TransactionConflict(first_line(error)) from error
        raise


def _is_unseen(error: BaseException | None, schema: str) -> bool:
    """Whether a row of ours is there of which the transaction has seen that it is not."""
    return isinstance(error, psycopg.errors.UniqueViolation) and error.diag.schema_name == schema


def _found(schema: str, engine: sqlalchemy.Engine | None) -> str:
    """The revision of a schema that is ahead of this code, else ""."""
    if engine is None:
        return ""
    try:
        with engine.connect() as connection:
            found = current(connection, schema) or ""
    except exc.SQLAlchemyError:
        return ""  # the error that was seen first is told
    return found if found > head() else ""
