"""What a run costs on the paths that each run takes, with limits that no machine changes.

Counted are statements, transactions and round trips on the wire, bytes to Postgres and of its log,
commands and bytes to Redis, and calls of Python functions: processor time is mostly these.
"""

import gc
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy

from beatless import App, Plan, StepContext, step
from beatless.orchestrator import group as groups
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.scope import no_scope
from beatless.outbox.adapters import Cursor
from beatless.testing import Kit
from tests.integration.test_groups import Together, be_patient
from tests.integration.test_relay_cost import calls_of

REPEATS, MOST_REPEATS = 5, 60
"""Measurements, of which the least counts: a page that is split or logged in whole is chance."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run, or its limits."""

    statements: float
    transactions: float
    answers: float
    """Messages that the server is ready: one for each round trip, and one at a pipeline's end."""
    sent_bytes: float
    log_bytes: float
    calls: float

    def of_each(self, runs: int) -> "Cost":
        return Cost(**{each.name: getattr(self, each.name) / runs for each in fields(self)})

    def exceeds(self, limit: "Cost") -> dict[str, tuple[float, float]]:
        """What is above its limit."""
        pairs = {
            each.name: (getattr(self, each.name), getattr(limit, each.name))
            for each in fields(self)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] > pair[1]}


OF_A_CALL = {  # prepared: their texts are not sent
    "start_run": Cost(
        statements=1, transactions=1, answers=1, sent_bytes=290, log_bytes=1_700, calls=240
    ),
    "get_run": Cost(
        statements=1, transactions=1, answers=1, sent_bytes=100, log_bytes=0, calls=185
    ),
}

OF_A_RUN = {
    ("job", 1): Cost(
        statements=3, transactions=2, answers=2, sent_bytes=850, log_bytes=2_200, calls=592
    ),
    ("job", 16): Cost(
        statements=4 / 16,
        transactions=2 / 16,
        answers=2 / 16,
        sent_bytes=280,
        log_bytes=2_200,
        calls=309,
    ),
    ("five_steps", 1): Cost(
        statements=7, transactions=6, answers=6, sent_bytes=3_200, log_bytes=5_400, calls=1_880
    ),
    ("five_steps", 16): Cost(
        statements=8 / 16,
        transactions=6 / 16,
        answers=6 / 16,
        sent_bytes=1_000,
        log_bytes=6_300,
        calls=1_130,
    ),
    ("traced", 1): Cost(
        statements=8, transactions=7, answers=7, sent_bytes=3_400, log_bytes=5_800, calls=2_010
    ),
    ("traced", 16): Cost(
        statements=24 / 16,
        transactions=22 / 16,
        answers=22 / 16,
        sent_bytes=1_200,
        log_bytes=7_000,
        calls=1_260,
    ),
}
"""For the worker, of each of so many runs that are executed together.

The bytes of the log are those beside an old snapshot (see `snapshot`), which are always the same:
6.0 kB for a run of the group with five steps, of which 0.9 are due to it.

There is no reserve but for other versions of Python, whose calls are a few more, and for numbers of
more digits.
"""

OF_A_RELAY = {"commands": 3, "sent_bytes": 3_200, "calls": 1_900}
"""To Redis, for a run of five steps: its start, its message, and the rest of its events."""


def numbered(number: int) -> Any:
    @step(name=f"s{number}")
    def body(ctx: StepContext) -> int:
        return number

    return body


@step
def s1(ctx: StepContext) -> int:
    ctx.trace("seen", at=1)
    return 1


