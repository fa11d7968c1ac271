"""Questions about runs read what they answer, by the server's own account, and not the history."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import event

from beatless import App
from beatless.auth import Tokens
from beatless.orchestrator import lease
from beatless.orchestrator.queues import QueueStatements
from beatless.orchestrator.records import FailedRunFilter
from beatless.orchestrator.retention import Retention
from beatless.outbox import queries
from tests import column_statistics
from tests.integration.test_drain_plan import scans

HISTORY = 10_000
"""Runs of which each ended an hour before the one before it, every thousandth as failed."""

HOUR = 3600.0

EXPLAIN = b"EXPLAIN (ANALYZE, FORMAT JSON) "


class Counting(queries.Cursor):
    """Executes each statement twice; first to count the rows that it reads, and rolled back."""

    read = 0

    def execute(self, query: Any, params: Any = None, **options: Any) -> "Counting":
        with self.connection.transaction(force_rollback=True):
            counted = psycopg.Cursor(self.connection)
            text = query if isinstance(query, bytes) else query.encode()
            counted.execute(EXPLAIN + text, params)
            ((plan,),) = counted.fetchall()
        Counting.read += sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            for node in scans(plan[0]["Plan"])
        )
        super().execute(query, params, **options)
        return self


LEARNT = ["with statistics", "of columns only"]
"""For statements that read a table in whole until it was analysed for the first time."""

SIZES_FORGOTTEN = """
UPDATE pg_class SET reltuples = -1, relpages = 0
 WHERE oid = ANY('{runs,run_events,dispatches}'::regclass[])"""
"""As TRUNCATE forgets them, which lets the statistics of columns stay."""


@pytest.fixture(params=["with statistics", "without"])
def history(
    beatless_app: App,
    postgres: psycopg.Connection,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[psycopg.Connection]:
    """Before a long history and one run that waits: the retry of a failed one."""
    with beatless_app.direct_connection() as guard, guard.transaction():
        # Against autovacuum, which would give some of the tables statistics at a time of its own.
        lock = "LOCK TABLE runs, run_events, dispatches IN SHARE UPDATE EXCLUSIVE MODE"
        guard.execute(f"SET search_path TO {beatless_app.settings.schema}".encode())
        column_statistics.forget(postgres)
        if request.param == "without":
            guard.execute(lock)
        fill(postgres)
        if request.param != "without":
            postgres.execute("ANALYZE runs, run_events, dispatches")
            guard.execute(lock)
        if request.param == "of columns only":
            postgres.execute(SIZES_FORGOTTEN)
        monkeypatch.setattr(Counting, "read", 0)
        monkeypatch.setattr(queries, "Cursor", Counting)
        postgres.cursor_factory = Counting
        yield postgres
    assert 0 < Counting.read < 100


def fill(postgres: psycopg.Connection) -> None:
    postgres.execute(
        f"""
INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, created_at, finished_at)
SELECT 'run-' || n, 'p', '1', 'q', CASE WHEN n % 1000 = 0 THEN 'failed' ELSE 'completed' END, 2,
       now() - make_interval(hours => n), now() - make_interval(hours => n)
  FROM generate_series(1, {HISTORY}) n""".encode()
    )
    postgres.execute(
        b"""
