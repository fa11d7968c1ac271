"""The executor of `--pool async`, in this process: no run waits for another's row."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, NoReturn

import psycopg
import pytest

from beatless import (
    AsyncStepContext,
    Limit,
    Plan,
    RunContext,
    RunState,
    StepContext,
    plan,
    retry,
    step,
)
from beatless.orchestrator import concurrent, loop_watch, shared_claims, shared_commits
from beatless.orchestrator.claims import Behind, Claim
from beatless.orchestrator.concurrent import ConcurrentExecutor
from beatless.orchestrator.connections import ConnectionOfThread
from beatless.orchestrator.events import EventType
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Lease, Leases
from beatless.orchestrator.leased_writer import LeasedWriter
from beatless.orchestrator.output_thread import OutputThread
from beatless.orchestrator.records import Appended
from beatless.orchestrator.settlement import Boundary, Proposal, Settlement
from beatless.orchestrator.shared_commits import SharedCommits
from beatless.orchestrator.shared_traces import SharedTrace, SharedTraces
from beatless.orchestrator.step_output import Portion
from beatless.orchestrator.turns import IN_DOUBT
from beatless.testing import Kit
from tests.valkeys import until

CALLED: list[Any] = []
INSIDE, HELD, LET_GO = (threading.Event() for _ in range(3))


@step
def quick(ctx: StepContext) -> Any:
    return ctx.input


@step
def leaves_a_trace(ctx: StepContext) -> None:
    """Returns while one of its threads still traces."""
    INSIDE.set()
    assert HELD.wait(60)
    threading.Thread(target=ctx.trace, args=["waits for the row"]).start()
    assert LET_GO.wait(60)


@step
def in_a_thread(ctx: StepContext) -> None:
    CALLED.append(ctx.input)
    INSIDE.set()
    assert LET_GO.wait(60)


@step(transactional=True)
def inserts(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql(f"INSERT INTO {ctx.input} VALUES (1)")


@step
async def emits(ctx: AsyncStepContext) -> None:
    """One piece, and ends once the test says so: it is stored by then."""
    await ctx.emit(ctx.input)
    CALLED.append(ctx.run_id)
    await asyncio.to_thread(LET_GO.wait, 60)


@step
async def traces(ctx: AsyncStepContext) -> None:
    """Once the test says so."""
    CALLED.append(ctx.run_id)
    await asyncio.to_thread(LET_GO.wait, 60)
    await ctx.trace("waits for the row")


@step
async def traces_twice(ctx: AsyncStepContext) -> None:
    """The second one is asked for while the first is being written."""
    CALLED.append(ctx.run_id)
    await asyncio.to_thread(LET_GO.wait, 60)
    first = ctx.trace("waits for the row")
    await ctx.trace("and then")
    await first


@step
def speaks(ctx: StepContext) -> None:
    """The same in a thread of its own, which waits for the row."""
    CALLED.append(ctx.run_id)
    assert HELD.wait(60)
    ctx.emit("a piece")
    ctx.trace("waits for the row")


@step
async def answers(ctx: AsyncStepContext) -> None:
    """Emits and traces, once the test says so."""
    CALLED.append(ctx.run_id)
    await asyncio.to_thread(LET_GO.wait, 60)
    await ctx.emit("a piece")
    await ctx.trace("waits for the row")


@step
async def hears(ctx: AsyncStepContext) -> Any:
    return ctx.input


@step(retry=retry(max_crashes=1))
async def once(ctx: AsyncStepContext) -> None:
    pass


@plan("thinks")
def thinks(run: RunContext[Any]) -> str:
    """A function that does what belongs into a step."""
    INSIDE.set()
    assert LET_GO.wait(60)
    return "thought"


@plan("both")
async def both(run: RunContext[Any]) -> None:
    await asyncio.gather(run.step(traces), run.step(traces))


STEPS = (
    quick,
    leaves_a_trace,
    in_a_thread,
    inserts,
    emits,
    traces,
    traces_twice,
    answers,
    speaks,
    hears,
    once,
)
PLANS = [
    *(Plan(each.name, [each]) for each in STEPS),
    Plan("limited", [quick], limits=[Limit("one", at_once=1)]),
    Plan("goes_on", [in_a_thread, quick]),
    thinks,
    both,
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    CALLED.clear(), INSIDE.clear(), HELD.clear(), LET_GO.clear()
    return PLANS


@pytest.fixture
def executor(beatless: Kit) -> Iterator[ConcurrentExecutor]:
    made = beatless.app.executors.begin_concurrent()
    made.further_runs = 0  # the tests say which run is executed when
    made.start()
    yield made
    made.stop()


@pytest.fixture
def connection(beatless: Kit) -> Iterator[psycopg.Connection[Any]]:
    with beatless.app.executors.connect() as found:
        yield found


@pytest.fixture
def execute(beatless: Kit, executor: ConcurrentExecutor) -> Callable[..., str]:
    """Start a run and have it executed; its id."""

    def begin(plan: str, input: Any = None) -> str:
        run_id = beatless.start_run(plan, input).run_id
        executor.spawn(lambda: executor.execute(beatless.app.plans[plan], run_id, 1))
        return run_id

    return begin


def claimed(beatless: Kit, connection: psycopg.Connection[Any], run_id: str) -> Lease:
    lease = beatless.app.leases.claim(
        connection, run_id, plan="quick", worker="w", first_step=None, dispatch=1
    )
    assert lease is not None
    return lease


def proposal(beatless: Kit, lease: Lease) -> Proposal:
    event = beatless.app.journal.new_event(
        EventType.STEP_STARTED, step="quick", attempt=1, where="here", data={}
    )
    boundary = Boundary(events=[event], state=RunState.RUNNING)
    return Proposal(
        run_id=lease.run.run_id,
        token=lease.token,
        after=lease.run.last_seq,
        settlement=Settlement.ignoring_cancel(boundary),
    )


def test_one_that_has_lost_its_run_is_not_given_the_answer_of_the_next(
    beatless: Kit, connection: psycopg.Connection[Any]
) -> None:
    """The same process may have claimed it: an earlier body of the run returns meanwhile."""
    run_id = beatless.start_run("quick").run_id
    before = claimed(beatless, connection, run_id)
    with connection.transaction():
        connection.execute(
            f"UPDATE {beatless.app.settings.schema}.runs SET lease_expires_at = now()".encode()
        )
    now = claimed(beatless, connection, run_id)
    commits = SharedCommits(GroupCommit(beatless.app.settings.schema), lambda: connection)
    answers = [commits.put(proposal(beatless, lease)) for lease in (before, now)]
    commits.flush()

    given = [each.result(0) if each.done() else None for each in answers]
    assert given[0] is None  # it is tried again, or left to be written alone
    assert isinstance(given[1], Appended)


def test_a_statement_that_cannot_be_made_leaves_no_run_without_an_answer(
    beatless: Kit, connection: psycopg.Connection[Any]
) -> None:
    lease = claimed(beatless, connection, beatless.start_run("quick").run_id)

    def broken() -> psycopg.Connection[Any]:
        raise ValueError("no connection")

    commits = SharedCommits(GroupCommit(beatless.app.settings.schema), broken)
    answer = commits.put(proposal(beatless, lease))
    commits.flush()

    assert answer.result(0) is IN_DOUBT


class Claims(Leases):
    """Notes the runs of each statement by which they are claimed."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema, seconds=30.0)
        self.together: list[list[str]] = []
        self.alone: list[str] = []
        self.further: list[int] = []

    def claim_together(
        self,
        connection: psycopg.Connection[Any],
        claims: Sequence[Claim],
        behind: Sequence[Behind],
        **options: Any,
    ) -> list[Lease]:
        if claims:
            self.together.append([each.run_id for each in claims])
        self.further += [each.places for each in behind]
        return super().claim_together(connection, claims, behind, **options)

    def claim(
        self, connection: psycopg.Connection[Any], run_id: str, **options: Any
    ) -> Lease | None:
        self.alone.append(run_id)
        return super().claim(connection, run_id, **options)


