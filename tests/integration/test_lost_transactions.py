"""What Postgres says of a statement is the step's failure, a broken connection is nobody's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import exc

from beatless import App, Plan, RunState, StepContext, retry, step
from beatless.orchestrator.boundaries import MAX_LOSSES
from beatless.testing import Kit

Make = Callable[..., Kit]


@pytest.fixture
def make(beatless_app: App, tmp_path: Path) -> Iterator[Make]:
    """A kit whose plan `one` is a transactional step with this body."""
    with ExitStack() as kits:

        def made(body: Callable[[StepContext], Any], **options: Any) -> Kit:
            plan = Plan("one", [step(name="body", transactional=True, **options)(body)])
            kit = Kit(App(beatless_app.settings, [plan]), directory=tmp_path)
            kits.callback(kit.close)
            return kit

        yield made


def journal(kit: Kit, run_id: str) -> list[tuple[str, int | None]]:
    return [(e.type, e.attempt) for e in kit.client.events(run_id) if e.step]


def held(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("SET LOCAL lock_timeout = 1")
    ctx.connection.exec_driver_sql("LOCK TABLE held")


def cancelled(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("SET LOCAL statement_timeout = 1")
    ctx.connection.exec_driver_sql("SELECT pg_sleep(60)")


def serialized(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")


def deadlocked(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")


def refused_elsewhere(_ctx: StepContext) -> None:
    sqlalchemy.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none").connect()


def broken_elsewhere(ctx: StepContext) -> None:
    other = sqlalchemy.create_engine(ctx.connection.engine.url)
    try:
        with other.connect() as connection:
            end(ctx.connection, connection)
            connection.exec_driver_sql("SELECT 1")
    finally:
        other.dispose()


def end(killer: sqlalchemy.Connection, victim: sqlalchemy.Connection) -> None:
    pid = victim.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    killer.exec_driver_sql("SELECT pg_terminate_backend(%s, 5000)", (pid,))


@pytest.mark.parametrize(
    "body", [held, cancelled, serialized, deadlocked, refused_elsewhere, broken_elsewhere]
)
def test_what_postgres_says_of_a_statement_is_a_failure_that_the_retry_policy_decides(
    make: Make, postgres: psycopg.Connection, body: Callable[[StepContext], None]
) -> None:
    postgres.execute("CREATE TABLE held ()")
    schema = postgres.execute("SELECT current_schema()").fetchone()[0]

    def in_schema(ctx: StepContext) -> None:
        ctx.connection.exec_driver_sql(f"SET LOCAL search_path TO {schema}")
        body(ctx)

    kit = make(in_schema, retry=retry(max_attempts=2, initial=5.0))
    run = kit.start_run("one")
    with postgres.transaction():
        postgres.execute("LOCK TABLE held")
        kit.work_until_idle()
        assert journal(kit, run.run_id) == [("StepStarted", 1), ("StepFailed", 1)]
        assert kit.client.get_run(run.run_id).state is RunState.QUEUED  # for five seconds
        kit.advance(6)
        kit.work_until_idle()

    failed = kit.client.get_run(run.run_id)
    assert (failed.state, failed.error["type"]) == (RunState.FAILED, "OperationalError")
    assert [attempt for _, attempt in journal(kit, run.run_id)] == [1, 1, 2, 2]
    postgres.execute("DROP TABLE held")
    kit.verify()


@contextmanager
def refused(_url: sqlalchemy.URL) -> Iterator[sqlalchemy.Engine]:
    yield sqlalchemy.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")


@contextmanager
def exhausted(url: sqlalchemy.URL) -> Iterator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0)
    with engine.connect():
        yield engine
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("poor", [refused, exhausted])
def test_a_step_that_gets_no_connection_waits_and_counts_nothing(
    make: Make, poor: Callable[[sqlalchemy.URL], AbstractContextManager[sqlalchemy.Engine]]
) -> None:
    kit = make(lambda ctx: 1)
    run = kit.start_run("one")
    executor = kit.executor()
    engine = executor.transactions.engine
    with poor(engine.url) as executor.transactions.engine:
        kit.work_until_idle()
        assert journal(kit, run.run_id) == [("StepStarted", 1), ("DebugTrace", 1)] * 2
        for _ in range(MAX_LOSSES):
            kit.advance(61)
            kit.work_until_idle()
        assert kit.client.get_run(run.run_id).state is RunState.QUEUED
        assert "no connection was to be had" in str(kit.client.explain(run.run_id))

    executor.transactions.engine = engine
    kit.advance(61)
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).result == 1
    assert {attempt for _, attempt in journal(kit, run.run_id)} == {1}
    kit.verify()


def breaks(ctx: StepContext) -> None:
    """What a statement does that crashes its server."""
    ctx.connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")


def breaks_and_hides_it(ctx: StepContext) -> None:
    with suppress(exc.DBAPIError):
        breaks(ctx)


def breaks_and_renames_it(ctx: StepContext) -> None:
    try:
        breaks(ctx)
    except exc.DBAPIError as error:
        raise RuntimeError("no database") from error


@pytest.mark.slow
@pytest.mark.parametrize("body", [breaks, breaks_and_hides_it, breaks_and_renames_it])
def test_a_step_that_breaks_its_connection_each_time_fails_at_last(
    make: Make, body: Callable[[StepContext], None]
) -> None:
    calls = []

    def counted(ctx: StepContext) -> None:
        calls.append(ctx.attempt)
        body(ctx)

    kit = make(counted)
    run = kit.start_run("one")
    kit.work_until_idle()
    assert calls == [1, 1]  # at once the first time, then it waits
    assert kit.client.get_run(run.run_id).state is RunState.QUEUED
    while kit.client.get_run(run.run_id).state is RunState.QUEUED and len(calls) <= MAX_LOSSES:
        kit.advance(61)
        kit.work_until_idle()

    assert calls == [1] * MAX_LOSSES
    failed = kit.client.get_run(run.run_id)
    assert (failed.state, failed.error["type"]) == (RunState.FAILED, "TransactionLost")
    assert f"{MAX_LOSSES} times in a row" in failed.error["message"]
    kit.verify()


def test_a_transaction_that_idles_too_long_for_postgres_has_failed(
    make: Make, postgres: psycopg.Connection
) -> None:
    def idles(ctx: StepContext) -> None:
        pid = ctx.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        # A second, not a millisecond: what comes in one packet with the answer to this statement,
        # libpq takes for a notice, and the reason for the end would be unknown.
        ctx.connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 1000")
        alive = "SELECT FROM pg_stat_activity WHERE pid = %s"
        while postgres.execute(alive, (pid,)).fetchone() is not None:
            pass
        ctx.connection.exec_driver_sql("SELECT 1")

    kit = make(idles)
    run = kit.start_run("one")
    kit.work_until_idle()

    failed = kit.client.get_run(run.run_id)
    assert failed.state is RunState.FAILED
    assert "idle-in-transaction timeout" in failed.error["message"]


def test_a_cancel_while_there_is_no_connection_is_heard(make: Make) -> None:
    kit = make(lambda ctx: 1)
    run = kit.start_run("one")
    kit.executor().transactions.engine = sqlalchemy.create_engine(
        "postgresql+psycopg://nobody@127.0.0.1:1/none"
    )
    kit.work_until_idle()
    kit.client.cancel_run(run.run_id)
    assert kit.client.get_run(run.run_id).state is RunState.CANCELLED
    kit.verify()


def test_as_many_transactional_steps_run_at_once_as_a_worker_has_places(make: Make) -> None:
    """They do not share a pool whose connections are fewer, and time out."""
    kit = make(lambda ctx: 1)
    with ExitStack() as steps:
        for _ in range(17):
            steps.enter_context(kit.executor().transactions.engine.connect())
