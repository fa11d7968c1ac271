"""What the relay's statements read, by the server's own account: the batch, never the backlog."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from jobs import App
from outbox.doorbell import prepare_to_drain
from outbox.message import SHARDS
from outbox.queries import Queries


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


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_pick_reads_a_batch_however_long_the_backlog(
    beatless_app: App, postgres: psycopg.Connection, analyzed: bool
) -> None:
    queries = Queries(beatless_app.settings.schema)
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
        " SELECT n %% %s, 'run-' || n, 1, 1 FROM generate_series(1, 16000) n",
        (SHARDS,),
    )
    if analyzed:
        postgres.execute("ANALYZE run_outbox")
    prepare_to_drain(postgres)

    rows = read(postgres, queries.pick_events_sql, {"shards": list(range(SHARDS)), "floor": 0})

    assert rows == SHARDS * queries.per_shard


def test_forgetting_reads_what_it_deletes(beatless_app: App, postgres: psycopg.Connection) -> None:
    queries = Queries(beatless_app.settings.schema)
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
        " SELECT n %% %s, 'run-' || n, 1, 1 FROM generate_series(1, 16000) n",
        (SHARDS,),
    )
    prepare_to_drain(postgres)
    found = postgres.execute("SELECT shard, id FROM run_outbox ORDER BY id LIMIT 50").fetchall()
    lists = {
        name: f"{{{','.join(str(row[place]) for row in found)}}}"
        for place, name in enumerate(("shards", "ids"))
    }

    rows = read(postgres, queries.forget_events_sql, lists)

    assert rows == len(found)