@pytest.fixture
def claims(beatless: Kit) -> Claims:
    return Claims(beatless.app.settings.schema)


@pytest.fixture
def have_executed(beatless: Kit, claims: Claims) -> Callable[..., None]:
    """Have the runs of messages executed that have all come before the first claim."""

    def execute(runs: Sequence[str], *, further: int = 0) -> None:
        executor = beatless.app.executors.begin_concurrent()
        executor.leases, executor.further_runs = claims, further
        for run_id in runs:
            plan = beatless.app.plans[beatless.client.get_run(run_id).plan]
            executor.spawn(partial(executor.execute, plan, run_id, 1))
        executor.start()
        executor.stop()

    return execute


def test_runs_whose_messages_have_come_together_are_claimed_in_one_statement(
    beatless: Kit,
    claims: Claims,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It begins their first steps too: of a run that begins nothing is read."""
    read: list[str] = []

    def checkpoint_page(_: Journal, connection: Any, run_id: str, **options: Any) -> NoReturn:
        read.append(run_id)
        raise AssertionError

    monkeypatch.setattr(Journal, "checkpoint_page", checkpoint_page)
    runs = [beatless.start_run("quick", number).run_id for number in range(5)]
    have_executed(runs)

    assert claims.together == [runs]
    assert (claims.alone, read) == ([], [])
    assert [beatless.client.get_run(run_id).result for run_id in runs] == list(range(5))
    assert {beatless.client.get_run(run_id).last_seq for run_id in runs} == {4}
    beatless.verify()


def test_a_statement_claims_so_many_runs_at_most(
    beatless: Kit,
    claims: Claims,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_claims, "MAX_RUNS", 2)
    runs = [beatless.start_run("quick", number).run_id for number in range(5)]
    have_executed(runs)

    assert claims.together == [runs[:2], runs[2:4], runs[4:]]
    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}


def test_a_run_with_two_messages_is_executed_once(
    beatless: Kit, claims: Claims, have_executed: Callable[..., None]
) -> None:
    run_id, other = (beatless.start_run("quick", number).run_id for number in range(2))
    have_executed([run_id, run_id, other])

    assert claims.together == [[run_id, other], [run_id]]
    assert claims.alone == [run_id]
    assert beatless.client.get_run(run_id).attempt == 1
    beatless.verify()


def test_a_claim_that_waits_for_its_row_keeps_no_other_run_from_its_own(
    beatless: Kit,
    claims: Claims,
    connection: psycopg.Connection[Any],
) -> None:
    """Nor is it given up: it is made again by itself, and waits there."""
    executor = beatless.app.executors.begin_concurrent()
    executor.leases, executor.further_runs = claims, 0
    executor.start()
    held, *others = (beatless.start_run("quick", number).run_id for number in range(4))
    with rows_held(beatless, connection, [held]):
        for run_id in (held, *others):
            executor.spawn(partial(executor.execute, beatless.app.plans["quick"], run_id, 1))
        until(lambda: held in claims.alone)
        for run_id in others:
            assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    executor.stop()
    assert set(claims.alone) == {held}
    beatless.verify()


def test_runs_of_a_paused_queue_and_with_limits_are_claimed_by_themselves(
    beatless: Kit, claims: Claims, have_executed: Callable[..., None]
) -> None:
    """The message of one goes back to wait; a limit has no room for two."""
    paused = beatless.start_run("quick", queue="night").run_id
    limited = [beatless.start_run("limited").run_id for _ in range(2)]
    free = beatless.start_run("quick").run_id
    beatless.client.pause_queue("night")
    have_executed([paused, *limited, free])

    assert claims.together == [[paused, free]]
    assert sorted(claims.alone) == sorted([paused, *limited])
    assert beatless.client.get_run(paused).state is RunState.QUEUED
    assert beatless.client.get_run(free).state is RunState.COMPLETED
    ended = [beatless.client.get_run(run_id).state for run_id in limited]
    assert RunState.COMPLETED in ended
    beatless.verify()


def test_a_claim_of_several_runs_that_fails_is_made_for_each(
    beatless: Kit,
    claims: Claims,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise psycopg.errors.DataException("one of the values is odd")

    monkeypatch.setattr(claims, "claim_together", refuse)
    runs = [beatless.start_run("quick", number).run_id for number in range(3)]
    have_executed(runs)

    assert sorted(claims.alone) == sorted(runs)
    assert [beatless.client.get_run(run_id).result for run_id in runs] == [0, 1, 2]
    beatless.verify()


def test_a_run_whose_lease_has_run_out_is_claimed_by_itself(
    beatless: Kit, claims: Claims, have_executed: Callable[..., None]
) -> None:
    runs = [beatless.start_run("quick", number).run_id for number in range(2)]
    with beatless.crash(at="step.before"):
        beatless.work_once()
    [taken_over] = [run_id for run_id in runs if beatless.client.get_run(run_id).attempt]
    beatless.advance(60)
    have_executed(runs)

    assert (claims.together, claims.alone) == ([runs], [taken_over])
    assert [beatless.client.get_run(run_id).result for run_id in runs] == [0, 1]
    beatless.verify()


def backlog(beatless: Kit, count: int) -> list[str]:
    """Runs that wait since long before a message comes."""
    runs = [beatless.start_run("quick", number).run_id for number in range(count)]
    beatless.advance(60)
    return runs


def test_a_message_has_those_executed_that_come_next_in_a_backlog(
    beatless: Kit,
    claims: Claims,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other, so many at most."""
    monkeypatch.setattr(concurrent, "FURTHER_S", 1e9)
    first, *others = backlog(beatless, 5)
    have_executed([first], further=3)

    assert (claims.together, claims.alone, claims.further) == ([[first]], [], [1, 1, 1])
    ended = [beatless.client.get_run(run_id) for run_id in others]
    assert [run.result for run in ended] == [1, 2, 3, None]
    assert {run.worker for run in ended[:3]} == {beatless.client.get_run(first).worker}
    beatless.work_until_idle()
    beatless.verify()


@pytest.mark.parametrize(("name", "value"), [("FURTHER_S", 0.0), ("BACKLOG_S", 1e9)])
def test_a_message_brings_no_other_run_after_some_time_or_without_a_backlog(
    beatless: Kit,
    claims: Claims,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
) -> None:
    monkeypatch.setattr(concurrent, name, value)
    first, other = backlog(beatless, 2)
    have_executed([first], further=3)

    assert claims.further == []
    assert beatless.client.get_run(other).state is RunState.QUEUED


def test_a_worker_that_stops_takes_no_further_run(
    beatless: Kit, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrent, "FURTHER_S", 1e9)
    first, other = (beatless.start_run("in_a_thread", number).run_id for number in range(2))
    beatless.advance(60)
    executor = beatless.app.executors.begin_concurrent()
    executor.leases, executor.stopping = claims, threading.Event()
    executor.start()
    executor.spawn(partial(executor.execute, beatless.app.plans["in_a_thread"], first, 1))
    assert INSIDE.wait(60)
    executor.stopping.set()
    LET_GO.set()
    executor.stop()

    assert (CALLED, claims.further) == ([0], [])
    assert beatless.client.get_run(other).state is RunState.QUEUED


def test_runs_that_have_ended_together_ask_for_as_many_in_one_commit(beatless: Kit) -> None:
    """With the messages that have come meanwhile; one that got none is told so."""
    ended = [leased(beatless, queue) for queue in ("day", "night", "day", "day")]
    given = [leased(beatless, queue) for queue in ("day", "day", "night", "day")]
    message = Claim(run_id=given[3].run.run_id, plan="quick", first_step="quick", dispatch=1)
    asked: list[tuple[Sequence[Claim], Sequence[Behind]]] = []

    def claim(claims: Sequence[Claim], behind: Sequence[Behind]) -> Sequence[Lease]:
        asked.append((claims, behind))
        return given

    done: SimpleQueue[Callable[[], Any]] = SimpleQueue()
    found = shared_claims.SharedClaims(claim, done.put)
    answers = [found.put(each) for each in (*ended, message)]
    found.flush()
    done.get(timeout=60)()
    found.stop()

    places = {each.run_id: each.places for each in asked[0][1]}
    assert asked[0][0] == [message]
    assert places == {ended[3].run.run_id: 3, ended[1].run.run_id: 1}
    expected = [given[0], given[2], given[1], None, given[3]]
    assert [each.result(0) for each in answers] == expected


def leased(beatless: Kit, queue: str) -> Lease:
    """A lease of a run of this queue, as if it had been claimed."""
    return Lease(run=beatless.start_run("quick", queue=queue), token=1)


def test_a_run_of_async_steps_takes_no_thread_beside_the_loop(
    beatless: Kit,
    have_executed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ConcurrentExecutor, "aside", lambda _, act: asked.append(act))
    run_id = beatless.start_run("hears", 7).run_id
    have_executed([run_id])

    assert asked == []
    assert beatless.client.get_run(run_id).result == 7


def test_a_step_that_may_begin_once_is_begun_behind_the_claim(
    beatless: Kit, have_executed: Callable[..., None]
) -> None:
    """After a death in between nobody would know that its body was not called."""
    executor = beatless.app.executors.begin_concurrent()
    assert executor.first_step(beatless.app.plans["once"]) is None
    assert executor.first_step(beatless.app.plans["quick"]) == "quick"
    run_id = beatless.start_run("once").run_id
    have_executed([run_id])

    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    beatless.verify()


def waiters(postgres: psycopg.Connection[Any], holder: int) -> int:
    found = postgres.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))", (holder,)
    ).fetchone()
    assert found is not None
    return int(found[0])


