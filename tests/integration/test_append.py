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


@pytest.mark.parametrize("if_free", [False, True])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_an_append_is_one_round_trip(
    beatless_app: App,
    connection: psycopg.Connection,
    leased: str,
    tmp_path: Path,
    k: int,
    if_free: bool,
) -> None:
    journal = beatless_app.journal
    event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
    with (tmp_path / "trace").open("w+") as trace:
        connection.pgconn.trace(trace.fileno())
        assert journal.append(connection, leased, 1, [event] * k, if_free=if_free)
        connection.pgconn.untrace()
        trace.seek(0)
        # The server says once for each round trip that it is ready for the next one.
        assert trace.read().count("ReadyForQuery") == 1


def test_an_append_to_a_row_that_is_held_writes_nothing_unless_it_may_wait(
    beatless_app: App, connection: psycopg.Connection, postgres: psycopg.Connection, leased: str
) -> None:
    journal = beatless_app.journal
    event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})

    def append(token: int, after: int = 0) -> int | None:
        appended = journal.append(connection, leased, token, [event], after, if_free=True)
        return appended and appended.last_seq

    connection.execute("SET lock_timeout = '20 s'")  # one that waits shall fail, not hang
    with postgres.transaction():
        postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (leased,))
        assert append(1) is None
    assert append(1) == 1
    assert (append(2), append(1, after=2)) == (None, None)
    assert append(1, after=1) == 2
    stored = postgres.execute("SELECT seq FROM run_events WHERE run_id = %s ORDER BY 1", (leased,))
    assert stored.fetchall() == [(1,), (2,)]
