"""What a run costs that has had many waits: statements over them read each of its events once."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from beatless import Plan, wait
from beatless.orchestrator import inbox
from beatless.orchestrator.inbox import NEVER
from beatless.outbox.statements import statements
from beatless.testing import Kit

FEW, MANY = 100, 400

EXPLAIN = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) "


OF_A_TURN = {
    "WaitStarted": '{"kind": "signal", "names": ["go"]}',
    "ChildrenStarted": "{}",
    "WaitFinished": "{}",
    "ChildrenFinished": "{}",
}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("waits", [wait("go")])]


@pytest.fixture
def connection(beatless: Kit) -> Iterator[psycopg.Connection[Any]]:
    with beatless.app.executors.connect() as connection:
        yield connection


@pytest.fixture
def sql(beatless: Kit) -> Any:
    return statements(inbox.__file__, beatless.app.settings.schema, never=NEVER)


def stored(
    beatless: Kit, connection: psycopg.Connection[Any], turns: int, *, again: bool = False
) -> str:
    """A run that has waited so often, for a signal and for children, and that waits for both.

    With `again` its function has begun again before it waits now.
    """
    run_id = beatless.start_run("waits").run_id
    schema = beatless.app.settings.schema
    connection.execute(
        f"INSERT INTO {schema}.run_events (run_id, seq, type, source, step, data)"
        " SELECT %(run_id)s, 1 + 4 * turn + n, type, 'worker', 'go#' || turn, data::jsonb"
        "   FROM generate_series(0, %(turns)s) turn,"
        "        unnest(%(types)s::text[], %(datas)s::text[]) WITH ORDINALITY e(type, data, n)"
        "  WHERE turn < %(turns)s OR n < 3",
        {
            "run_id": run_id,
            "turns": turns,
            "types": list(OF_A_TURN),
            "datas": list(OF_A_TURN.values()),
        },
    )
    if again:
        connection.execute(
            f"UPDATE {schema}.run_events SET type = 'RunRestarted', step = NULL"
            " WHERE run_id = %s AND seq = 1 + 4 * %s",
            (run_id, turns),
        )
    connection.execute(f"ANALYZE {schema}.run_events")
    return run_id


def visited(connection: psycopg.Connection[Any], statement: str, **parameters: Any) -> int:
    """Rows that the nodes of the plan have looked at; nothing is changed."""
    with connection.transaction(force_rollback=True):
        ((found,),) = connection.execute(EXPLAIN + statement, parameters)
    return visited_by(found[0]["Plan"])


def visited_by(node: dict[str, Any]) -> int:
    rows = sum(node[key] for key in node if key == "Actual Rows" or key.startswith("Rows Removed"))
    return round(rows * node["Actual Loops"]) + sum(map(visited_by, node.get("Plans", ())))


@pytest.mark.parametrize("name", ["open_waits", "open_approvals"])
def test_each_event_of_a_run_is_read_once_however_many_waits_it_has_had(
    beatless: Kit, connection: psycopg.Connection[Any], sql: dict[str, str], name: str
) -> None:
    costs = []
    for turns in (FEW, MANY):
        run_id = stored(beatless, connection, turns)
        costs.append(visited(connection, sql[name], run_id=run_id, run_ids=[run_id]))

    few, many = costs
    assert many < 8 * few, "five times as many events are there, four times as many are the run's"


def test_what_a_function_has_left_behind_is_not_read_for_its_waits(
    beatless: Kit, connection: psycopg.Connection[Any], sql: dict[str, str]
) -> None:
    run_ids = [stored(beatless, connection, turns, again=True) for turns in (FEW, MANY)]

    for way in ("seqscan", "bitmapscan"):  # as over a long table, of which a run is little
        connection.execute(f"SET enable_{way} = off")

    few, many = (visited(connection, sql["open_waits"], run_id=each) for each in run_ids)
    assert few == many
    for run_id, turns in zip(run_ids, (FEW, MANY), strict=True):
        found = [(each.kind, each.occurrence) for each in beatless.client.waits(run_id)]
        assert found == [("signal", f"go#{turns}"), ("children", f"go#{turns}")]
