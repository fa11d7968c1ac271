"""Which failures of a statement are a row's, so that its run alone is set aside."""

import psycopg
import pytest
from psycopg import errors

from beatless.outbox.observer import RunSetAside, Signal
from beatless.outbox.quarantine import SET_ASIDE_S, Quarantine, is_row_fault


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


def test_a_run_whose_row_is_refused_is_set_aside_for_a_while() -> None:
    seen: list[Signal] = []
    quarantine = Quarantine(seen.append)
    with quarantine.isolating("culprit"):
        raise errors.NumericValueOutOfRange
    quarantine.release_due()

    assert quarantine.run_ids == ["culprit"]
    assert quarantine.additions == 1
    assert 0 < quarantine.retry_in_s[0] <= SET_ASIDE_S
    assert seen == [RunSetAside(run_id="culprit")]


def test_a_failure_that_is_no_rows_sets_no_run_aside() -> None:
    seen: list[Signal] = []
    quarantine = Quarantine(seen.append)
    with pytest.raises(errors.ReadOnlySqlTransaction), quarantine.isolating("bystander"):
        raise errors.ReadOnlySqlTransaction

    assert quarantine.run_ids == []
    assert seen == []
