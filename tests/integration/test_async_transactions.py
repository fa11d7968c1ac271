"""Transactional steps that are `async def`: their rows commit with their end, or not at all."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from beatless import App, AsyncStepContext, Plan, RunContext, RunState, plan, retry, step
from beatless.testing import Kit
from beatless.testing.names import own_tables

Body = Callable[[AsyncStepContext], Awaitable[Any]]
Make = Callable[..., Kit]


@pytest.fixture
def make(beatless_app: App, postgres: psycopg.Connection, tmp_path: Path) -> Iterator[Make]:
    """A kit whose plan `one` is a transactional step with this body, and a table `written`."""
    postgres.execute(f"SET search_path TO {own_tables(beatless_app.settings.schema)}")
    postgres.execute("CREATE TABLE written (word text)")
    with ExitStack() as kits:

        def made(body: Body, **options: Any) -> Kit:
            one = step(name="body", transactional=True, **options)(body)

            @plan("called")
            async def called(run: RunContext) -> Any:
                return await run.step(one)

            kit = Kit(App(beatless_app.settings, [Plan("one", [one]), called]), directory=tmp_path)
            kits.callback(kit.close)
            return kit

        yield made


LEFT: list[asyncio.Future[Any]] = []
"""Kept from the garbage collector."""


def written(postgres: psycopg.Connection) -> list[str]:
    return [word for (word,) in postgres.execute("SELECT word FROM written").fetchall()]


async def write(ctx: AsyncStepContext, word: str = "one") -> None:
    await ctx.connection.exec_driver_sql("INSERT INTO written VALUES (%s)", (word,))


@pytest.mark.parametrize("name", ["one", "called"])
def test_what_a_step_writes_commits_with_its_end(
    make: Make, postgres: psycopg.Connection, name: str
) -> None:
    seen = []

    async def body(ctx: AsyncStepContext) -> str:
        await write(ctx)
        async with AsyncSession(bind=ctx.connection) as session:
            await session.execute(sqlalchemy.text("INSERT INTO written VALUES ('two')"))
            await session.commit()
        seen.append(await asyncio.to_thread(written, postgres))
        await ctx.trace("wrote")
        return "done"

    kit = make(body)
    run = kit.start_run(name)
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).result == "done"
    assert seen == [[]]
    assert written(postgres) == ["one", "two"]
    kit.verify()


def test_a_run_that_a_step_starts_is_there_if_the_step_ends(make: Make) -> None:
    async def body(ctx: AsyncStepContext) -> str:
        if ctx.input == "started":
            return "well"
        started = await kit.client.astart_run("one", "started", connection=ctx.connection)
        if ctx.attempt == 1:
            raise ValueError("not yet")
        return started.run_id

    kit = make(body, retry=retry(max_attempts=2, initial=5.0))
    run = kit.start_run("one")
    kit.work_until_idle()
    assert len(kit.client.list_runs()) == 1
    kit.advance(6)
    kit.work_until_idle()

    assert kit.client.get_run(kit.client.get_run(run.run_id).result).result == "well"
    assert len(kit.client.list_runs()) == 2
    kit.verify()


def test_an_attempt_that_fails_leaves_nothing(make: Make, postgres: psycopg.Connection) -> None:
    async def body(ctx: AsyncStepContext) -> None:
        await write(ctx, f"attempt {ctx.attempt}")
        if ctx.attempt == 1:
            raise ValueError("no")

    kit = make(body, retry=retry(max_attempts=2, initial=5.0))
    run = kit.start_run("one")
    kit.work_until_idle()
    assert written(postgres) == []
    kit.advance(6)
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).state is RunState.COMPLETED
    assert written(postgres) == ["attempt 2"]
    kit.verify()


@pytest.mark.parametrize(
    ("point", "calls"), [("step.before", 1), ("step.effect_done", 2), ("step.committed", 1)]
)
def test_a_crash_before_the_commit_leaves_nothing_and_one_after_it_all(
    make: Make, postgres: psycopg.Connection, point: str, calls: int
) -> None:
    called = []

    async def body(ctx: AsyncStepContext) -> None:
        called.append(ctx.attempt)
        await write(ctx)

    kit = make(body)
    run = kit.start_run("one")
    with kit.crash(at=point):
        kit.work_until_idle()
    assert written(postgres) == (["one"] if point == "step.committed" else [])
    kit.advance(60)
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).state is RunState.COMPLETED
    assert written(postgres) == ["one"]
    assert len(called) == calls
    kit.verify()


def test_a_step_whose_run_was_taken_writes_nothing(
    make: Make, postgres: psycopg.Connection
) -> None:
    """The first worker's body lets time pass, and a second worker finish the run."""
    words = iter(["lost", "kept"])

    async def body(ctx: AsyncStepContext) -> None:
        word = next(words)
        await write(ctx, word)
        if word == "lost":
            await asyncio.to_thread(take)

    def take() -> None:
        second = kit.app.executors.new()
        kit.advance(60)
        assert second.execute(kit.app.plans["one"], run.run_id, 9) is True
        second.disconnect()

    kit = make(body)
    run = kit.start_run("one")
    kit.work_once()

    assert kit.client.get_run(run.run_id).state is RunState.COMPLETED
    assert written(postgres) == ["kept"]
    kit.verify()


