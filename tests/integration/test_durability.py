"""A worker dies at any point; the run goes on as if nothing had happened."""

import json
import logging
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from beatless import App, LeaseLost, RunState
from beatless.orchestrator.events import EventType
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import new_token
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.outbox.faults import CrashPoints
from beatless.testing import Kit

POINTS = ("claim.committed", "step.before", "step.effect_done", "step.committed", "task.before_ack")


def begun(ledger: Path) -> Counter[str]:
    if not ledger.exists():
        return Counter()
    return Counter(json.loads(line)["step"] for line in ledger.read_text().splitlines())


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_of_any_step_loses_and_doubles_nothing(
    beatless: Kit, subtests: pytest.Subtests, tmp_path: Path, point: str
) -> None:
    once = point in ("claim.committed", "task.before_ack")  # in a run that nothing disturbs
    for nth in (1,) if once else (1, 2, 3):
        with subtests.test(nth=nth):
            ledger = tmp_path / f"ledger-{nth}"
            run = beatless.start_run("ledger", {"ledger": str(ledger)})

            with beatless.crash(at=point, nth=nth):
                beatless.work_until_idle()
            events = beatless.client.events(run.run_id)
            finished = [event.step for event in events if event.type == "StepFinished"]
            before = begun(ledger)
            assert beatless.work_until_idle() <= 1  # the dead worker's lease still holds
            beatless.advance(60)
            beatless.work_until_idle()

            assert beatless.client.get_run(run.run_id).result == "abc"
            after = begun(ledger)
            for step in finished:
                assert after[step] == before[step], f"{step} had finished and was begun again"
            for step in "abc":
                assert after[step] <= 2
            beatless.verify()


def test_the_key_of_a_step_is_the_same_in_every_attempt(beatless: Kit, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    run = beatless.start_run("ledger", {"ledger": str(ledger)})
    with beatless.crash(at="step.effect_done"):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["key"] for line in lines[:2]] == [f"{run.run_id}:a"] * 2


@pytest.mark.parametrize("point", ["step.before", "step.effect_done", "step.committed"])
def test_a_transactional_step_has_its_effect_exactly_once(
    beatless: Kit, postgres: psycopg.Connection, point: str
) -> None:
    table = f"{beatless.app.settings.schema}.effects"
    postgres.execute("CREATE TABLE effects (key text)")
    run = beatless.start_run("transactional", {"table": table})

    with beatless.crash(at=point):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert postgres.execute("SELECT key FROM effects").fetchall() == [(f"{run.run_id}:insert",)]
    postgres.execute("DROP TABLE effects")
    beatless.verify()