@pytest.mark.slow
def test_a_trace_that_waits_for_its_row_stops_no_other_run(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    postgres: psycopg.Connection[Any],
) -> None:
    """Nor when its step has ended: the run's one writer is still busy with it."""
    schema = beatless.app.settings.schema
    run_id = execute("leaves_a_trace")
    assert INSIDE.wait(60)
    with connection.transaction():
        lock = f"SELECT pg_backend_pid() FROM {schema}.runs WHERE run_id = %s FOR UPDATE"
        (holder,) = connection.execute(lock.encode(), (run_id,)).fetchone() or ()
        HELD.set()
        until(lambda: waiters(postgres, holder))
        LET_GO.set()
        for number in range(3):
            assert beatless.wait_for_run_completion(execute("quick", number)).result == number
    assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    names = [e.data["name"] for e in beatless.client.events(run_id) if e.type == "DebugTrace"]
    assert names == ["waits for the row"]
    beatless.verify()


def test_a_commit_that_waits_for_another_transaction_stops_no_other_run(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    postgres: psycopg.Connection[Any],
) -> None:
    """A deferred constraint is checked at the commit, against what others have not committed."""
    table = f"{beatless.app.settings.schema}.numbers"
    postgres.execute(f"CREATE TABLE {table} (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)".encode())
    with connection.transaction(force_rollback=True):
        connection.execute(f"INSERT INTO {table} VALUES (1)".encode())
        (holder,) = connection.execute("SELECT pg_backend_pid()").fetchone() or ()
        run_id = execute("inserts", table)
        until(lambda: waiters(postgres, holder))
        assert beatless.wait_for_run_completion(execute("quick", 7)).result == 7
    assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_body_that_waits_for_a_thread_is_not_called_once_its_worker_stops(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not begun: neither has its time."""
    monkeypatch.setattr(concurrent, "SYNC_BODIES", 1)
    executor = beatless.app.executors.begin_concurrent()
    executor.stopping = threading.Event()
    executor.start()
    runs = [beatless.start_run("in_a_thread", number).run_id for number in range(3)]
    for run_id in runs:
        plan = beatless.app.plans["in_a_thread"]
        executor.spawn(partial(executor.execute, plan, run_id, 1))
        beatless.wait_for_event(run_id, "StepStarted")
        assert INSIDE.wait(60)
    executor.stopping.set()
    LET_GO.set()
    executor.stop()

    assert CALLED == [0]
    states = [beatless.client.get_run(run_id).state for run_id in runs]
    assert states == [RunState.COMPLETED, RunState.QUEUED, RunState.QUEUED]
    beatless.verify()


def test_a_body_whose_turn_comes_after_the_deadline_is_not_called(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrent, "SYNC_BODIES", 1)
    executor = beatless.app.executors.begin_concurrent()
    executor.start()
    plan = beatless.app.plans["in_a_thread"]
    first = beatless.start_run("in_a_thread", 0).run_id
    executor.spawn(partial(executor.execute, plan, first, 1))
    assert INSIDE.wait(60)
    late = beatless.start_run("in_a_thread", 1, deadline=0.3)
    executor.spawn(partial(executor.execute, plan, late.run_id, 1))
    until(lambda: datetime.now(UTC) > late.deadline_at + timedelta(seconds=0.1))
    LET_GO.set()
    executor.stop()
    beatless.work_until_idle()

    assert CALLED == [0]
    assert beatless.client.get_run(late.run_id).error["type"] == "DeadlineExceeded"
    beatless.verify()


def test_a_body_whose_turn_comes_after_its_run_was_taken_over_is_not_called(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrent, "SYNC_BODIES", 1)
    executor = beatless.app.executors.begin_concurrent()
    executor.start()
    plan = beatless.app.plans["in_a_thread"]
    first = beatless.start_run("in_a_thread", 0).run_id
    executor.spawn(partial(executor.execute, plan, first, 1))
    assert INSIDE.wait(60)
    taken = beatless.start_run("in_a_thread", 1).run_id
    executor.spawn(partial(executor.execute, plan, taken, 1))
    held = executor.heartbeat._by_id
    until(lambda: any(each.run.run_id == taken for each in list(held.values())))
    [lease] = [each for each in list(held.values()) if each.run.run_id == taken]
    with beatless.app.executors.connect() as connection:
        connection.execute(
            f"UPDATE {beatless.app.settings.schema}.runs SET lease_expires_at = now()"
            " WHERE run_id = %s".encode(),
            [taken],
        )
        assert beatless.app.leases.claim(
            connection, taken, plan=plan.name, worker="w", first_step=None, dispatch=1
        )
        executor.heartbeat.once(connection)
    assert lease.lost
    LET_GO.set()
    executor.stop()

    assert CALLED == [0]


def test_threads_of_steps_that_have_ended_keep_no_connection(beatless: Kit) -> None:
    opened: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        opened.append(beatless.app.executors.connect())
        return opened[-1]

    connections = ConnectionOfThread(connect)
    for _ in range(6):
        thread = threading.Thread(target=connections.get)
        thread.start()
        thread.join()

    assert len(opened) == 6
    assert sum(not each.closed for each in opened) == 1
    connections.close_all()
    assert all(each.closed for each in opened)


@contextmanager
def rows_held(
    beatless: Kit, connection: psycopg.Connection[Any], runs: Sequence[str]
) -> Iterator[None]:
    """Somebody's transaction has the rows of these runs in this block."""
    with connection.transaction():
        lock = f"SELECT FROM {beatless.app.settings.schema}.runs WHERE run_id = ANY(%s) FOR UPDATE"
        connection.execute(lock.encode(), (list(runs),))
        yield


def test_boundaries_that_wait_for_their_rows_leave_the_threads_to_others(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than there are threads for such writes; a claim needs one of these too."""
    monkeypatch.setattr(shared_commits, "LEFT_OUT_S", 0.0)
    held = [execute("in_a_thread", number) for number in range(concurrent.WAITING_WRITES + 4)]
    until(lambda: len(CALLED) == len(held))
    alone: set[int] = set()
    settle = LeasedWriter.settle

    def noted(writer: LeasedWriter, *arguments: Any, **options: Any) -> Appended:
        alone.add(id(writer))
        return settle(writer, *arguments, **options)

    monkeypatch.setattr(LeasedWriter, "settle", noted)
    with rows_held(beatless, connection, held):
        LET_GO.set()
        until(lambda: len(alone) >= concurrent.WAITING_WRITES)
        assert beatless.wait_for_run_completion(execute("quick", 7)).result == 7
    for run_id in held:
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    beatless.verify()


def test_traces_that_wait_for_their_rows_leave_the_threads_to_others(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [execute("traces") for _ in range(6)]
    free = execute("traces")
    until(lambda: len(CALLED) == 7)
    writing: set[int] = set()
    append = LeasedWriter.append

    def noted(writer: LeasedWriter, *arguments: Any) -> None:
        writing.add(id(writer))
        append(writer, *arguments)

    monkeypatch.setattr(LeasedWriter, "append", noted)
    with rows_held(beatless, connection, held):
        LET_GO.set()
        assert beatless.wait_for_run_completion(free).state is RunState.COMPLETED
        until(lambda: len(writing) >= len(held))  # the free one, too, if a heartbeat had its row
    for run_id in held:
        beatless.wait_for_run_completion(run_id)
        names = [e.data["name"] for e in beatless.client.events(run_id) if e.type == "DebugTrace"]
        assert names == ["waits for the row"]
    beatless.verify()


def test_output_before_a_trace_that_waits_for_its_row_keeps_no_thread_from_others(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The writes of six steps are made again and again, in four threads and that of the output."""
    held = [execute("answers") for _ in range(6)]
    until(lambda: len(CALLED) == len(held))
    tries: Counter[int] = Counter()
    append = LeasedWriter.append

    def noted(writer: LeasedWriter, *arguments: Any) -> None:
        tries[id(writer)] += 1
        append(writer, *arguments)

    monkeypatch.setattr(LeasedWriter, "append", noted)
    with rows_held(beatless, connection, held):
        LET_GO.set()
        until(lambda: sum(tries.values()) >= 2 * len(held))
        free = execute("answers")
        assert beatless.wait_for_run_completion(free).state is RunState.COMPLETED
    for run_id in held:
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
        assert output(beatless, run_id) == [["a piece"]]
    beatless.verify()


class LostAnswers:
    """The first write of each of some runs has no answer, and somebody has its row from then on."""

    def __init__(
        self,
        kit: Kit,
        holder: psycopg.Connection[Any],
        own: psycopg.Connection[Any],
        runs: Sequence[str],
        committed: bool,
    ) -> None:
        self._holder, self._own = holder, own
        self._runs, self._committed = set(runs), committed
        self._lock = (
            f"SELECT FROM {kit.app.settings.schema}.runs WHERE run_id = %s FOR UPDATE"
        ).encode()
        self._mutex = threading.Lock()
        self.lost: set[str] = set()
        self.tries: Counter[str] = Counter()

    def of(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """The same, of these runs without an answer."""

        def without(caller: Any, run_id: str, *arguments: Any, **options: Any) -> Any:
            if run_id not in self._runs - self.lost:
                return write(caller, run_id, *arguments, **options)
            with self._mutex:
                if self._committed:
                    write(self._own, run_id, *arguments, **options)
                self._holder.execute(self._lock, (run_id,))
                self.lost.add(run_id)
            raise psycopg.OperationalError("the answer is lost")

        return without

    def noting(self, renew: Callable[..., None]) -> Callable[..., None]:
        """The same, and how often it was tried for each run."""

        def noted(connection: psycopg.Connection[Any], lease: Lease) -> None:
            self.tries[lease.run.run_id] += 1
            renew(connection, lease)

        return noted


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize(
    ("plan", "write", "in_doubt"),
    [
        ("goes_on", "settle", concurrent.WAITING_WRITES + 2),
        ("traces", "append", 6),
        ("traces_twice", "append", 6),
    ],
)
def test_writes_in_doubt_whose_rows_are_held_leave_the_threads_to_others(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
    write: str,
    in_doubt: int,
    committed: bool,
) -> None:
    """An answer is lost, and the row that it has to be looked up under belongs to somebody."""
    monkeypatch.setattr(shared_commits, "LEFT_OUT_S", 0.0)
    for shared in ("settle", "append"):  # each boundary and trace by itself
        monkeypatch.setattr(GroupCommit, shared, lambda *_: {})
    held = [execute(plan, number) for number in range(in_doubt)]
    until(lambda: len(CALLED) == in_doubt)
    journal, leases = beatless.app.journal, beatless.app.leases
    with beatless.app.executors.connect() as own, connection.transaction():
        answers = LostAnswers(beatless, connection, own, held, committed)
        with monkeypatch.context() as patched:
            patched.setattr(journal, write, answers.of(getattr(journal, write)))
            patched.setattr(leases, "renew_token", answers.noting(leases.renew_token))
            LET_GO.set()
            until(lambda: len(answers.tries) == in_doubt)
            until(lambda: max(answers.tries.values()) >= 2)
            others = execute("quick", 7), execute("traces")
            for other in others:
                assert beatless.wait_for_run_completion(other).state is RunState.COMPLETED
    for run_id in held:
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
        names = [e.data["name"] for e in beatless.client.events(run_id) if e.type == "DebugTrace"]
        once = {"traces": ["waits for the row"], "traces_twice": ["waits for the row", "and then"]}
        assert names == once.get(plan, [])
    beatless.verify()


class Statements(GroupCommit):
    """Notes of how many runs the output is in each statement; the first waits."""

    def __init__(self, schema: str) -> None:
        super().__init__(schema)
        self.sizes: list[int] = []
        self.go_on = threading.Event()
        self.lost = False

    def append(self, connection: Any, portions: Sequence[Portion]) -> dict[int, Appended]:
        self.sizes.append(len(portions))
        assert self.go_on.wait(60)
        if self.lost:
            self.lost = False
            raise psycopg.OperationalError("the answer is lost")
        return super().append(connection, portions)


@pytest.fixture
def statements(beatless: Kit, executor: ConcurrentExecutor) -> Iterator[Statements]:
    found = Statements(beatless.app.settings.schema)
    executor.outputs = OutputThread(found)
    yield found
    executor.outputs.stop()


class Traces(SharedTraces):
    """Notes how many traces are in each commit; the first waits until the test says so."""

    def __init__(self, executor: ConcurrentExecutor) -> None:
        statement = GroupCommit(executor.journal.schema)
        super().__init__(executor.journal, statement, executor.connection, executor.disconnect)
        self.asked: list[SharedTrace] = []
        self.sizes: list[int] = []
        self.go_on = threading.Event()
        self.error: psycopg.Error | None = None
        self.writes = True

    def put(self, trace: SharedTrace, told: Callable[[bool], None]) -> None:
        super().put(trace, told)
        self.asked.append(trace)

    def _commit(self, portions: Sequence[Portion]) -> Mapping[int, Appended]:
        self.sizes.append(len(portions))
        assert self.go_on.wait(60)
        written = super()._commit(portions) if self.writes else {}
        if self.error is not None:
            raise self.error
        return written


@pytest.fixture
def shared(executor: ConcurrentExecutor) -> Iterator[Traces]:
    found = executor._traces = Traces(executor)
    LET_GO.set()  # they trace at once
    yield found
    found.stop()


def trace_names(beatless: Kit, run_id: str) -> list[Any]:
    return [e.data["name"] for e in beatless.client.events(run_id) if e.type == "DebugTrace"]


def test_traces_of_many_steps_are_one_commit(
    beatless: Kit, execute: Callable[..., str], shared: Traces
) -> None:
    """All that is traced while one is under way is in the next."""
    runs = [execute("traces") for _ in range(20)]
    until(lambda: len(shared.asked) == 20)
    shared.go_on.set()
    for run_id in runs:
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
        assert trace_names(beatless, run_id) == ["waits for the row"]

    assert sum(shared.sizes) == 20
    assert len(shared.sizes) <= 2
    beatless.verify()


def test_two_traces_of_a_step_are_in_their_order(
    beatless: Kit, execute: Callable[..., str], shared: Traces
) -> None:
    shared.go_on.set()
    run_id = execute("traces_twice")

    assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    assert trace_names(beatless, run_id) == ["waits for the row", "and then"]
    assert shared.sizes == [1, 1]


def test_two_traces_of_a_run_are_in_no_one_commit(
    beatless: Kit, execute: Callable[..., str], shared: Traces
) -> None:
    """Of two branches, which are asked for while another commit is under way."""
    execute("traces")
    until(lambda: shared.sizes == [1])
    run_id = execute("both")
    until(lambda: len(shared.asked) == 3)
    shared.go_on.set()

    assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
    assert trace_names(beatless, run_id) == ["waits for the row"] * 2
    assert max(shared.sizes) == 1


@pytest.mark.parametrize(
    ("error", "writes"),
    [
        (psycopg.OperationalError("the answer is lost"), True),
        (psycopg.OperationalError("the server is gone"), False),
        (psycopg.DataError("one of the values is odd"), False),
    ],
    ids=["lost", "gone", "refused"],
)
def test_traces_whose_commit_fails_are_written_once_each(
    beatless: Kit, execute: Callable[..., str], shared: Traces, error: psycopg.Error, writes: bool
) -> None:
    shared.error, shared.writes = error, writes
    runs = [execute("traces") for _ in range(4)]
    until(lambda: len(shared.asked) == 4)
    shared.go_on.set()

    for run_id in runs:
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
        assert trace_names(beatless, run_id) == ["waits for the row"]
    assert len(shared.sizes) <= 2
    beatless.verify()


def output(beatless: Kit, run_id: str) -> list[Any]:
    events = beatless.client.events(run_id)
    return [e.data["pieces"] for e in events if e.type == "StepOutput"]


@pytest.mark.slow
def test_what_many_steps_emit_is_one_statement(
    beatless: Kit, execute: Callable[..., str], statements: Statements
) -> None:
    """All that is emitted while one statement is under way is in the next."""
    runs = [execute("emits", number) for number in range(20)]
    until(lambda: len(CALLED) == 20)
    statements.go_on.set()
    for run_id in runs:
        beatless.wait_for_event(run_id, "StepOutput")
    LET_GO.set()

    assert sum(statements.sizes) == 20
    assert len(statements.sizes) <= 2
    for number, run_id in enumerate(runs):
        assert beatless.wait_for_run_completion(run_id).state is RunState.COMPLETED
        assert output(beatless, run_id) == [[number]]
    beatless.verify()


@pytest.mark.slow
def test_output_whose_row_is_held_is_written_later_and_that_of_others_at_once(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    statements: Statements,
) -> None:
    held = execute("emits", "held")
    until(lambda: len(CALLED) == 1)
    with rows_held(beatless, connection, [held]):
        statements.go_on.set()
        for number in range(3):
            beatless.wait_for_event(execute("emits", number), "StepOutput")
        assert output(beatless, held) == []
    beatless.wait_for_event(held, "StepOutput")
    LET_GO.set()

    beatless.wait_for_run_completion(held)
    assert output(beatless, held) == [["held"]]
    beatless.verify()


@pytest.mark.slow
def test_output_in_doubt_whose_row_is_held_is_written_once_and_that_of_others_before(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    statements: Statements,
) -> None:
    held = execute("emits", "held")
    until(lambda: len(statements.sizes) == 1)
    with rows_held(beatless, connection, [held]):
        statements.lost = True
        statements.go_on.set()
        for number in range(3):
            beatless.wait_for_event(execute("emits", number), "StepOutput")
        assert not statements.lost
        assert output(beatless, held) == []
    beatless.wait_for_event(held, "StepOutput")
    LET_GO.set()

    beatless.wait_for_run_completion(held)
    assert output(beatless, held) == [["held"]]
    beatless.verify()


@pytest.mark.slow
def test_output_of_others_does_not_wait_for_a_step_that_waits_for_its_row(
    beatless: Kit,
    execute: Callable[..., str],
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = threading.Event()
    append = LeasedWriter.append

    def noted(writer: LeasedWriter, *arguments: Any) -> None:
        tried.set()
        append(writer, *arguments)

    monkeypatch.setattr(LeasedWriter, "append", noted)
    held = execute("speaks")
    until(lambda: len(CALLED) == 1)
    with rows_held(beatless, connection, [held]):
        HELD.set()
        assert tried.wait(60)
        for number in range(3):
            beatless.wait_for_event(execute("emits", number), "StepOutput")
        assert output(beatless, held) == []
    LET_GO.set()
    assert beatless.wait_for_run_completion(held).state is RunState.COMPLETED
    assert output(beatless, held) == [["a piece"]]
    beatless.verify()


def test_a_function_that_keeps_its_worker_busy_is_named(
    beatless: Kit,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_watch, "BLOCKED_S", 0.05)
    executor = beatless.app.executors.begin_concurrent()
    executor.start()
    run_id = beatless.start_run("thinks").run_id
    executor.spawn(lambda: executor.execute(beatless.app.plans["thinks"], run_id, 1))
    assert INSIDE.wait(60)
    until(lambda: any(vars(each).get("action") == "plan_blocks" for each in caplog.records))
    LET_GO.set()
    executor.stop()

    told = [vars(each) for each in caplog.records]
    facts = next(each for each in told if each.get("action") == "plan_blocks")
    assert (facts["run_id"], facts["plan"]) == (run_id, "thinks")
    assert facts["levelno"] == logging.WARNING
    assert "in thinks" in facts["reason"] or "in wait" in facts["reason"]
    assert beatless.client.get_run(run_id).result == "thought"
