"""What a claim costs a worker: the statements and the round trips, counted on the wire."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psycopg
import pytest
import sqlalchemy

from beatless import App
from beatless.testing import Kit

Costs = Callable[[], Counter[str]]


@pytest.fixture
def costs(beatless: Kit, beatless_app: App, tmp_path: Path) -> Iterator[Costs]:
    """What the kit's worker has sent since the last call, on all of its connections."""
    executor = beatless.executor()
    traced: list[tuple[psycopg.pq.abc.PGconn, IO[str]]] = []

    def trace(driver: psycopg.Connection) -> None:
        file = (tmp_path / f"trace-{len(traced)}").open("w+")
        driver.pgconn.trace(file.fileno())
        traced.append((driver.pgconn, file))

    trace(executor.connection())

    @sqlalchemy.event.listens_for(executor.transactions.engine, "connect")
    def connected(driver: psycopg.Connection, _record: object) -> None:
        trace(driver)

    def spent() -> Counter[str]:
        found = Counter[str]()
        for _, file in traced:
            file.seek(0)
            lines = file.read()
            file.seek(0)
            file.truncate()
            # The server says for each round trip that it is ready for the next one, and once more
            # at the ends of a pipeline.
            found["answers"] += lines.count("ReadyForQuery")
            found["statements"] += len(re.findall(r"F\t\d+\t(?:Execute|Query)", lines))
        return found

    yield spent
    for connection, file in traced:
        if connection.status == psycopg.pq.ConnStatus.OK:
            connection.untrace()
        file.close()
    sqlalchemy.event.remove(executor.transactions.engine, "connect", connected)


def cost(kit: Kit, costs: Costs, plan: str, input: object = None) -> Counter[str]:
    """Of one claim of a new run of this plan, on connections that have executed it before."""
    for _ in range(2):
        run = kit.start_run(plan, input)
        costs()
        kit.executor().execute(kit.app.plans[plan], run.run_id, 1)
        found = costs()
    return found


@pytest.mark.parametrize(
    ("plan", "input", "statements", "answers"),
    [
        ("agents.run", {"device": "d1"}, 8, 8),
        ("two_steps", None, 4, 3),
        ("transactional", {"table": "mine"}, 7, 6),
        ("retries", {"failures": 1}, 3, 2),
        ("fatally", None, 3, 2),
        ("sleepy", {"wake": "/nowhere"}, 3, 2),
    ],
)
def test_a_claim_costs_no_more_than(
    beatless: Kit,
    costs: Costs,
    postgres: psycopg.Connection,
    plan: str,
    input: dict[str, str] | None,
    statements: int,
    answers: int,
) -> None:
    """The claim itself is two statements, and one answer to both."""
    postgres.execute("CREATE TABLE mine (key text)")
    if plan == "transactional":
        input = {"table": f"{beatless.app.settings.schema}.mine"}
    found = cost(beatless, costs, plan, input)
    postgres.execute("DROP TABLE mine")
    assert found["statements"] <= statements, found
    assert found["answers"] <= answers, found
