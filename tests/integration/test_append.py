"""What an append costs: one round trip, HOT updates, and few bytes for its outbox row."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from jobs import App
from jobs.testing import Kit
from orchestrator.events import EventType


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


def test_appends_update_runs_in_place(
    beatless_app: App, connection: psycopg.Connection, postgres: psycopg.Connection, leased: str
) -> None:
    journal = beatless_app.journal
    counts = (
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = to_regclass('runs')"
    )
    before = postgres.execute(counts).fetchone()
    event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
    for _ in range(100):
        journal.append(connection, leased, 1, [event])
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.execute("SELECT 1")
    after = postgres.execute(counts).fetchone()

    assert after[0] - before[0] == 100
    assert after[1] - before[1] == 100
