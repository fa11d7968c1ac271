"""One run has one writer: among its step's threads, and among the workers that have claimed it."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from beatless import LeaseLost, Plan, RunState, StepEnded, step
from beatless.orchestrator.children import CancelsChildren
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.deadlines import Deadlines
from beatless.orchestrator.errors import OrchestratorError
from beatless.orchestrator.events import EventType
from beatless.orchestrator.records import Appended
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import TRANSITIONS, WAITS, allowed, stored
from beatless.orchestrator.wakes import Wakes
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import ALL_SHARDS
from beatless.testing import Kit

THREADS, EACH = 6, 20

QUEUED, WAITING = RunState.QUEUED, RunState.WAITING


class Gate:
    """A body that stays inside until it is let go: the first call; each later one goes through."""

    def __init__(self) -> None:
        self.calls = 0
        self.inside, self.go = threading.Event(), threading.Event()
        self.said: list[Exception | None] = []

    def __call__(self, ctx: StepContext) -> str:
        self.calls += 1
        call = self.calls
        if call == 1:
            self.inside.set()
            assert self.go.wait(60)
            try:
                ctx.trace("late")
            except OrchestratorError as error:
                self.said.append(error)
                raise
            self.said.append(None)
        return f"call {call}"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def cut() -> list[Callable[[], None]]:
    """What a step calls to end the connection of its worker."""
    return []


@pytest.fixture
def beatless_plans(gate: Gate, cut: list[Callable[[], None]]) -> list[Plan]:
    over, said = threading.Event(), []

    @step
    def fan(ctx: StepContext) -> None:
        def work(thread: int) -> None:
            for number in range(EACH):
                ctx.trace("t", mark=f"{thread}.{number}")
                if thread == 0 and number % 5 == 0:
                    cut[0]()
                ctx.raise_if_cancelled()

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))

    @step
    def leaves_a_thread(ctx: StepContext) -> None:
        def outlive() -> None:
            over.wait(60)
            for speak in (lambda: ctx.trace("late"), ctx.raise_if_cancelled):
                try:
                    speak()
                    said.append("nothing")
                except StepEnded as error:
                    said.append(str(error))

        ctx.trace("in time")
        threading.Thread(target=outlive, name="outlives").start()

    @step
    def hears(ctx: StepContext) -> list[str]:
        over.set()
        for thread in threading.enumerate():
            if thread.name == "outlives":
                thread.join(60)
        return said

    @step
    def after(ctx: StepContext) -> str:
        return ctx.results["gated"]

    return [
        Plan("fan", [fan]),
        Plan("outlived", [leaves_a_thread, hears]),
        Plan("gated", [step(name="gated")(gate), after]),
    ]


def test_threads_of_one_step_trace_at_once_while_connections_die(
    beatless: Kit,
    cut: list[Callable[[], None]],
    postgres: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = beatless.executor()

    def end_connection() -> None:
        connection = executor.connections.current
        if connection is not None and not connection.closed:
            postgres.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))

    cut.append(end_connection)
    run = beatless.start_run("fan")
    beatless.work_until_idle()

    events = beatless.client.events(run.run_id)
    marks = Counter(event.data["mark"] for event in events if event.type == "DebugTrace")
    assert set(marks.values()) == {1}
    assert len(marks) == THREADS * EACH
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert beatless.client.get_run(run.run_id).attempt == 1
    assert not [message for message in caplog.messages if "lease lost" in message]
    beatless.verify()


def test_a_thread_that_outlives_its_step_is_refused(beatless: Kit) -> None:
    run = beatless.start_run("outlived")
    beatless.work_until_idle()

    said = beatless.client.get_run(run.run_id).result
    assert len(said) == 2
    assert all("step leaves_a_thread of run" in text and "has ended" in text for text in said)
    traces = [e.data["name"] for e in beatless.client.events(run.run_id) if e.type == "DebugTrace"]
    assert traces == ["in time"]
    beatless.verify()


def test_a_worker_whose_run_was_taken_over_writes_nothing_while_the_other_is_in_its_step(
    beatless: Kit, gate: Gate
) -> None:
    """Each claim has a token of its own: the other one's is looked at while it works."""
    plan = beatless.app.plans["gated"]
    run = beatless.start_run("gated")
    beatless.drain_outbox_once()
    frozen = beatless.app.executors.new()
    worker = threading.Thread(target=frozen.execute, args=(plan, run.run_id, 1))
    worker.start()
    assert gate.inside.wait(60)
    beatless.advance(31)
    connection = beatless.app.executors.connect()
    lease = beatless.app.leases.claim(
        connection, run.run_id, plan="gated", worker="other", first_step="gated", dispatch=2
    )

    gate.go.set()
    worker.join(60)

    assert isinstance(gate.said[0], LeaseLost)
    assert beatless.event_types(run.run_id) == ["RunStarted", "StepStarted"]
    trace = beatless.app.journal.new_event(
        EventType.DEBUG_TRACE, where="here", data={"name": "of the other one"}
    )
    assert beatless.app.journal.append(connection, run.run_id, lease.token, [trace])
    beatless.app.journal.settle(
        connection,
        run.run_id,
        lease.token,
        Settlement.ignoring_cancel(Boundary(state=RunState.QUEUED)),
    )
    connection.close()
    frozen.disconnect()


