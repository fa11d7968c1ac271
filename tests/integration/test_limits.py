"""Steps and runs that take too long end, whatever their bodies do."""

import faulthandler
import logging
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    BadRequest,
    Event,
    LeaseLost,
    Plan,
    RunState,
    StepContext,
    StepTimeout,
    step,
)
from beatless.local.child import Child
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.observer import Claimed
from beatless.orchestrator.watchdog import HANDLED, Attempt, Watchdog
from beatless.outbox.observer import Signal
from beatless.testing import Kit
from tests.plans import ALL, UNLIMITED
from tests.valkeys import until

APP = "tests.plans:app"


def failures(events: list[Event]) -> list[dict[str, Any]]:
    return [event.data["error"] for event in events if event.type == "StepFailed"]


HELD, LET_GO = threading.Event(), threading.Event()


@step(name="late", timeout=0.2)
def wait_to_be_let_go(_ctx: StepContext) -> None:
    LET_GO.wait(60)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    HELD.clear(), LET_GO.clear()
    return [*ALL, Plan("two_late", [wait_to_be_let_go])]


@pytest.fixture
def started(tmp_path: Path) -> Path:
    return tmp_path / "started"


class TestInWorkerProcesses:
    @pytest.fixture
    def beatless_settings(self) -> dict[str, float]:
        """Leases that outlive the test: nothing here waits for one to run out."""
        return {"lease_seconds": 300, "redispatch_seconds": 300}

    @pytest.fixture
    def finish(self, beatless: Kit) -> Callable[[Child, str], None]:
        """Makes the attempt after one that hung, with time: its worker goes on, then is killed."""

        def go_on(worker: Child, run_id: str) -> None:
            beatless.wait_for_event(run_id, "StepFailed")
            other = beatless.start_run("two_steps")
            assert beatless.wait_for_run_completion(other.run_id).result == "one two"
            worker.kill()
            beatless.advance(10)
            for plan in UNLIMITED:
                beatless.app.plans[plan.name] = plan
            while beatless.step(run_id):
                pass

        return go_on

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "how",
        [
            "trace",
            pytest.param("swallow", marks=pytest.mark.long),
            pytest.param("wait", marks=pytest.mark.long),
            pytest.param("spin", marks=pytest.mark.long),
        ],
    )
    def test_an_attempt_that_hangs_has_failed_and_the_next_one_follows(
        self, beatless: Kit, started: Path, how: str, finish: Callable[[Child, str], None]
    ) -> None:
        beatless.relay.start()
        worker = beatless.worker_process(APP)
        run = beatless.start_run("limited", {"started": str(started), "how": how})
        finish(worker, run.run_id)

        assert beatless.wait_for_run_completion(run.run_id).result == "one"

        (error,) = failures(beatless.client.events(run.run_id))
        assert error["type"] == "StepTimeout"
        assert error["message"] == "step hangs took longer than its timeout of 0.5 s"
        # Where it was; a machine may let its time pass before it is there.
        assert "in hang" in error["traceback"] or not started.exists()
        assert beatless.client.events(run.run_id)[-1].data["result"] == "one"
        beatless.verify()

    @pytest.mark.long
    def test_attempts_that_all_hang_end_as_a_failed_run(self, beatless: Kit, started: Path) -> None:
        beatless.relay_process(APP)
        beatless.worker_process(APP)
        run = beatless.start_run("limited", {"started": str(started), "hangs": 9, "how": "swallow"})
        beatless.wait_for_event(run.run_id, "StepFailed")
        beatless.advance(10)

        failed = beatless.wait_for_run_completion(run.run_id)

        assert failed.state is RunState.FAILED
        assert failed.error["type"] == "StepTimeout"
        assert len(failures(beatless.client.events(run.run_id))) == 2
        beatless.verify()

    @pytest.mark.long
    @pytest.mark.parametrize("how", ["query", "swallow"])
    def test_a_transaction_that_hangs_leaves_nothing(
        self,
        beatless: Kit,
        postgres: psycopg.Connection,
        started: Path,
        how: str,
        finish: Callable[[Child, str], None],
    ) -> None:
        table = f"{beatless.app.settings.schema}.effects"
        postgres.execute("CREATE TABLE effects (key text)")
        beatless.relay_process(APP)
        worker = beatless.worker_process(APP)
        run = beatless.start_run(
            "limited_transaction", {"table": table, "started": str(started), "how": how}
        )
        finish(worker, run.run_id)

        assert beatless.wait_for_run_completion(run.run_id).result == 2

        assert postgres.execute("SELECT count(*) FROM effects").fetchone() == (1,)
        postgres.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep(120)%' AND pid <> pg_backend_pid()"
            " AND pid IN (SELECT pid FROM pg_locks WHERE relation = 'effects'::regclass)"
        )
        postgres.execute("DROP TABLE effects")
        beatless.verify()

    @pytest.mark.long
    def test_a_run_past_its_deadline_fails_in_the_middle_of_a_step(
        self, beatless: Kit, started: Path
    ) -> None:
        beatless.relay_process(APP)
        beatless.worker_process(APP)
        for seconds in (1, 5, 25, 125):  # more for a machine that takes longer to begin
            run = beatless.start_run("endless", {"started": str(started)}, deadline=seconds)
            failed = beatless.wait_for_run_completion(run.run_id)
            assert failed.state is RunState.FAILED
            assert failed.error["type"] == "DeadlineExceeded"
            if started.exists():
                break

        (failure,) = failures(beatless.client.events(run.run_id))
        assert failure["type"] == "DeadlineExceeded"
        beatless.verify()

    @pytest.mark.parametrize("how", ["swallow", pytest.param("wait", marks=pytest.mark.long)])
    def test_a_cancel_ends_a_marked_step_that_does_not_look_for_it(
        self, beatless: Kit, started: Path, how: str
    ) -> None:
        beatless.relay.start()
        beatless.worker_process(APP)
        run = beatless.start_run("terminable", {"started": str(started), "how": how})
        stream = beatless.client.stream_run(run.run_id, timeout=300)
        while next(stream).type != "StepStarted":
            pass

        beatless.client.cancel_run(run.run_id)

        assert [event.type for event in stream] == ["CancelRequested", "StepFailed", "RunFinished"]
        assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
        beatless.verify()

    @pytest.mark.long
    def test_a_run_whose_step_was_ended_by_a_cancel_is_compensated(
        self, beatless: Kit, started: Path
    ) -> None:
        beatless.relay_process(APP)
        beatless.worker_process(APP)
        run = beatless.start_run("undeaf", {"started": str(started), "how": "swallow"})
        stream = beatless.client.stream_run(run.run_id, timeout=300)
        while next(stream).step != "deaf":
            pass

        beatless.client.cancel_run(run.run_id)

        assert [event.type for event in stream] == [
            "CancelRequested",
            "StepFailed",
            "StepStarted",
            "StepFinished",
            "RunFinished",
        ]
        assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
        beatless.verify()

    @pytest.mark.long
    def test_in_the_threads_pool_an_attempt_that_hangs_is_fenced(
        self, beatless: Kit, started: Path, finish: Callable[[Child, str], None]
    ) -> None:
        beatless.relay_process(APP)
        worker = beatless.worker_process(APP, concurrency=2, arguments=["--", "--pool", "threads"])
        run = beatless.start_run("limited", {"started": str(started), "how": "wait"})
        beatless.wait_for_event(run.run_id, "StepFailed")
        assert worker.alive
        finish(worker, run.run_id)  # its thread still hangs

        assert beatless.wait_for_run_completion(run.run_id).result == "one"

        (error,) = failures(beatless.client.events(run.run_id))
        assert error["type"] == "StepTimeout"
        beatless.verify()


