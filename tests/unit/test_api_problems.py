"""What the API says and logs of errors of its own."""

import asyncio
import logging
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import exc

from beatless.api import problems
from beatless.transactions import first_line

LOST = exc.OperationalError(
    "SELECT r.input FROM runs r\n WHERE r.run_id = %(run_id)s",
    {"run_id": "secret"},
    psycopg.OperationalError(
        "consuming input failed: server closed the connection unexpectedly\n\tThis probably means …"
    ),
)


def get(api: FastAPI) -> tuple[int, str]:
    """The status and the body of an answer, without a client."""
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    asyncio.run(api(scope, receive, send))
    return said[0]["status"], b"".join(each.get("body", b"") for each in said).decode()


def test_a_lost_postgres_is_one_line_without_the_statement(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = FastAPI()
    problems.install(api)

    @api.get("/")
    async def lose() -> None:
        raise LOST

    with caplog.at_level(logging.WARNING, "beatless"):
        status, text = get(api)

    assert status == 503
    assert "SELECT" not in text
    (line,) = [record for record in caplog.records if record.name.startswith("beatless")]
    assert vars(line)["reason"] == (
        "consuming input failed: server closed the connection unexpectedly"
    )


def test_the_first_line_of_an_error_without_text_is_its_type() -> None:
    assert first_line(psycopg.OperationalError()) == "OperationalError"