INSERT INTO run_events (run_id, seq, ts, type, source, data)
SELECT run_id, seq, finished_at, CASE seq WHEN 1 THEN 'RunStarted' ELSE 'RunFinished' END, 'worker',
       CASE seq WHEN 2 THEN jsonb_build_object('outcome', state) END
  FROM runs CROSS JOIN generate_series(1, 2) seq"""
    )
    postgres.execute(
        "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, retry_of)"
        " VALUES ('again', 'p', '1', 'q', 'queued', 1, 'run-1000')"
    )
    postgres.execute(
        "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)"
        " VALUES ('again', 1, 'p', 'q', 0, 'waiting', now(), 'start')"
    )


@pytest.fixture
def queues(beatless_app: App) -> QueueStatements:
    return QueueStatements(beatless_app.settings.schema)


@pytest.mark.parametrize("history", LEARNT, indirect=True)
def test_failed_runs(beatless_app: App, history: psycopg.Connection) -> None:
    found = beatless_app.journal.failed.page(
        history,
        namespace="default",
        chosen=FailedRunFilter(queue="q", seconds=3500 * HOUR),
        limit=100,
    )

    assert [run.run_id for run, _ in found] == ["run-3000", "run-2000"]


def test_whether_a_run_was_retried(beatless_app: App, history: psycopg.Connection) -> None:
    assert beatless_app.journal.retried(history, "run-1000", by_other_than="new")
    assert not beatless_app.journal.retried(history, "run-2000", by_other_than="new")


def test_the_running_runs(beatless_app: App, history: psycopg.Connection) -> None:
    with psycopg.Cursor(history) as cursor:
        cursor.execute("UPDATE runs SET state = 'running' WHERE run_id = 'again'")
        cursor.execute("UPDATE dispatches SET state = 'running'")

    found = beatless_app.journal.list_runs(history, namespace="default", state="running")

    assert [run.run_id for run in found] == ["again"]


# Many may wait: whether to walk them or the newest runs is for the planner to say.
@pytest.mark.parametrize("history", ["with statistics"], indirect=True)
def test_the_runs_that_wait(beatless_app: App, history: psycopg.Connection) -> None:
    found = beatless_app.journal.list_runs(history, namespace="default", state="queued")

    assert [run.run_id for run in found] == ["again"]


def test_the_newest_runs(beatless_app: App, history: psycopg.Connection) -> None:
    found = beatless_app.journal.list_runs(history, namespace="default", limit=3)

    assert [run.run_id for run in found] == ["again", "run-1", "run-2"]


@pytest.mark.parametrize("history", LEARNT, indirect=True)
def test_clean(queues: QueueStatements, history: psycopg.Connection) -> None:
    asked = {"state": "completed", "seconds": 9000.5 * HOUR, "namespace": "default"}

    removed = queues.remove_finished(history, **asked, limit=3)

    assert sorted(removed) == ["run-9997", "run-9998", "run-9999"]


@pytest.mark.parametrize("history", LEARNT, indirect=True)
def test_what_clean_would_take(queues: QueueStatements, history: psycopg.Connection) -> None:
    found = queues.count_finished(
        history, state="completed", seconds=9990.5 * HOUR, namespace="default"
    )

    assert found == (9, 18)


def test_the_queues_without_what_ended(
    queues: QueueStatements, history: psycopg.Connection
) -> None:
    (state,) = queues.states(history, ended=False)

    assert (state.name, state.queued, state.completed) == ("q", 1, 0)


@pytest.mark.parametrize("history", LEARNT, indirect=True)
def test_retention(beatless_app: App, history: psycopg.Connection) -> None:
    retention = Retention(beatless_app.settings.schema, events_days=9998.5 / 24, runs_days=0.5)

    while retention.step(history) < 60:
        pass

    with psycopg.Cursor(history) as cursor:
        left = cursor.execute("SELECT count(*) FROM run_events").fetchone()
    assert left == (2 * (HISTORY - 2),)


def test_drain(queues: QueueStatements, history: psycopg.Connection) -> None:
    assert queues.remove_waiting(history, "q") == ["again"]


def test_tokens_among_many_of_streams(beatless_app: App, history: psycopg.Connection) -> None:
    """A new one takes away what expired long ago, as many as it may."""
    with psycopg.Cursor(history) as cursor:
        cursor.execute(
            f"""
INSERT INTO api_tokens (id, hash, namespace, scopes, run_id, expires_at)
SELECT 's' || n, decode(md5(n::text), 'hex'), 'default', '{{runs:read}}', 'run-' || n,
       now() - make_interval(hours => CASE WHEN n <= 110 THEN 25 ELSE 1 END)
  FROM generate_series(1, {HISTORY}) n""".encode()
        )
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(beatless_app.engine, "before_cursor_execute", note)
    try:
        assert not tokens.any()
        token_id, _ = tokens.create(["runs:read"])
        assert [token.id for token in tokens.list()] == [token_id]
    finally:
        event.remove(beatless_app.engine, "before_cursor_execute", note)
    with psycopg.Cursor(history) as cursor:
        cursor.execute("SELECT count(*) FROM api_tokens")
        assert cursor.fetchone() == (HISTORY - 100 + 1,)
        cursor.execute("DELETE FROM api_tokens WHERE id = %s", (token_id,))

    for statement, parameters in asked:
        history.execute(statement.encode(), parameters)


def test_when_the_events_of_runs_are_due_that_are_all_needed(
    beatless_app: App, history: psycopg.Connection
) -> None:
    with psycopg.Cursor(history) as cursor:
        cursor.execute(
            "UPDATE runs SET parent_id = 'again', root_id = 'again',"
            " child_no = substr(run_id, 5)::int WHERE run_id <> 'again'"
        )
    days = (HISTORY - 0.5) / 24
    retention = Retention(beatless_app.settings.schema, events_days=days, runs_days=0)

    assert retention.step(history) == HOUR


def test_the_leases_of_workers_whose_steps_have_emitted_much(
    beatless_app: App, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOKED_BACK", 50)
    leases = lease.Leases(beatless_app.settings.schema, seconds=60)
    run_id = beatless_app.client.start_run("sleepy").run_id
    held = leases.claim(
        postgres, run_id, plan="sleepy", worker="here:w", first_step="speaks", dispatch=1
    )
    assert held is not None
    emitted = (
        "INSERT INTO run_events (run_id, seq, ts, type, source, step, attempt)"
        " SELECT %s, seq, now(), 'StepOutput', 'worker', 'speaks', 1"
        " FROM generate_series(3, 5000) seq"
    )
    postgres.execute(emitted, (run_id,))
    postgres.execute("UPDATE runs SET last_seq = 5000")
    postgres.execute("ANALYZE runs, run_events, dispatches")
    monkeypatch.setattr(Counting, "read", 0)
    postgres.cursor_factory = Counting

    assert [each.token for each in leases.held_by(postgres, ["w"])] == [held.token]
    assert 0 < Counting.read < 6 * 50
