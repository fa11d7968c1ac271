"""What the API says and logs of errors of its own."""

import logging

import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import exc
from starlette.testclient import TestClient

from beatless.api import problems
from beatless.transactions import first_line

LOST = exc.OperationalError(
    "SELECT r.input FROM runs r\n WHERE r.run_id = %(run_id)s",
    {"run_id": "secret"},
    psycopg.OperationalError(
        "consuming input failed: server closed the connection unexpectedly\n\tThis probably means …"
    ),
)


def test_a_lost_postgres_is_one_line_without_the_statement(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = FastAPI()
    problems.install(api)

    @api.get("/")
    def lose() -> None:
        raise LOST

    with caplog.at_level(logging.WARNING, "beatless"):
        answer = TestClient(api).get("/")

    assert answer.status_code == 503
    assert "SELECT" not in answer.text
    (line,) = [record for record in caplog.records if record.name.startswith("beatless")]
    assert vars(line)["reason"] == (
        "consuming input failed: server closed the connection unexpectedly"
    )


def test_the_first_line_of_an_error_without_text_is_its_type() -> None:
    assert first_line(psycopg.OperationalError()) == "OperationalError"