async def held(ctx: AsyncStepContext) -> None:
    await ctx.connection.exec_driver_sql("LOCK TABLE written IN EXCLUSIVE MODE")


async def held_in_a_session(ctx: AsyncStepContext) -> None:
    async with AsyncSession(bind=ctx.connection) as session:
        await session.execute(sqlalchemy.text("LOCK TABLE written IN EXCLUSIVE MODE"))


async def held_elsewhere(ctx: AsyncStepContext) -> None:
    """On a second connection, while that of the step has a transaction."""
    engine = create_async_engine(ctx.connection.engine.url)
    try:
        async with engine.begin() as other:
            await other.exec_driver_sql("SET LOCAL lock_timeout = 1")
            found = await ctx.connection.exec_driver_sql("SELECT current_schema()")
            schema = found.scalar()
            await other.exec_driver_sql(f"LOCK TABLE {schema}.written IN EXCLUSIVE MODE")
    finally:
        await engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("body", [held, held_in_a_session, held_elsewhere])
def test_a_lock_that_is_not_had_in_time_is_a_failure_that_the_retry_policy_decides(
    make: Make, postgres: psycopg.Connection, body: Body
) -> None:
    async def limited(ctx: AsyncStepContext) -> str:
        await ctx.connection.exec_driver_sql("SET LOCAL lock_timeout = 1")
        await body(ctx)
        return "had"

    kit = make(limited, retry=retry(max_attempts=2, initial=5.0))
    run = kit.start_run("one")
    with postgres.transaction():
        postgres.execute("LOCK TABLE written IN EXCLUSIVE MODE")
        kit.work_until_idle()
        (failed,) = [e for e in kit.client.events(run.run_id) if e.type == "StepFailed"]
        assert failed.data["error"]["type"] == "OperationalError"
        assert "lock timeout" in failed.data["error"]["message"]
    kit.advance(6)
    kit.work_until_idle()
    assert kit.client.get_run(run.run_id).result == "had"
    kit.verify()


@pytest.mark.parametrize("how", ["late", "cancelled"])
def test_a_time_out_or_cancel_ends_the_statement_and_takes_back_what_was_written(
    make: Make, postgres: psycopg.Connection, how: str
) -> None:
    """The statement waits for a lock that is never had."""
    inside = threading.Event()

    async def body(ctx: AsyncStepContext) -> None:
        await write(ctx)
        inside.set()
        await ctx.connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4711)")

    options: dict[str, Any] = {"timeout": 0.2} if how == "late" else {"terminate_on_cancel": True}
    kit = make(body, **options)
    run = kit.start_run("one")
    with postgres.transaction():
        postgres.execute("SELECT pg_advisory_xact_lock(4711)")
        worker = threading.Thread(target=kit.work_until_idle)
        worker.start()
        if how == "cancelled":
            assert inside.wait(60)
            kit.client.cancel_run(run.run_id)
        worker.join()
        ended = kit.client.get_run(run.run_id)

    if how == "late":
        assert (ended.state, ended.error["type"]) == (RunState.FAILED, "StepTimeout")
    else:
        assert ended.state is RunState.CANCELLED
    assert written(postgres) == []
    kit.verify()


@pytest.mark.parametrize("message", ["not this", "in flight: await the tasks"])
def test_a_statement_that_a_step_leaves_behind_does_not_hold_up_its_end(
    make: Make, postgres: psycopg.Connection, message: str
) -> None:
    """As a gather of which one fails. Here it waits for a lock that is never had."""

    async def leaves(ctx: AsyncStepContext) -> None:
        lock = ctx.connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4712)")
        LEFT.append(asyncio.ensure_future(lock))
        LEFT[-1].add_done_callback(lambda task: task.exception())
        ended = asyncio.ensure_future(ends())  # the statement has been sent in the turn before
        await asyncio.wait([LEFT[-1], ended], return_when=asyncio.FIRST_COMPLETED)
        ended.result()

    async def ends() -> None:
        if message == "not this":
            raise ValueError(message)

    kit = make(leaves)
    run = kit.start_run("one")
    with postgres.transaction():
        postgres.execute("SELECT pg_advisory_xact_lock(4712)")
        kit.work_until_idle()

    assert message in kit.client.get_run(run.run_id).error["message"]
    kit.verify()