def await_lock(postgres: psycopg.Connection, pid: int) -> None:
    """Return when this session waits for a row that somebody else holds."""
    waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = %s AND NOT granted)"
    until = monotonic() + 60
    while not postgres.execute(waits, (pid,)).fetchone()[0]:
        assert monotonic() < until


BOUNDARIES = {
    "the next step": (Boundary(state=RunState.RUNNING), RunState.RUNNING),
    "an end": (Boundary(state=RunState.COMPLETED), RunState.CANCELLED),
    "a wait": (Boundary(state=RunState.QUEUED, delay_s=60.0), RunState.CANCELLED),
}


@pytest.mark.parametrize("what", ["a trace", *BOUNDARIES])
def test_a_cancel_that_a_write_has_waited_for_is_seen_by_it(
    beatless: Kit, postgres: psycopg.Connection, what: str
) -> None:
    """The writer has begun before the cancel was committed, and learns of it all the same."""
    app = beatless.app
    run = beatless.start_run("gated")
    connection = app.executors.connect()
    lease = app.leases.claim(
        connection, run.run_id, plan="gated", worker="w", first_step="gated", dispatch=1
    )
    trace = app.journal.new_event(EventType.DEBUG_TRACE, where="here", data={"name": "x"})

    def write() -> Appended | None:
        if what == "a trace":
            return app.journal.append(connection, run.run_id, lease.token, [trace])
        boundary, if_cancelled = BOUNDARIES[what]
        ended = Settlement(
            normal=replace(boundary, events=[trace]),
            if_cancelled=Boundary(events=[trace], state=if_cancelled),
        )
        return app.journal.settle(connection, run.run_id, lease.token, ended)

    with ThreadPoolExecutor(1) as pool, app.executors.connect() as somebody:
        somebody.autocommit = False
        beatless.client.cancel_run(run.run_id, connection=somebody)
        written = pool.submit(write)
        await_lock(postgres, connection.info.backend_pid)
        somebody.commit()
        told = written.result(60)

    assert told is not None
    assert told.cancelled
    if what != "a trace":
        assert beatless.client.get_run(run.run_id).state is BOUNDARIES[what][1]
    assert beatless.event_types(run.run_id)[-2:] == ["CancelRequested", "DebugTrace"]
    connection.close()


@pytest.mark.parametrize("what", ["cancel", "take over"])
def test_who_has_waited_for_the_end_of_a_run_finds_it_ended(
    beatless: Kit, postgres: psycopg.Connection, what: str
) -> None:
    """The other way round: the worker's last write was not committed when it was asked for."""
    app = beatless.app
    run = beatless.start_run("gated")
    worker, other = app.executors.connect(), app.executors.connect()
    lease = app.leases.claim(
        worker, run.run_id, plan="gated", worker="w", first_step="gated", dispatch=1
    )
    beatless.advance(31)
    done = app.journal.new_event(
        EventType.STEP_FINISHED, step="gated", attempt=1, where="here", data={"result": 1}
    )
    end = app.journal.new_event(
        EventType.RUN_FINISHED, where="here", data={"outcome": "completed", "result": 1}
    )

    def act() -> Any:
        if what == "cancel":
            with other.transaction():
                return beatless.client.cancel_run(run.run_id, connection=other).state
        return app.leases.claim(
            other, run.run_id, plan="gated", worker="v", first_step="gated", dispatch=2
        )

    with ThreadPoolExecutor(1) as pool:
        with worker.transaction():
            settlement = Settlement.ignoring_cancel(
                Boundary(events=[done, end], state=RunState.COMPLETED, result="1")
            )
            assert app.journal.settle(worker, run.run_id, lease.token, settlement)
            acted = pool.submit(act)
            await_lock(postgres, other.info.backend_pid)
        assert acted.result(60) in (None, RunState.COMPLETED)

    types = ["RunStarted", "StepStarted", "StepFinished", "RunFinished"]
    assert beatless.event_types(run.run_id) == types
    beatless.verify()
    worker.close()
    other.close()


def test_no_two_claims_of_a_run_have_the_same_token(beatless: Kit) -> None:
    run = beatless.start_run("gated")
    connection = beatless.app.executors.connect()
    seen = []
    for dispatch in range(1, 6):
        lease = beatless.app.leases.claim(
            connection, run.run_id, plan="gated", worker="w", first_step="gated", dispatch=dispatch
        )
        seen.append(lease.token)
        beatless.app.leases.renew_token(connection, lease)
        seen.append(lease.token)
        beatless.advance(31)
    connection.close()
    assert len(set(seen)) == len(seen)