@pytest.fixture(autouse=True)
def _nobody_looks(beatless_app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit looks at each statement for writes to other schemas: calls that no process makes."""
    monkeypatch.setattr(Cursor, "execute", psycopg.Cursor.execute)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("job", [numbered(1)]),
        Plan("five_steps", [numbered(n) for n in range(1, 6)]),
        Plan("traced", [s1, *(numbered(n) for n in range(2, 6))]),
    ]


@pytest.fixture
def snapshot(beatless_app: App) -> Iterator[None]:
    """An old snapshot, as a test beside this one may have: it keeps old versions of rows, so that
    updates go to other pages and write their indexes."""
    with beatless_app.engine.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ")
        connection.exec_driver_sql("SELECT 1 FROM pg_database LIMIT 1")
        yield
    beatless_app.engine.dispose()


@pytest.fixture
def together(beatless: Kit, monkeypatch: pytest.MonkeyPatch, snapshot: None) -> Iterator[Together]:
    be_patient(monkeypatch)
    found = Together(beatless)
    found.executor.scope = no_scope  # a test before this one may have switched tracing on
    yield found
    found.executor.disconnect()


def logged(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Bytes that this session has written to the log of Postgres so far, and whole pages.

    Committed: after a rollback psycopg prepares its statements anew.
    """
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.commit()
    ((size, pages),) = connection.execute(
        "SELECT wal_bytes, wal_fpi FROM pg_stat_get_backend_wal(pg_backend_pid())"
    ).fetchall()
    connection.commit()
    return int(size), int(pages)


def cost_of(act: Callable[[], object], connection: psycopg.Connection[Any], path: Path) -> Cost:
    """What it costs this session and this thread."""
    size, pages = logged(connection)
    with path.open("w+") as file:
        connection.pgconn.trace(file.fileno())
        calls = calls_of(act)
        connection.pgconn.untrace()
        file.seek(0)
        said = file.read()
    size_after, pages_after = logged(connection)
    # The server is ready and in no transaction; an end of a pipeline without commands is none.
    ends = re.split(r"ReadyForQuery\t I", said)
    transactions = sum("CommandComplete" in told for told in ends)
    return Cost(
        statements=len(re.findall(r"F\t\d+\t(?:Execute|Query)", said)),
        transactions=transactions,
        answers=said.count("ReadyForQuery"),
        sent_bytes=sum(int(size) for size in re.findall(r"F\t(\d+)\t", said)),
        # A page is written whole after a checkpoint, which any test beside this one may cause.
        log_bytes=size_after - size if pages_after == pages else math.inf,
        calls=calls,
    )


def least(sample: Callable[[], Cost]) -> Cost:
    """Of some samples, of which one at least wrote no page whole."""
    costs = [sample() for _ in range(REPEATS)]
    while all(cost.log_bytes == math.inf for cost in costs) and len(costs) < MOST_REPEATS:
        costs.append(sample())
    return Cost(
        **{each.name: min(getattr(cost, each.name) for cost in costs) for each in fields(Cost)}
    )


def executed(together: Together, plan: str, runs: int, path: Path) -> Cost:
    """The cost of each of so many runs, of which the first has a message."""

    def sample() -> Cost:
        ids = [together.kit.start_run(plan, n).run_id for n in range(runs)]
        cost = cost_of(
            lambda: together.worker.execute(together.kit.app.plans[plan], ids[0], 1),
            together.executor.connection(),
            path,
        )
        assert all(state.final for state in together.states(ids))
        return cost.of_each(runs)

    for _ in range(2):  # what is prepared and cached at first is not counted
        sample()
    return least(sample)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "runs"), OF_A_RUN)
def test_a_run_costs_its_worker_no_more_than(
    together: Together, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: str, runs: int
) -> None:
    """Its claim is two statements and one answer, and a third statement for others."""
    if runs == 1:
        monkeypatch.setattr(groups, "LULL_S", 0.0)
    cost = executed(together, plan, runs, tmp_path / "trace")
    assert not cost.exceeds(OF_A_RUN[plan, runs]), cost


@pytest.mark.parametrize("runs", [1, 3])
def test_runs_that_have_ended_leave_nothing_to_the_garbage_collector(
    together: Together, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """It took a third of the processor time of a worker with runs of one step (ADR 0108)."""
    if runs == 1:
        monkeypatch.setattr(groups, "LULL_S", 0.0)
    ids = [together.kit.start_run("traced", n).run_id for n in range(runs)]
    collects = gc.isenabled()
    gc.disable()
    try:
        together.worker.execute(together.kit.app.plans["traced"], ids[0], 1)
        together.signals.clear()  # they have the leases
        leases = [each for each in gc.get_objects() if isinstance(each, Lease)]
        left = [each for each in leases if getattr(each.run, "run_id", None) in ids]
    finally:
        if collects:
            gc.enable()
    assert all(state.final for state in together.states(ids))
    assert left == []


@pytest.mark.parametrize("call", OF_A_CALL)
def test_a_call_of_a_client_costs_no_more_than(
    beatless_app: App, tmp_path: Path, call: str
) -> None:
    driver: list[psycopg.Connection[Any]] = []
    beatless_app.engine.dispose()

    @sqlalchemy.event.listens_for(beatless_app.engine, "connect")
    def connected(connection: psycopg.Connection[Any], _record: object) -> None:
        driver.append(connection)

    run = beatless_app.client.start_run("five_steps")
    sqlalchemy.event.remove(beatless_app.engine, "connect", connected)
    act: Callable[[], object] = {
        "start_run": lambda: beatless_app.client.start_run("five_steps"),
        "get_run": lambda: beatless_app.client.get_run(run.run_id),
    }[call]
    for _ in range(6):  # until it is prepared
        act()
    cost = least(lambda: cost_of(act, driver[0], tmp_path / "trace"))
    beatless_app.engine.dispose()
    assert not cost.exceeds(OF_A_CALL[call]), cost


def test_the_relay_of_a_run_costs_no_more_than(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twelve events in two drains, and one message to the broker."""
    sent: list[bytes] = []
    send = redis.connection.AbstractConnection.send_packed_command

    def counted(self: Any, command: Any, *arguments: Any, **options: Any) -> None:
        sent.append(command if isinstance(command, bytes) else b"".join(command))
        send(self, command, *arguments, **options)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
    found: list[dict[str, int]] = []
    for _ in range(REPEATS + 2):
        run_id = beatless.start_run("five_steps").run_id
        sent.clear()
        calls = calls_of(beatless.drain_outbox_once)
        assert beatless.executor().execute(beatless_app.plans["five_steps"], run_id, 1)
        calls += calls_of(beatless.drain_outbox_once)
        text = b"".join(sent)
        commands = re.findall(rb"(?:^|\r\n)\*\d+\r\n\$\d+\r\n([A-Za-z]+)", text)
        found.append({"commands": len(commands), "sent_bytes": len(text), "calls": calls})
    cost = {name: min(each[name] for each in found) for name in OF_A_RELAY}
    assert not {name for name in cost if cost[name] > OF_A_RELAY[name]}, cost