def test_a_cancel_that_comes_before_its_statement_is_sent_again(
    make: Make, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend has not read the statement yet: it forgets the cancel, which no error tells."""
    cancel = psycopg.AsyncConnection.cancel_safe

    async def forgotten(_connection: psycopg.AsyncConnection, **_options: Any) -> None:
        monkeypatch.setattr(psycopg.AsyncConnection, "cancel_safe", cancel)

    async def leaves(ctx: AsyncStepContext) -> None:
        pid = (await ctx.connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar()
        lock = ctx.connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4713)")
        LEFT.append(asyncio.ensure_future(lock))
        LEFT[-1].add_done_callback(lambda task: task.exception())
        await asyncio.to_thread(until_it_waits, postgres, pid)
        raise ValueError("not this")

    monkeypatch.setattr(psycopg.AsyncConnection, "cancel_safe", forgotten)
    kit = make(leaves)
    run = kit.start_run("one")
    with postgres.transaction():
        postgres.execute("SELECT pg_advisory_xact_lock(4713)")
        kit.work_until_idle()

    assert "not this" in kit.client.get_run(run.run_id).error["message"]
    assert psycopg.AsyncConnection.cancel_safe is cancel
    kit.verify()


def until_it_waits(postgres: psycopg.Connection, pid: int) -> None:
    """Return when the statement of this backend waits for a lock."""
    while not postgres.execute("SELECT pg_blocking_pids(%s) <> '{}'", (pid,)).fetchone()[0]:
        pass


async def goes_on(ctx: AsyncStepContext) -> None:
    try:
        await asyncio.wait_for(ctx.connection.exec_driver_sql("SELECT pg_sleep(3600)"), 0.01)
    except TimeoutError:
        return


async def lets_it_out(ctx: AsyncStepContext) -> None:
    await asyncio.wait_for(ctx.connection.exec_driver_sql("SELECT pg_sleep(3600)"), 0.01)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (goes_on, "RuntimeError", "cancelled a statement of ctx.connection and went on"),
        (lets_it_out, "TimeoutError", ""),
    ],
)
def test_a_step_that_cancels_its_own_statement_has_failed(
    make: Make, body: Body, kind: str, message: str
) -> None:
    """SQLAlchemy closes the connection of a statement that is cancelled: it is not lost."""
    kit = make(body)
    run = kit.start_run("one")
    kit.work_until_idle()

    failed = kit.client.get_run(run.run_id)
    assert (failed.state, failed.error["type"]) == (RunState.FAILED, kind)
    assert message in failed.error["message"]
    kit.verify()


async def breaks(ctx: AsyncStepContext) -> None:
    await ctx.connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")


async def breaks_and_hides_it(ctx: AsyncStepContext) -> None:
    try:
        await breaks(ctx)
    except exc.DBAPIError:
        return


@pytest.mark.parametrize("body", [breaks, breaks_and_hides_it])
def test_a_step_that_loses_its_connection_is_done_again(
    make: Make, postgres: psycopg.Connection, body: Body
) -> None:
    calls = []

    async def broken_once(ctx: AsyncStepContext) -> None:
        calls.append(ctx.attempt)
        await write(ctx)
        if len(calls) == 1:
            await body(ctx)

    kit = make(broken_once)
    run = kit.start_run("one")
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).state is RunState.COMPLETED
    assert calls == [1, 1]
    assert written(postgres) == ["one"]
    kit.verify()


def test_a_step_that_ends_its_transaction_fails_and_says_so(make: Make) -> None:
    async def ends(ctx: AsyncStepContext) -> None:
        await ctx.connection.commit()

    kit = make(ends)
    run = kit.start_run("one")
    kit.work_until_idle()
    assert (
        "ended the transaction of ctx.connection" in kit.client.get_run(run.run_id).error["message"]
    )


def test_a_step_that_gets_no_connection_waits_and_counts_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(ctx: AsyncStepContext) -> int:
        return 1

    kit = make(body)
    run = kit.start_run("one")
    nowhere = create_async_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    with monkeypatch.context() as patch:
        patch.setattr(kit.executor().transactions, "_of_loop", lambda: nowhere)
        kit.work_until_idle()
    assert kit.client.get_run(run.run_id).state is RunState.QUEUED
    kit.advance(61)
    kit.work_until_idle()

    assert kit.client.get_run(run.run_id).result == 1
    assert {event.attempt for event in kit.client.events(run.run_id) if event.step} == {1}
    kit.verify()


def test_other_runs_go_on_while_the_transaction_of_one_is_open(
    make: Make, postgres: psycopg.Connection
) -> None:
    """Two runs in one process: the first step ends when the second has written."""
    second_wrote: Future[None] = Future()

    async def body(ctx: AsyncStepContext) -> str:
        await write(ctx, ctx.input)
        if ctx.input == "second":
            second_wrote.set_result(None)
        else:
            await asyncio.wrap_future(second_wrote)
        return ctx.worker

    kit = make(body)
    runs = [kit.start_run("one", word) for word in ("first", "second")]
    kit.drain_outbox_once()
    executor = kit.app.executors.begin_concurrent()
    executor.start()
    ended: list[Future[bool]] = [Future() for _ in runs]
    for run, end in zip(runs, ended, strict=True):
        executor.spawn(
            lambda run=run, end=end: end.set_result(
                executor.execute(kit.app.plans["one"], run.run_id, 1)
            )
        )
    assert [end.result(60) for end in ended] == [True, True]
    executor.stop()

    assert sorted(written(postgres)) == ["first", "second"]
    assert {kit.client.get_run(run.run_id).state for run in runs} == {RunState.COMPLETED}
    kit.verify()