def test_a_failed_transactional_step_leaves_no_row(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    postgres.execute("CREATE TABLE effects (key text)")
    table = f"{beatless.app.settings.schema}.effects"
    run = beatless.start_run("transactional", {"table": table, "fail": True})
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.FAILED
    assert postgres.execute("SELECT count(*) FROM effects").fetchone() == (0,)
    postgres.execute("DROP TABLE effects")


@pytest.mark.slow
def test_a_poison_step_ends_as_a_failed_run_with_its_reason(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    for _ in range(5):
        with beatless.crash(at="step.before"):
            beatless.work_until_idle()
        beatless.advance(60)
    beatless.work_until_idle()

    failed = beatless.client.get_run(run.run_id)
    assert failed.state is RunState.FAILED
    assert failed.error["message"] == "step first ended its process 5 times"
    beatless.verify()


def test_a_frozen_worker_that_wakes_up_writes_nothing(
    beatless: Kit, beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="step.before"):  # as if it was stopped there
        beatless.work_until_idle()
    token = 1
    beatless.advance(60)
    beatless.step(run.run_id)  # another worker takes over
    before = beatless.client.events(run.run_id)

    connection = beatless_app.executors.connect()
    event = beatless_app.journal.new_event(
        EventType.DEBUG_TRACE, where="x", data={"name": "zombie"}
    )
    settlement = Settlement.ignoring_cancel(
        Boundary(events=[event], state=RunState.COMPLETED, result="0")
    )
    assert beatless_app.journal.append(connection, run.run_id, token, [event]) is None
    assert beatless_app.journal.settle(connection, run.run_id, token, settlement) is None
    connection.close()

    assert beatless.client.events(run.run_id) == before
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "one two"
    beatless.verify()


def test_a_worker_whose_last_commits_a_failover_has_lost_does_not_go_on_without_them(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, tmp_path: Path
) -> None:
    """Its claim is there still. What had finished in the lost seconds runs again."""
    ledger = tmp_path / "ledger"
    run = beatless.start_run("ledger", {"ledger": str(ledger)})
    original = beatless_app.journal.settle
    settled = 0

    def failed_over(*arguments):
        nonlocal settled
        settled += 1
        if settled == 2:
            postgres.execute("DELETE FROM run_events WHERE run_id = %s AND seq > 2", (run.run_id,))
            postgres.execute("DELETE FROM run_outbox WHERE run_id = %s", (run.run_id,))
            postgres.execute("UPDATE runs SET last_seq = 2 WHERE run_id = %s", (run.run_id,))
        return original(*arguments)

    beatless_app.journal.settle = failed_over
    beatless.work_once()
    assert beatless.client.get_run(run.run_id).last_seq == 2
    beatless.advance(60)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    first, second, *others = begun(ledger).values()
    assert (first, second, {*others}) == (2, 2, {1})
    beatless.verify()


def test_an_executor_that_lost_its_lease_stops_and_says_so(
    beatless: Kit, beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """The step of the first worker lets time pass, and a second worker finish the run."""
    caplog.set_level(logging.WARNING)
    run = beatless.start_run("traces", {"traces": 1})
    second = beatless_app.executors.new()
    original = beatless_app.journal.append

    def overtaken(*arguments, **named):
        beatless_app.journal.append = original
        beatless.advance(60)
        assert second.execute(beatless_app.plans["traces"], run.run_id, 9) is True
        return original(*arguments, **named)

    beatless_app.journal.append = overtaken
    beatless.work_once()
    second.disconnect()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert "lease lost: another worker has the run, nothing was written" in caplog.messages
    beatless.verify()


@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 3000}])
def test_a_heartbeat_keeps_the_lease_and_brings_the_cancel(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    leases, connection = beatless_app.leases, beatless_app.executors.connect()
    lease = leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    heartbeat = Heartbeat(leases, beatless_app.executors.connect)
    heartbeat.hold(lease)

    beatless.advance(2900)
    heartbeat.once(connection)
    left = "extract(epoch FROM {} - clock_timestamp())"
    for table, column in (("runs", "lease_expires_at"), ("dispatches", "due_at")):
        row = postgres.execute(f"SELECT {left.format(column)} FROM {table}").fetchone()
        assert 2000 < row[0] <= 3000
    assert not lease.cancelled

    beatless.client.cancel_run(run.run_id)
    heartbeat.once(connection)
    assert lease.cancelled

    # Its owner renews the token, and has no answer yet; then it is done again.
    lease.next_token = new_token()
    leases.renew_token(connection, replace(lease))
    heartbeat.once(connection)
    assert not lease.lost
    leases.renew_token(connection, lease)
    heartbeat.once(connection)
    assert not lease.lost

    beatless.advance(3001)
    leases.claim(
        connection, run.run_id, plan="two_steps", worker="other", first_step="first", dispatch=2
    )
    heartbeat.once(connection)
    assert lease.lost
    heartbeat.stop()
    connection.close()


@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 0.2}])
def test_the_heartbeat_thread_beats_by_itself(beatless: Kit, beatless_app: App) -> None:
    beats = threading.Semaphore(0)

    class Counting(Heartbeat):
        def once(self, connection) -> None:
            super().once(connection)
            beats.release()

    run = beatless.start_run("two_steps")
    connection = beatless_app.executors.connect()
    lease = beatless_app.leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    heartbeat = Counting(beatless_app.leases, beatless_app.executors.connect)
    heartbeat.hold(lease)
    for _ in range(4):
        assert beats.acquire(timeout=60)
    assert not lease.lost
    heartbeat.release(lease)
    heartbeat.stop()
    connection.close()


