"""Which failures of a statement are a row's, so that its run alone is set aside."""

import psycopg
import pytest
from psycopg import errors

from beatless.outbox.quarantine import is_row_fault


@pytest.mark.parametrize(
    "error",
    [
        errors.NumericValueOutOfRange(),
        errors.InvalidTextRepresentation(),
        errors.CheckViolation(),
        errors.ProgramLimitExceeded(),
        errors.RaiseException(),
        errors.DataCorrupted(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_value_that_postgres_refuses_is_its_rows(error: psycopg.Error) -> None:
    assert is_row_fault(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.ReadOnlySqlTransaction(),
        errors.AdminShutdown(),
        errors.QueryCanceled(),
        errors.LockNotAvailable(),
        errors.SerializationFailure(),
        errors.DeadlockDetected(),
        errors.DiskFull(),
        errors.OutOfMemory(),
        errors.InsufficientPrivilege(),
        errors.UndefinedTable(),
        errors.UndefinedColumn(),
        errors.InvalidSqlStatementName(),
        psycopg.OperationalError("the connection is lost"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_befalls_every_statement_is_no_rows(error: psycopg.Error) -> None:
    """A primary that becomes read-only would else have every run set aside for a minute."""
    assert not is_row_fault(error)