def test_a_body_that_comes_back_too_late_has_written_nothing(
    beatless: Kit, caplog: pytest.LogCaptureFixture, started: Path
) -> None:
    """In this process nothing can end it; it looks for a cancel and learns that it was fenced."""
    caplog.set_level(logging.WARNING)
    run = beatless.start_run("late", {"started": str(started)})

    beatless.work_once()

    assert beatless.event_types(run.run_id) == [
        "RunStarted",
        "StepStarted",
        "StepFailed",
        "RunFinished",
    ]
    assert beatless.client.get_run(run.run_id).error["type"] == "StepTimeout"
    assert "step ended by force" in caplog.messages
    beatless.verify()


def test_a_watchdog_that_cannot_reach_postgres_tries_again(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    connection = beatless.app.executors.connect()
    lease = beatless.app.leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    connection.close()
    tries = []

    def settle(_connection: psycopg.Connection, reason: Exception) -> bool:
        tries.append(reason)
        if len(tries) == 1:
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return True

    watchdog = Watchdog(beatless.app.leases, beatless.app.executors.connect, own_process=False)
    late = StepTimeout("first", 0.1)
    attempt = Attempt(
        lease=lease,
        ends_at=monotonic(),
        late=late,
        terminate_on_cancel=False,
        interruptible=True,
        settle=settle,
    )

    def body() -> None:
        while not lease.lost:
            threading.Event().wait(0.01)

    with pytest.raises(LeaseLost):
        watchdog.call(attempt, body)
    watchdog.stop()
    assert tries == [late, late]


def test_a_row_that_somebody_holds_keeps_the_watchdog_from_no_other_run(
    beatless: Kit, beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two runs in one process one is held: the other ends at its limit, and this one later."""
    plan = beatless_app.plans["two_late"]
    runs = held, free = beatless.start_run("two_late"), beatless.start_run("two_late")
    beatless.drain_outbox_once()

    def hold(signal: Signal) -> None:  # before its body begins, and with it the time that it has
        if isinstance(signal, Claimed):
            beatless.client.cancel_run(held.run_id, connection=somebody)
            HELD.set()

    executors = [beatless_app.executors.new(observer=hold), beatless_app.executors.new()]
    threads = [
        threading.Thread(target=executor.execute, args=(plan, run.run_id, 1))
        for executor, run in zip(executors, runs, strict=True)
    ]
    with beatless_app.executors.connect() as somebody:
        somebody.autocommit = False
        threads[0].start()
        assert HELD.wait(60)
        threads[1].start()
        beatless.wait_for_event(free.run_id, "StepFailed")
        assert beatless.event_types(held.run_id) == ["RunStarted", "StepStarted"]
        somebody.commit()

    assert beatless.wait_for_run_completion(held.run_id).state is RunState.CANCELLED
    LET_GO.set()
    for thread, executor in zip(threads, executors, strict=True):
        thread.join(60)
        executor.disconnect()
    assert caplog.text.count("it was here") <= 2  # told once each, however often it was tried
    beatless.verify()


def test_an_attempt_that_has_just_ended_is_not_told_to_end(beatless: Kit) -> None:
    """Its outcome stands, and in a process of its own nothing would handle the signal any more."""
    watchdog = Watchdog(beatless.app.leases, beatless.app.executors.connect, own_process=False)
    attempt = Attempt(
        lease=Lease(run=None, token=1),
        ends_at=monotonic() + 3600,
        late=StepTimeout("first", 0.1),
        terminate_on_cancel=False,
        interruptible=True,
        settle=lambda _connection, _reason: True,
    )
    assert watchdog.call(attempt, lambda: "the outcome") == "the outcome"

    watchdog._interrupt(attempt, attempt.late)  # it had decided a moment before

    assert attempt.reason is None
    watchdog.stop()


def threads() -> set[Path]:
    """Those of this process, also such as are none of Python's."""
    return set(Path("/proc/self/task").iterdir())


@pytest.mark.parametrize("transactional", [False, True])
def test_a_body_leaves_neither_a_timer_nor_handlers_of_signals_to_the_next(
    beatless: Kit, transactional: bool
) -> None:
    """In a process of its own, as this is taken for one: a timer would end it in the next run."""
    waiting: list[set[Path]] = []
    before = {number: signal.getsignal(number) for number in HANDLED}
    watchdog = Watchdog(beatless.app.leases, beatless.app.executors.connect, own_process=True)

    def body() -> str:
        for number in HANDLED:
            signal.signal(number, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 3600, 3600)
        others = threads()
        faulthandler.dump_traceback_later(3600, exit=True)
        waiting.append(threads() - others)
        return "the outcome"

    try:
        for _ in range(2):
            attempt = Attempt(
                lease=Lease(run=None, token=1),
                ends_at=None,
                late=None,
                terminate_on_cancel=False,
                interruptible=not transactional,
                settle=lambda _connection, _reason: True,
            )
            assert watchdog.call(attempt, body) == "the outcome"
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
            assert {number: signal.getsignal(number) for number in HANDLED} == before
            until(lambda: not waiting[-1] & threads())
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        watchdog.stop()


def test_a_deadline_is_looked_at_before_a_run_is_begun(beatless: Kit) -> None:
    run = beatless.start_run("two_steps", deadline=60)
    assert run.deadline_at is not None
    beatless.advance(61)

    beatless.work_until_idle()

    assert beatless.event_types(run.run_id) == ["RunStarted", "RunFinished"]
    assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"
    beatless.verify()


def test_a_deadline_is_looked_at_when_a_dead_workers_run_is_taken_over(beatless: Kit) -> None:
    run = beatless.start_run("two_steps", deadline=60)
    with beatless.crash(at="step.committed"):
        beatless.work_until_idle()
    beatless.advance(61)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"
    beatless.verify()


def test_a_run_that_waits_for_its_next_attempt_ends_at_its_deadline(beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 2}, deadline=timedelta(seconds=5))
    beatless.work_until_idle()
    waiting = beatless.client.get_run(run.run_id)
    assert waiting.not_before == waiting.deadline_at  # the attempt would be 10 s later

    beatless.advance(5)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"
    beatless.verify()


def test_a_run_that_ends_in_time_has_its_result(beatless: Kit) -> None:
    run = beatless.start_run("two_steps", deadline=60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "one two"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 0}, "deadline is 0 s from now, before the run may start"),
        ({"deadline": -1}, "deadline is -1, which is not 0 seconds to ten years"),
        ({"deadline": 5, "delay": 5}, "deadline is 5 s from now, before the run may start"),
    ],
)
def test_a_deadline_that_cannot_be_met_is_refused(beatless: Kit, options, message) -> None:
    with pytest.raises(BadRequest, match=message):
        beatless.start_run("two_steps", **options)
