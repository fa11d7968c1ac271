"""The pauses of a stream between reads that Postgres refuses."""

import logging

import psycopg
import pytest
from sqlalchemy import exc

from beatless.streams.waiting import JournalRetry, Timeout


def test_a_read_that_failed_is_logged_without_its_statement(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = exc.OperationalError(
        "SELECT e.data FROM run_events e\n WHERE e.run_id = %(run_id)s",
        {"run_id": "secret"},
        psycopg.OperationalError(
            "server closed the connection unexpectedly\n\tThis probably means"
        ),
    )
    with caplog.at_level(logging.WARNING, "beatless"):
        JournalRetry(Timeout("r", None)).delay(lost, 1)

    (line,) = caplog.records
    assert vars(line)["reason"] == "server closed the connection unexpectedly"
