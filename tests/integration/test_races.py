"""Two do the same thing at the same time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import psycopg
import pytest

from beatless import App, RunConflict, RunState
from beatless.client import RunRequest
from beatless.errors import StatementTimeout
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.executor import Executor
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.queues import QueueStatements
from beatless.orchestrator.records import Appended, Run
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.outbox.doorbell import Sessions
from beatless.outbox.queries import ALL_SHARDS, Queries
from beatless.testing import Kit
from beatless.transactions import reaching_postgres


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """Call them in threads that start together; their results or exceptions, in order."""
    results: list[Any] = [None] * len(acts)
    start = threading.Barrier(len(acts))

    def work(number: int, act: Callable[[], Any]) -> None:
        start.wait(60)
        try:
            results[number] = act()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.fixture
def executors(beatless_app: App):
    made: list[Executor] = []

    def make() -> Executor:
        made.append(beatless_app.executors.new())
        return made[-1]

    yield make
    for executor in made:
        executor.disconnect()


def test_of_two_workers_with_the_same_message_one_executes(
    beatless: Kit, beatless_app: App, executors
) -> None:
    plan = beatless_app.plans["agents.run"]
    pair = [executors(), executors()]
    for executor in pair:
        executor.connection()
    for _ in range(10):
        run = beatless.start_run("agents.run")
        claimed = at_once(*(partial(executor.execute, plan, run.run_id, 1) for executor in pair))
        assert sorted(claimed) == [False, True]
        assert len(beatless.client.events(run.run_id)) == 13
    beatless.verify()


def test_the_same_key_from_many_callers_is_one_run(beatless: Kit) -> None:
    runs = at_once(*[lambda: beatless.client.start_run("two_steps", {"n": 1}, key="order:1")] * 8)
    assert len({run.run_id for run in runs}) == 1
    beatless.assert_started("two_steps", key="order:1")


def test_the_same_key_with_different_content_is_one_run_and_conflicts(beatless: Kit) -> None:
    found = at_once(
        *(
            lambda n=n: beatless.client.start_run("two_steps", {"n": n}, key="order:1")
            for n in range(6)
        )
    )
    assert [type(one) for one in found].count(RunConflict) == 5
    beatless.assert_started("two_steps", key="order:1")


def until(postgres: psycopg.Connection, blocked_by: int) -> None:
    """Return once a session waits for that one: Postgres announces it nowhere."""
    deadline, pause = monotonic() + 60, threading.Event()
    while not postgres.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid)))",
        (blocked_by,),
    ).fetchone()[0]:
        assert monotonic() < deadline, "nobody waits"
        pause.wait(0.002)


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_a_second_start_waits_for_the_first_ones_transaction(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, ending: str
) -> None:
    """Neither of the two answers may be wrong: it exists, or it does not."""
    first = beatless_app.executors.connect()
    first.autocommit = False
    beatless.client.start_run("two_steps", 1, run_id="same", connection=first)
    found: list[Any] = []

    def start_again() -> None:
        found.extend(at_once(lambda: beatless.client.start_run("two_steps", 2, run_id="same")))

    thread = threading.Thread(target=start_again)
    thread.start()
    until(postgres, blocked_by=first.info.backend_pid)
    getattr(first, ending)()
    thread.join(60)
    first.close()

    if ending == "commit":
        assert isinstance(found[0], RunConflict)
    else:
        assert found[0].input == 2


def deadlock(
    beatless: Kit, postgres: psycopg.Connection, patient: psycopg.Connection, *keys: str
) -> Any:
    """What two starts came to, one of which waits for the session that waits for it."""
    requests = [RunRequest(plan="two_steps", key=key) for key in keys]
    found: list[Any] = []
    beatless.client.start_runs(requests[1:], connection=patient)
    thread = threading.Thread(
        target=lambda: found.extend(at_once(lambda: beatless.client.start_runs(requests)))
    )
    thread.start()
    try:
        until(
            postgres, blocked_by=patient.info.backend_pid
        )  # it has the first and wants the second
        beatless.client.start_runs(requests[:1], connection=patient)
        patient.commit()
    finally:
        patient.rollback()
        thread.join(60)
    return found[0]


def test_a_deadlock_of_two_starts_is_nobodys_problem(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """Postgres ends the client, which has waited for longer, and the client tries again."""
    with closing(beatless_app.executors.connect()) as patient:
        patient.autocommit = False
        for number in range(20):
            keys = f"one-{number}", f"two-{number}"
            try:
                found = deadlock(beatless, postgres, patient, *keys)
            except psycopg.errors.DeadlockDetected:
                continue  # a second went by before it was one, so this session is ended: again
            break

    assert not isinstance(found, Exception), found
    assert tuple(run.key for run in found) == keys
    beatless.verify()


def drained(beatless: Kit, postgres: psycopg.Connection, patient: psycopg.Connection) -> Any:
    """What a drain came to that waits for the session that waits for it."""
    first, second = (beatless.start_run("two_steps").run_id for _ in range(2))
    found: list[Any] = []
    schema = beatless.app.settings.schema
    patient.execute(f"SELECT FROM {schema}.dispatches WHERE run_id = %s FOR UPDATE", (second,))
    thread = threading.Thread(
        target=lambda: found.extend(at_once(lambda: beatless.client.drain_queue("default")))
    )
    thread.start()
    try:
        until(postgres, blocked_by=patient.info.backend_pid)
        patient.execute(f"SELECT FROM {schema}.runs WHERE run_id = %s FOR UPDATE", (first,))
    finally:
        patient.rollback()
        thread.join(60)
    return found[0]


def test_a_deadlock_of_a_drain_is_nobodys_problem(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """Postgres ends the drain, which has waited for longer, and the drain is tried again."""
    with closing(beatless_app.executors.connect()) as patient:
        patient.autocommit = False
        for _ in range(20):
            try:
                found = drained(beatless, postgres, patient)
            except psycopg.errors.DeadlockDetected:
                continue  # a second went by before it was one, so this session is ended: again
            break

    assert found == 2
    assert beatless.client.list_runs() == []


def test_cancel_and_finish_race_to_one_end(beatless: Kit, beatless_app: App, executors) -> None:
    plan = beatless_app.plans["two_steps"]
    executor = executors()
    for _ in range(15):
        run = beatless.start_run("two_steps")
        executed, cancelled = at_once(
            partial(executor.execute, plan, run.run_id, 1),
            partial(beatless.client.cancel_run, run.run_id),
        )
        ended = beatless.client.get_run(run.run_id)
        told = beatless.event_types(run.run_id)
        assert told.count("RunFinished") == 1
        assert told[-1] == "RunFinished"
        assert isinstance(cancelled, Run)
        # A cancel that was accepted holds; one that came too late has left no trace.
        if "CancelRequested" in told:
            assert ended.state is RunState.CANCELLED
        else:
            assert (executed, ended.state) == (True, RunState.COMPLETED)
    beatless.drain_outbox_once()
    beatless.verify()


@pytest.mark.parametrize("first", ["cancel", "end"])
def test_of_a_cancel_and_an_end_the_second_sees_the_first_on_whose_row_it_waited(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, executors, first: str
) -> None:
    journal, run = beatless_app.journal, beatless.start_run("two_steps")
    holder, waiter = (executor.connection() for executor in (executors(), executors()))
    lease = beatless_app.leases.claim(
        holder, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )

    def end(connection: psycopg.Connection[Any]) -> Appended | None:
        def finished(outcome: str) -> NewEvent:
            data = {"outcome": outcome, "result": 1}
            return journal.new_event(EventType.RUN_FINISHED, where="here", data=data)

        settlement = Settlement(
            normal=Boundary(events=[finished("completed")], state=RunState.COMPLETED),
            if_cancelled=Boundary(events=[finished("cancelled")], state=RunState.CANCELLED),
        )
        return journal.settle(connection, run.run_id, lease.token, settlement)

    def cancel(connection: psycopg.Connection[Any]) -> Run:
        with connection.transaction():
            return beatless.client.cancel_run(run.run_id, connection=connection)

    before, after = (cancel, end) if first == "cancel" else (end, cancel)
    found: list[Any] = []
    second = threading.Thread(target=lambda: found.append(after(waiter)))
    pid = waiter.info.backend_pid
    with holder.transaction():
        before(holder)
        second.start()
        deadline = monotonic() + 60
        while not postgres.execute("SELECT cardinality(pg_blocking_pids(%s))", (pid,)).fetchone()[
            0
        ]:
            assert monotonic() < deadline
    second.join(60)

    told = beatless.event_types(run.run_id)[2:]
    state = beatless.client.get_run(run.run_id).state
    if first == "cancel":
        assert found[0].cancelled
        assert (state, told) == (RunState.CANCELLED, ["CancelRequested", "RunFinished"])
    else:
        assert found[0].state is RunState.COMPLETED
        assert (state, told) == (RunState.COMPLETED, ["RunFinished"])


def test_many_cancels_at_once_are_one(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    found = at_once(*[lambda: beatless.client.cancel_run(run.run_id)] * 6)
    assert {one.state for one in found} == {RunState.CANCELLED}
    assert beatless.event_types(run.run_id).count("CancelRequested") == 1
    beatless.verify()


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False], ids=["at_once", "in_turn"])
def test_drains_of_several_relays_publish_everything_and_leave_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, together: bool
) -> None:
    """Of the dispatches, as many as the window has places: without a worker none becomes free.

    Drains that overlap publish some twice, which is harmless: how many is up to the machine.
    """
    beatless.client.start_runs([RunRequest(plan="two_steps")] * 100)
    relays = [beatless_app.relay() for _ in range(3)]
    drains = [relay.drain_once for relay in relays]
    moved = at_once(*drains) if together else [drain() for drain in drains]
    for relay in relays:
        relay.stop()

    window = Queries(beatless_app.settings.schema).window
    assert all(isinstance(count, int) for count in moved), moved
    assert sum(moved) >= 100 + window
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (0,)
    sent = postgres.execute("SELECT count(*) FROM dispatches WHERE state = 'sent'").fetchone()
    assert sent is not None
    assert sent[0] >= window
    assert beatless.work_until_idle() >= 100
    assert len(beatless.client.list_runs(state="completed", limit=200)) == 100
    beatless.verify()


def test_a_client_is_shared_by_threads(beatless: Kit) -> None:
    def session(number: int) -> list[int]:
        run = beatless.client.start_run("two_steps", number, run_id=f"thread-{number}")
        return [event.seq for event in beatless.client.events(run.run_id)]

    assert at_once(*(lambda n=n: session(n) for n in range(8))) == [[1]] * 8


@contextmanager
def holding(app: App, statement: str, *parameters: Any) -> Iterator[psycopg.Connection]:
    """A transaction of somebody else that has done this and stays open."""
    other = app.executors.connect()
    other.autocommit = False
    other.execute(f"SET search_path TO {app.settings.schema}")
    other.execute(statement, parameters)
    try:
        yield other
    finally:
        other.close()


def test_a_worker_that_is_frozen_in_a_claim_holds_up_no_other_claim(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """`pause` waits for it alone: whoever claims meanwhile sees the pause already."""
    run = beatless.start_run("two_steps")
    statements = QueueStatements(beatless_app.settings.schema)
    with beatless_app.executors.connect() as frozen, beatless_app.executors.connect() as waiting:
        frozen.execute("BEGIN")
        frozen.execute(beatless_app.leases.sql["fence"])
        pause = threading.Thread(
            target=statements.await_claims, args=(waiting,), kwargs={"patience": 3600}
        )
        pause.start()
        waits = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
        pid = waiting.info.backend_pid
        while postgres.execute(waits, (pid,)).fetchone()[0] not in ("advisory", "PgSleep"):
            pass
        worker = threading.Thread(target=beatless.work_until_idle)
        worker.start()
        worker.join(60)
        held_up, paused = worker.is_alive(), not pause.is_alive()
        frozen.execute("ROLLBACK")
        worker.join(60)
        pause.join(60)
        assert (held_up, paused) == (False, False)
        assert not pause.is_alive()
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_the_session_of_a_claim_that_does_not_end_is_ended(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    statements = QueueStatements(beatless_app.settings.schema)
    with beatless_app.executors.connect() as frozen:
        frozen.execute("BEGIN")
        frozen.execute(beatless_app.leases.sql["fence"])
        statements.await_claims(postgres, patience=0)
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            frozen.execute("SELECT 1")


def test_a_claim_that_waits_for_a_row_does_not_hold_up_a_pause_for_long(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, executors
) -> None:
    run = beatless.start_run("two_steps")
    plan = beatless_app.plans["two_steps"]
    executor = executors()
    executor.connection()
    lock = "SELECT FROM runs WHERE run_id = %s FOR UPDATE"
    with holding(beatless_app, lock, run.run_id) as other:
        claim = threading.Thread(target=executor.execute, args=(plan, run.run_id, 1))
        claim.start()
        until(postgres, blocked_by=other.info.backend_pid)
        pause = threading.Thread(target=beatless.client.pause_queue, args=("default",))
        pause.start()
        pause.join(60)
        held_up = pause.is_alive()
    claim.join(60)
    pause.join(60)
    assert not held_up, "the claim waits for the row, and the pause for the claim"
    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED

    beatless.client.resume_queue("default")
    assert executor.execute(plan, run.run_id, 1) is True
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_a_worker_that_lost_its_lease_writes_nothing_while_another_executes_its_run(
    beatless: Kit, beatless_app: App, executors
) -> None:
    leases, journal = beatless_app.leases, beatless_app.journal
    run = beatless.start_run("two_steps")
    frozen, second = (executor.connection() for executor in (executors(), executors()))

    def claim(connection: psycopg.Connection[Any]) -> Lease:
        lease = leases.claim(
            connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
        )
        assert lease is not None
        return lease

    def trace(connection: psycopg.Connection[Any], lease: Lease) -> Appended | None:
        event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
        return journal.append(connection, run.run_id, lease.token, [event])

    def fail(connection: psycopg.Connection[Any], lease: Lease) -> Appended | None:
        event = journal.new_event(EventType.RUN_FINISHED, where="here", data={"outcome": "failed"})
        settlement = Settlement.ignoring_cancel(Boundary(events=[event], state=RunState.FAILED))
        return journal.settle(connection, run.run_id, lease.token, settlement)

    lost = claim(frozen)
    beatless.advance(60)
    held = claim(second)
    seq = trace(second, held).last_seq

    assert lost.token != held.token
    assert trace(frozen, lost) is None
    assert fail(frozen, lost) is None
    assert leases.extend(frozen, [lost]) == [lost]
    leases.renew_token(frozen, lost)  # an own commit is in doubt for it
    assert (trace(frozen, lost), fail(frozen, lost)) == (None, None)
    assert trace(frozen, replace(lost, token=lost.next_token)) is None
    status = leases.inspect(frozen, lost, 0)
    assert (status.held, status.committed_since) == (False, False)

    assert leases.extend(second, [held]) == []
    assert trace(second, held).last_seq == seq + 1
    leases.renew_token(second, held)
    assert trace(second, held).last_seq == seq + 2
    assert fail(second, held).last_seq == seq + 3
    assert fail(second, held) is None


@pytest.mark.parametrize("table", ["runs", "dispatches"])
def test_a_heartbeat_keeps_the_leases_of_free_runs_and_waits_for_no_row(
    beatless: Kit, beatless_app: App, table: str
) -> None:
    runs = [beatless.start_run("two_steps") for _ in range(5)]
    leases = beatless_app.leases
    connection = beatless_app.executors.connect()
    claimed = [
        leases.claim(
            connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
        )
        for run in runs
    ]
    held, free = claimed[:4], claimed[4]
    heartbeat = Heartbeat(leases, beatless_app.executors.connect)
    for lease in claimed:
        heartbeat.hold(lease)
    beatless.advance(29)
    lock = f"SELECT FROM {table} WHERE run_id <> %s FOR UPDATE"
    with holding(beatless_app, lock, free.run.run_id) as somebody:
        connection.execute("SET statement_timeout = '20s'")  # it waits for nobody
        assert heartbeat.once(connection) is False
        assert leases.extend(connection, claimed) == held
        somebody.rollback()
    assert not any(lease.lost for lease in claimed)
    left = "SELECT extract(epoch FROM lease_expires_at - clock_timestamp()) > 20 FROM"
    kept = connection.execute(
        f"{left} {beatless_app.settings.schema}.runs WHERE run_id = %s", [free.run.run_id]
    )
    assert kept.fetchone() == (True,)
    assert heartbeat.once(connection) is True
    assert connection.execute("SHOW lock_timeout").fetchone() == ("0",)
    heartbeat.stop()
    connection.close()


def test_a_removal_takes_what_was_appended_while_it_waited(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    journal, connection = beatless_app.journal, beatless_app.executors.connect()
    lease = beatless_app.leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    connection.autocommit = False
    event = journal.new_event(EventType.DEBUG_TRACE, where="x", data={"name": "late"})
    journal.append(connection, run.run_id, lease.token, [event])
    thread = threading.Thread(
        target=lambda: beatless.client.obliterate_queue("default", force=True)
    )
    thread.start()
    until(postgres, blocked_by=connection.info.backend_pid)
    connection.commit()
    thread.join(60)
    connection.close()

    left = postgres.execute(
        "SELECT (SELECT count(*) FROM run_events), (SELECT count(*) FROM run_outbox)"
    ).fetchone()
    assert left == (0, 0)
    beatless.verify()


def test_a_run_that_goes_back_to_wait_behind_a_resume_rings(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """The claim still saw the pause; the ring of the resume came before the run waits again."""
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    beatless.client.pause_queue("default")
    connection = beatless_app.executors.connect()
    with Sessions(beatless_app.queries, beatless_app.direct_connection) as sessions:
        sessions.doze(ALL_SHARDS)
        while not sessions.granted():
            sessions.wait(60)

        claimed = beatless_app.leases.claim(
            connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
        )

        assert claimed is None
        assert postgres.execute("SELECT state FROM dispatches").fetchone() == ("waiting",)
        sessions.wait(60)
        assert sessions.rung
    connection.close()


def test_a_crashed_run_whose_message_is_lost_goes_on_in_a_paused_queue(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="step.before"):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.client.pause_queue("default")
    for statement in ("SELECT", beatless_app.queries.resend_unclaimed_sql):
        beatless.drain_outbox_once()  # sent again, and lost with the broker
        beatless_app.queues._empty_broker("default", delete=True)
        postgres.execute(statement, {"shards": list(ALL_SHARDS)})
        beatless.advance(60)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_a_run_that_is_taken_over_is_among_the_running_ones(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="step.before"):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.drain_outbox_once()
    assert postgres.execute("SELECT state, reason FROM dispatches").fetchone() == ("sent", "lease")

    assert [one.run_id for one in beatless.client.list_runs(state="running")] == [run.run_id]
    # Its worker was only slow, and the takeover comes to nothing in a queue that was paused.
    postgres.execute("UPDATE runs SET lease_expires_at = now() + interval '1 hour'")
    beatless.client.pause_queue("default")
    beatless.work_once()

    assert postgres.execute("SELECT state, reason FROM dispatches").fetchone() == ("sent", "lease")
    assert [one.run_id for one in beatless.client.list_runs(state="running")] == [run.run_id]


def test_a_caller_whose_statement_is_ended_by_a_limit_hears_that_and_not_that_postgres_is_gone(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    lock = "SELECT FROM runs WHERE run_id = %s FOR UPDATE"
    with beatless_app.engine.begin() as caller, holding(beatless_app, lock, run.run_id):
        caller.exec_driver_sql("SET LOCAL lock_timeout = '10ms'")
        with (
            pytest.raises(StatementTimeout, match=r"ended the statement.*lock timeout.*try again"),
            reaching_postgres(beatless_app.settings.schema),
        ):
            beatless.client.cancel_run(run.run_id, connection=caller)


def test_two_retries_of_all_failed_runs_at_once_retry_each_once(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("half")
    beatless.work_until_idle()
    first = beatless_app.executors.connect()
    first.autocommit = False
    first.execute(
        f"SELECT FROM {beatless_app.settings.schema}.runs WHERE run_id = %s FOR UPDATE",
        (run.run_id,),
    )
    new = beatless.client.retry_run(run.run_id, connection=first)
    found: list[Any] = []
    second = threading.Thread(target=lambda: found.append(beatless.client.retry_failed()))
    second.start()
    until(postgres, first.info.backend_pid)
    first.commit()
    second.join(60)
    first.close()

    ((started, refused),) = found
    assert started == []
    assert [str(reason) for reason in refused] == [
        f"run {run.run_id} cannot be retried: it has been retried meanwhile"
    ]
    retries = [one.run_id for one in beatless.client.list_runs() if one.retry_of == run.run_id]
    assert retries == [new.run_id]
