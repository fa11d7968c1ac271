"""Whatever happens to a living run updates its row in place: HOT, without touching an index.

A run alone on a fresh page has room for some twenty versions of its row, so that nothing here
depends on what others do in the same database: an update that is not HOT was kept from it by an
index.
"""

from collections.abc import Iterator

import psycopg
import pytest

from beatless import App
from beatless.client import RunRequest
from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.events import EventType
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from beatless.testing import Kit

COUNTS = (
    "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = to_regclass('runs')"
)


@pytest.fixture
def session(beatless_app: App, postgres: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """The one session that writes, on tables without a page yet."""
    postgres.execute("TRUNCATE runs, run_events, run_outbox, dispatches")
    with beatless_app.executors.connect() as found:
        yield found


def updates(session: psycopg.Connection, postgres: psycopg.Connection) -> tuple[int, int]:
    """(updates of runs so far, HOT ones), with what the session has not reported yet."""
    session.execute("SELECT pg_stat_force_next_flush()")
    session.execute("SELECT 1")
    return postgres.execute(COUNTS).fetchone()


def begin(beatless: Kit, session: psycopg.Connection, run_id: str = "hot") -> Lease:
    with session.transaction():
        beatless.client.start_run("two_steps", run_id=run_id, key=run_id, connection=session)
    lease = beatless.app.leases.claim(
        session, run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    assert lease is not None
    return lease


def live(app: App, session: psycopg.Connection, lease: Lease) -> int:
    """Everything that a run can live through; how many updates that were."""
    journal, run_id = app.journal, lease.run.run_id
    trace = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
    for if_free in (False, True, False, True):
        assert app.leases.extend(session, [lease]) == []
        assert journal.append(session, run_id, lease.token, [trace, trace], if_free=if_free)
    app.leases.renew_token(session, lease)
    again = Settlement.ignoring_cancel(Boundary(events=[trace], state=RunState.QUEUED))
    assert journal.settle(session, run_id, lease.token, again)
    claimed = app.leases.claim(
        session, run_id, plan="two_steps", worker="v", first_step="first", dispatch=2
    )
    assert claimed is not None
    cancels = Cancels(journal.schema, max_event_bytes=1000)
    cancels.cancel(session, [run_id], reason=None, undo={}, source="api")
    boundary = Settlement(
        normal=Boundary(state=RunState.RUNNING),
        if_cancelled=Boundary(events=[trace], state=RunState.RUNNING),
    )
    assert journal.settle(session, run_id, claimed.token, boundary)
    end = journal.new_event(EventType.RUN_FINISHED, where="here", data={"outcome": "cancelled"})
    finish = Settlement(
        normal=Boundary(state=RunState.COMPLETED),
        if_cancelled=Boundary(events=[end], state=RunState.CANCELLED),
    )
    assert journal.settle(session, run_id, claimed.token, finish)
    return 14


def test_every_update_of_a_run_from_its_claim_to_its_end_is_hot(
    beatless: Kit, beatless_app: App, session: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    before = updates(session, postgres)
    done = 1 + live(beatless_app, session, begin(beatless, session))
    after = updates(session, postgres)

    assert after[0] - before[0] == done
    assert after[1] - before[1] == done


def test_the_test_above_sees_an_index_that_breaks_it(
    beatless: Kit, beatless_app: App, session: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    postgres.execute("CREATE INDEX spoiler ON runs (state)")
    try:
        before = updates(session, postgres)
        live(beatless_app, session, begin(beatless, session))
        after = updates(session, postgres)
    finally:
        postgres.execute("DROP INDEX spoiler")
    assert after[1] - before[1] < after[0] - before[0]


def test_pages_of_runs_keep_room_for_their_updates(
    beatless: Kit, session: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(200)])
    pages = postgres.execute(
        # The header of a row is in its size; 4 bytes of its page point to it.
        "SELECT sum(pg_column_size(runs.*) + 4), pg_relation_size('runs') FROM runs"
    ).fetchone()
    assert pages[0] / pages[1] < 0.75