def test_a_worker_without_the_step_gives_the_run_back(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("loop", {"turns": 3})
    beatless.step(run.run_id)
    older = beatless_app.plans["two_steps"]

    beatless.executor().execute(older, run.run_id, 1)

    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
    beatless.advance(6)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "stopped after 3"


def test_a_terminated_connection_in_the_middle_of_a_step_is_survived(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """The backend is gone before the append; the executor looks, sees nothing, and repeats."""
    run = beatless.start_run("traces", {"traces": 3})
    original = beatless_app.journal.append

    def cut(connection, *arguments, **options):
        beatless_app.journal.append = original
        pid = connection.info.backend_pid
        postgres.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        return original(connection, *arguments, **options)

    beatless_app.journal.append = cut
    beatless.work_until_idle()

    events = beatless.client.events(run.run_id)
    assert [e.data["number"] for e in events if e.type == "DebugTrace"] == [0, 1, 2]
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_connection_that_died_between_two_runs_costs_no_message(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    pid = beatless.executor().connection().info.backend_pid
    run = beatless.start_run("two_steps")
    postgres.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_claim_that_fails_on_a_new_connection_is_not_made_again(
    beatless: Kit, beatless_app: App
) -> None:
    """Celery tells of it, and the dispatch brings it back: a worker waits for no run."""
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    executor, calls = beatless.executor(), []

    def refuse(*_arguments, **_named):
        calls.append(1)
        raise psycopg.OperationalError("the server is starting up")

    claim, beatless_app.leases.claim = beatless_app.leases.claim, refuse
    for expected in (1, 2):
        with pytest.raises(psycopg.OperationalError, match="starting up"):
            executor.execute(beatless_app.plans["two_steps"], run.run_id, 1)
        assert len(calls) == expected
    beatless_app.leases.claim = claim


@pytest.mark.parametrize("which", ["append", "settle"])
def test_a_commit_whose_answer_was_lost_is_not_repeated(
    beatless: Kit, beatless_app: App, which: str
) -> None:
    """The classic double: the write was committed, and the writer was told that it failed."""
    run = beatless.start_run("traces", {"traces": 3})
    original = getattr(beatless_app.journal, which)

    def lose_answer(*arguments, **options):
        setattr(beatless_app.journal, which, original)
        original(*arguments, **options)
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    setattr(beatless_app.journal, which, lose_answer)
    beatless.work_until_idle()

    events = beatless.client.events(run.run_id)
    assert [e.data["number"] for e in events if e.type == "DebugTrace"] == [0, 1, 2]
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_lost_commit_of_a_transactional_step_is_looked_up(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    postgres.execute("CREATE TABLE effects (key text)")
    table = f"{beatless_app.settings.schema}.effects"
    run = beatless.start_run("transactional", {"table": table})
    original = beatless_app.journal.settle

    def cut(connection, *arguments):
        beatless_app.journal.settle = original
        found = original(connection, *arguments)
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        postgres.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        return found

    beatless_app.journal.settle = cut
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert postgres.execute("SELECT count(*) FROM effects").fetchone() == (1,)
    attempts = [e.attempt for e in beatless.client.events(run.run_id) if e.type == "StepStarted"]
    assert attempts == [1, 1, 1]  # it was not committed: tried again, and not counted
    postgres.execute("DROP TABLE effects")
    beatless.verify()


def test_crash_points_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no crash point 'step\.never'"):
        CrashPoints("step.never@1:kill")
    with pytest.raises(ValueError, match="choose kill, stop or raise"):
        CrashPoints("step.before@1:explode")


def test_a_crash_that_never_happens_fails_the_test(beatless: Kit) -> None:
    with (
        pytest.raises(AssertionError, match=r"step.before was not reached"),
        beatless.crash(at="step.before"),
    ):
        pass


def test_a_lease_lost_error_names_the_run() -> None:
    assert "lease 3 on run r" in str(LeaseLost("r", 3))


def test_a_connection_lost_after_a_transactional_step_does_not_swallow_the_next(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """What the transaction committed is not taken for the write that was interrupted."""
    postgres.execute("CREATE TABLE effects (key text)")
    table = f"{beatless_app.settings.schema}.effects"
    run = beatless.start_run("transactional", {"table": table})
    original = beatless_app.journal.settle
    calls = []

    def cut(connection, *arguments):
        calls.append(connection)
        if len(calls) == 2:
            pid = connection.info.backend_pid
            postgres.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        return original(connection, *arguments)

    beatless_app.journal.settle = cut
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == "done"
    finished = [e.step for e in beatless.client.events(run.run_id) if e.type == "StepFinished"]
    assert finished == ["insert", "after_insert"]
    postgres.execute("DROP TABLE effects")
    beatless.verify()


def test_a_write_whose_answer_was_lost_is_fenced_off(beatless: Kit, beatless_app: App) -> None:
    """It may still wait in the server: after the look it must not happen any more."""
    run = beatless.start_run("two_steps")
    connection = beatless_app.executors.connect()
    leases, journal = beatless_app.leases, beatless_app.journal
    beatless.drain_outbox_once()
    lease = leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    stale = lease.token

    leases.renew_token(connection, lease)

    event = journal.new_event(EventType.DEBUG_TRACE, where="x", data={"name": "late"})
    assert journal.append(connection, run.run_id, stale, [event]) is None
    assert journal.append(connection, run.run_id, lease.token, [event]) is not None
    connection.close()
