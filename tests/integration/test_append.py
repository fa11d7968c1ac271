"""What a write costs: an append is one round trip, and whatever a living run does is HOT."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from beatless import App
from beatless.orchestrator.events import EventType
from beatless.testing import Kit


@pytest.fixture
def connection(beatless_app: App) -> Iterator[psycopg.Connection]:
    found = beatless_app.executors.connect()
    yield found
    found.close()


@pytest.fixture
def leased(postgres: psycopg.Connection, beatless: Kit) -> str:
    """A run that a worker holds with token 1."""
    postgres.execute(
        "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, lease_token)"
        " VALUES ('test-leased', 'two_steps', 'v', 'default', 'running', 0, 1)"
    )
    return "test-leased"


@pytest.mark.parametrize("k", [1, 2, 50])
def test_an_append_is_one_round_trip(
    beatless_app: App, connection: psycopg.Connection, leased: str, tmp_path: Path, k: int
) -> None:
    journal = beatless_app.journal
    event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
    with (tmp_path / "trace").open("w+") as trace:
        connection.pgconn.trace(trace.fileno())
        assert journal.append(connection, leased, 1, [event] * k)
        connection.pgconn.untrace()
        trace.seek(0)
        # The server says once for each round trip that it is ready for the next one.
        assert trace.read().count("ReadyForQuery") == 1