def test_a_token_is_not_seen_again_after_a_failover_that_lost_its_claim(
    beatless: Kit, gate: Gate, postgres: psycopg.Connection
) -> None:
    plan = beatless.app.plans["gated"]
    run = beatless.start_run("gated")
    beatless.drain_outbox_once()
    stored = postgres.execute("SELECT * FROM runs").fetchone()
    columns = [column.name for column in postgres.execute("SELECT * FROM runs").description]
    old = beatless.app.executors.new()
    worker = threading.Thread(target=old.execute, args=(plan, run.run_id, 1))
    worker.start()
    assert gate.inside.wait(60)
    old_lease = next(iter(old.heartbeat._by_id.values()))

    # The standby that takes over has not got the claim.
    before = dict(zip(columns, stored, strict=True))
    postgres.execute("DELETE FROM run_events WHERE seq > 1")
    postgres.execute(
        "UPDATE runs SET last_seq = 1, state = 'queued', attempt = 0, started_at = NULL,"
        " worker = NULL, lease_expires_at = NULL, lease_token = %s",
        (before["lease_token"],),
    )
    postgres.execute("UPDATE dispatches SET state = 'waiting', reason = 'start', attempts = 0")
    connection = beatless.app.executors.connect()
    lease = beatless.app.leases.claim(
        connection, run.run_id, plan="gated", worker="other", first_step="gated", dispatch=1
    )
    assert lease.run.attempt == old_lease.run.attempt
    beatless.app.leases.renew_token(connection, replace(old_lease))
    assert beatless.app.leases.extend(connection, [old_lease]) == [old_lease]
    assert not beatless.app.leases.inspect(connection, old_lease, 0).held

    gate.go.set()
    worker.join(60)

    assert isinstance(gate.said[0], LeaseLost)
    assert beatless.event_types(run.run_id) == ["RunStarted", "StepStarted"]
    beatless.app.journal.settle(
        connection,
        run.run_id,
        lease.token,
        Settlement.ignoring_cancel(Boundary(state=RunState.QUEUED)),
    )
    connection.close()
    old.disconnect()


@pytest.mark.parametrize("before", list(RunState))
def test_no_statement_leads_a_run_where_the_table_of_transitions_does_not(
    beatless: Kit, postgres: psycopg.Connection, before: RunState
) -> None:
    """Every statement that changes a state, on a run in each of them, owned and due."""
    app = beatless.app
    connection = app.executors.connect()
    trace = app.journal.new_event(EventType.DEBUG_TRACE, where="here", data={"name": "x"})

    def settle(after: RunState) -> Callable[[str], object]:
        state, reason = (QUEUED, WAITS) if after is WAITING else (after, "retry")
        boundary = Boundary(events=[trace], state=state, delay_s=3600 * (after is WAITING))
        settlement = Settlement.ignoring_cancel(boundary, reason=reason)
        return lambda run_id: app.journal.settle(connection, run_id, 1, settlement)

    def wake(run_id: str) -> None:
        postgres.execute("INSERT INTO wakes (shard, run_id) VALUES (0, %s)", (run_id,))
        cancels = CancelsChildren(app.journal, {})
        Wakes(app.settings.schema, cancels).wake(connection, ALL_SHARDS)

    statements: dict[str, Callable[[str], object]] = {
        "claim": lambda run_id: app.leases.claim(
            connection, run_id, plan="gated", worker="w", first_step="gated", dispatch=1
        ),
        "append": lambda run_id: app.journal.append(connection, run_id, 1, [trace]),
        "append if free": lambda run_id: app.journal.append(
            connection, run_id, 1, [trace], if_free=True
        ),
        "cancel": beatless.client.cancel_run,
        "wake": wake,
        "deadline": lambda _: Deadlines(app.settings.schema).end(connection, ALL_SHARDS, None),
        **{f"settle {after}": settle(after) for after in RunState},
    }
    reached = set()
    for name, statement in statements.items():
        run_id = beatless.start_run("gated", deadline=7200).run_id
        postgres.execute(
            "UPDATE runs SET state = %s, lease_token = 1,"
            " lease_expires_at = now() - interval '1 s' WHERE run_id = %s",
            (stored(before), run_id),
        )
        if name == "deadline":
            postgres.execute("UPDATE runs SET deadline_at = now() - interval '1 s'")
            postgres.execute("UPDATE dispatches SET deadline_at = now() - interval '1 s'")
        if before is WAITING:
            postgres.execute("UPDATE runs SET not_before = now() + interval '1 h'")
            postgres.execute("UPDATE dispatches SET state = 'delayed', reason = %s", (WAITS,))
        statement(run_id)
        after = beatless.client.get_run(run_id).state
        assert after is before or allowed(before, after)
        reached.add(after)
        postgres.execute("TRUNCATE runs, run_events, run_outbox, dispatches, wakes")
    assert reached | {before} == TRANSITIONS[before] | {before}
    connection.close()
