"""Dead letters by number, run by id: which one is meant, and in pages."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
import pytest
from fastapi.testclient import TestClient

from beatless import BadRequest, RunNotFound
from beatless.api import create_api
from beatless.cli import run
from beatless.errors import JobsError
from beatless.http import AsyncClient, Client, calls
from beatless.testing import Kit
from tests.serving import serving


def message(postgres: psycopg.Connection, run_id: str) -> int:
    """A letter of this run, and its number."""
    (number,) = postgres.execute(
        "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES ('event', %s, 'x',"
        """ '{"shard": 1, "from_seq": 1, "to_seq": 1}') RETURNING id""",
        [run_id],
    ).fetchone()
    return int(number)


@dataclass
class Said:
    status: int
    out: str
    err: str


Cli = Callable[..., Said]


@pytest.fixture
def cli(beatless: Kit, monkeypatch, capsys) -> Cli:
    """A command with the settings of the test's app."""
    for name, value in beatless.app.settings.to_env().items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> Said:
        status = run(list(arguments))
        return Said(status, *capsys.readouterr())

    return call


@pytest.mark.slow
def test_all_clients_read_any_number_of_them_in_pages(
    beatless: Kit, postgres: psycopg.Connection, monkeypatch
) -> None:
    monkeypatch.setattr(calls, "PAGE", 2)
    first = beatless.start_run("fatally").run_id
    numbers = [message(postgres, first) for _ in range(5)]
    failed = {first, *(beatless.start_run("fatally").run_id for _ in range(4))}
    beatless.work_until_idle()
    letters = beatless.client.dead_letters()
    assert [letter.id for letter in letters] == numbers
    assert beatless.client.dead_letters(limit=2, after=numbers[1]) == letters[2:4]
    assert beatless.client.dead_letter(numbers[3]) == letters[3]

    async def asked(url: str) -> None:
        async with AsyncClient(url) as client:
            assert await client.dead_letters() == letters
            assert await client.dead_letters(3) == letters[:3]
            assert await client.dead_letter(numbers[3]) == letters[3]
            assert {found.run_id for found in await client.failed_runs(limit=5000)} == failed

    with serving(beatless.app) as api, Client(api.url) as client:
        assert client.dead_letters() == letters
        assert client.dead_letters(3) == letters[:3]
        assert client.dead_letter(numbers[3]) == letters[3]
        assert {found.run_id for found in client.failed_runs(limit=5000)} == failed
        with pytest.raises(BadRequest, match="does not exist"):
            client.dead_letter(numbers[-1] + 1)
        asyncio.run(asked(api.url))


def test_discard_touches_no_run_that_is_no_dead_letter(
    beatless: Kit, postgres: psycopg.Connection, cli: Cli
) -> None:
    ended = beatless.start_run("two_steps").run_id
    retried = beatless.start_run("fatally").run_id
    beatless.work_until_idle()
    beatless.client.retry_run(retried)
    waiting = beatless.start_run("two_steps").run_id
    number = message(postgres, ended)
    for run_id in (ended, retried, waiting):
        for command in ("discard", "requeue", "show"):
            refused = cli("dead-letters", command, run_id)
            assert refused.status == 2, refused
            assert "is none" in refused.err
        assert beatless.client.get_run(run_id)
    assert cli("dead-letters", "discard", str(number + 1)).status == 2
    assert cli("dead-letters", "discard", str(number)).status == 0
    assert beatless.client.dead_letters() == []


def test_a_number_is_not_taken_for_a_run_of_the_same_name(
    beatless: Kit, postgres: psycopg.Connection, cli: Cli
) -> None:
    other = beatless.start_run("two_steps").run_id
    number = message(postgres, other)
    beatless.start_run("fatally", run_id=str(number))
    beatless.work_until_idle()
    for command in ("discard", "requeue", "show"):
        assert "choose --message or --run" in cli("dead-letters", command, str(number)).err
    shown = cli("--json", "dead-letters", "show", str(number), "--message").out
    assert json.loads(shown)["kind"] == "message"
    assert cli("dead-letters", "discard", str(number), "--run").status == 0
    assert [letter.id for letter in beatless.client.dead_letters()] == [number]
    with pytest.raises(RunNotFound):
        beatless.client.get_run(str(number))


class Unforeseen(JobsError):
    """One that has no status."""


def test_an_error_without_a_status_is_logged_with_its_traceback(
    beatless: Kit, monkeypatch, caplog
) -> None:
    api = create_api(beatless.app, is_open=True)
    monkeypatch.setattr(type(beatless.client), "get_run", raising)
    with TestClient(api, raise_server_exceptions=False) as client:
        answer = client.get("/v1/runs/x")
    assert answer.status_code == 500
    assert "secret place" not in answer.text
    assert "in raising" in caplog.text
    assert "secret place" in caplog.text


def raising(*_arguments: object, **_options: object) -> None:
    raise Unforeseen("secret place")
