"""What the relay's statements read, by the server's own account: the batch, never the backlog.

Statistics of a queue table are wrong most of the time, so the plans must not depend on them.
"""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from beatless import App
from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Queries
from beatless.outbox.sessions import prepare_to_drain
from tests import column_statistics

BACKLOG = 16_000

STATISTICS = {
    "none": ("", ""),
    "of this backlog": ("", "ANALYZE run_outbox, dispatches"),
    "of an empty table that was full": ("ANALYZE run_outbox, dispatches", ""),
    "of an empty table that was vacuumed": ("VACUUM ANALYZE run_outbox, dispatches", ""),
}


def backlogged(postgres: psycopg.Connection, statistics: str) -> psycopg.Connection:
    """A session of a drain, before a long backlog."""
    before, after = STATISTICS[statistics]
    column_statistics.forget(postgres)
    fill(postgres)
    postgres.execute("DELETE FROM run_outbox")
    postgres.execute("DELETE FROM dispatches")
    if before:
        postgres.execute(before.encode())
    fill(postgres)
    if after:
        postgres.execute(after.encode())
    prepare_to_drain(postgres)
    return postgres


def fill(postgres: psycopg.Connection) -> None:
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
        " SELECT n %% %s, 'run-' || n, 1, 1 FROM generate_series(1, %s) n",
        (SHARDS, BACKLOG),
    )
    postgres.execute(
        "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)"
        " SELECT 'run-' || n, n %% %s, 'task', 'default', 0, 'waiting', now(), 'start'"
        " FROM generate_series(1, %s) n",
        (SHARDS, BACKLOG),
    )


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "Relation Name" in plan or "Index Name" in plan:
        yield plan
    for below in plan.get("Plans", []):
        yield from scans(below)


def read(connection: psycopg.Connection, statement: str, parameters: dict[str, Any]) -> int:
    """Rows that all scans of a statement visited."""
    statement = "EXPLAIN (ANALYZE, FORMAT JSON) " + statement
    row = connection.execute(statement.encode(), parameters, prepare=True).fetchone()
    assert row
    return sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in scans(row[0][0]["Plan"])
    )


def a_pick_reads_a_batch_however_long_the_backlog(
    beatless_app: App, backlog: psycopg.Connection
) -> None:
    queries = Queries(beatless_app.settings.schema)

    rows = read(
        backlog, queries.pick_events_sql, {"shards": list(range(SHARDS)), "floor": 0, "aside": []}
    )

    assert rows == SHARDS * queries.per_shard


def a_look_for_due_runs_reads_no_delayed_one(
    beatless_app: App, backlog: psycopg.Connection
) -> None:
    queries = Queries(beatless_app.settings.schema)
    backlog.execute("UPDATE dispatches SET due_at = now() + interval '1 hour' WHERE shard > 0")
    backlog.execute("DELETE FROM dispatches WHERE shard = 0 AND run_id <> 'run-32'")
    everything = {
        "shards": list(range(SHARDS)),
        "run_id": None,
        "now": None,
        "aside": [],
        "held": [],
        "places": 64,
    }

    for pick in (queries.pick_tasks_sql, queries.pick_free_tasks_sql):
        due = backlog.execute(pick.encode(), everything).fetchall()
        rows = read(backlog, pick, everything)

        assert [row[0] for row in due] == ["run-32"]
        assert rows < 50


def a_look_reads_as_many_waiting_runs_as_there_are_places(
    beatless_app: App, backlog: psycopg.Connection
) -> None:
    queries = Queries(beatless_app.settings.schema)
    everything = {
        "shards": list(range(SHARDS)),
        "run_id": None,
        "now": None,
        "aside": [],
        "held": [],
        "places": 64,
    }

    for sent, places in ((64, 0), (61, 3)):
        backlog.execute(
            "UPDATE dispatches SET due_at = now() + interval '1 hour',"
            " state = CASE WHEN right(run_id, -4)::int <= %s THEN 'sent' ELSE 'waiting' END"
            " WHERE right(run_id, -4)::int <= 64",
            (sent,),
        )
        for pick in (queries.pick_tasks_sql, queries.pick_free_tasks_sql):
            due = backlog.execute(pick.encode(), everything).fetchall()
            rows = read(backlog, pick, everything)

            assert len(due) == places
            assert rows <= sent + 2 * places + 5


def forgetting_reads_what_it_deletes(beatless_app: App, backlog: psycopg.Connection) -> None:
    queries = Queries(beatless_app.settings.schema)
    found = backlog.execute("SELECT shard, id FROM run_outbox ORDER BY id LIMIT 50").fetchall()
    lists = {
        name: f"{{{','.join(str(row[place]) for row in found)}}}"
        for place, name in enumerate(("shards", "ids"))
    }

    rows = read(backlog, queries.forget_events_sql, lists)

    assert rows == 2 * len(found)  # to find them, and to delete them
    left = backlog.execute("SELECT count(*) FROM run_outbox").fetchone()
    assert left == (BACKLOG - len(found),)


def marking_reads_what_it_marks(beatless_app: App, backlog: psycopg.Connection) -> None:
    queries = Queries(beatless_app.settings.schema)
    runs = [f"run-{number}" for number in range(1, 51)]

    rows = read(
        backlog,
        queries.mark_sent_sql,
        {"run_ids": runs, "attempts": [1] * len(runs), "redispatch": 15.0, "now": None},
    )

    assert rows == 2 * len(runs)  # to lock them, and to mark them
    sent = backlog.execute("SELECT run_id FROM dispatches WHERE state = 'sent'").fetchall()
    assert sorted(run_id for (run_id,) in sent) == sorted(runs)


def a_look_at_what_is_held_reads_nothing_else(
    beatless_app: App, backlog: psycopg.Connection
) -> None:
    queries = Queries(beatless_app.settings.schema)
    runs = [f"run-{number}" for number in range(1, 51)]
    parameters = {"run_ids": [*runs, "run-60"], "attempts": [*[1] * 50, 7], "now": None}
    with (
        beatless_app.direct_connection() as other,
        other.transaction(),
    ):
        dispatches = f"{beatless_app.settings.schema}.dispatches"
        other.execute(f"SELECT FROM {dispatches} WHERE run_id = 'run-7' FOR UPDATE")
        rows = read(backlog, queries.still_held_sql, parameters)
        held = backlog.execute(queries.still_held_sql.encode(), parameters).fetchall()

    assert held == [("run-7.1",)]
    assert rows <= 2 * len(runs) + 1


READINGS = (
    a_pick_reads_a_batch_however_long_the_backlog,
    a_look_for_due_runs_reads_no_delayed_one,
    a_look_reads_as_many_waiting_runs_as_there_are_places,
    forgetting_reads_what_it_deletes,
    marking_reads_what_it_marks,
    a_look_at_what_is_held_reads_nothing_else,
)


@pytest.mark.parametrize(
    "statistics",
    [
        *("none", "of this backlog"),
        pytest.param("of an empty table that was full", marks=pytest.mark.slow),
        pytest.param("of an empty table that was vacuumed", marks=pytest.mark.slow),
    ],
)
def test_statements_read_a_batch_however_long_the_backlog(
    beatless_app: App,
    postgres: psycopg.Connection,
    subtests: pytest.Subtests,
    statistics: str,
) -> None:
    """Each before the same backlog, which takes a second to make."""
    backlog = backlogged(postgres, statistics)
    for reading in READINGS:
        with subtests.test(reading.__name__), backlog.transaction(force_rollback=True):
            reading(beatless_app, backlog)
