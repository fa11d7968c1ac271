"""What a wait costs a worker and a relay: statements and round trips, counted on the wire."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
import pytest

from beatless import Plan, RunContext, StepContext, plan, sleep, step, wait
from beatless.orchestrator import function_execution
from beatless.orchestrator.children import CancelsChildren
from beatless.orchestrator.function_boundaries import MAX_TAKEOVERS
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.read_ahead import ReadAhead
from beatless.orchestrator.wakes import Wakes
from beatless.outbox.async_publisher import Batch
from beatless.outbox.drain import Drain
from beatless.outbox.faults import CrashPoints, SimulatedCrash
from beatless.outbox.message import SHARDS
from beatless.outbox.task_lane import TaskLane
from beatless.testing import Kit
from tests.integration.test_races import until as until_blocked
from tests.integration.test_run_cost import Costs, costs

__all__ = ["costs"]

HOUR_S = 3600.0


@step
def begin(ctx: StepContext) -> str:
    return "begun"


def naps(run: RunContext[Any]) -> Any:
    run.sleep(HOUR_S)
    return run.step(begin)


def hears(run: RunContext[Any]) -> Any:
    run.wait("go")
    return run.step(begin)


PLANS = [
    plan("naps")(naps),
    plan("hears")(hears),
    Plan("naps_in_list", [sleep(seconds=HOUR_S), begin]),
    Plan("hears_in_list", [wait("go"), begin]),
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return PLANS


def execute(kit: Kit, run_id: str, dispatch: int) -> None:
    found = kit.app.plans[kit.client.get_run(run_id).plan]
    assert kit.executor().execute(found, run_id, dispatch)


def wake(kit: Kit, run_id: str, costs: Costs) -> None:
    """Have a run due that is parked."""
    if "hears" in kit.client.get_run(run_id).plan:
        kit.signal(run_id, "go")
        kit.drain_outbox_once()
    else:
        kit.advance(HOUR_S)
    costs()


def measured(kit: Kit, costs: Costs, name: str) -> tuple[Counter[str], Counter[str]]:
    """The cost of parking a run, and of going on; on connections that have done both before."""
    for _ in range(7):  # from the sixth time on statements are prepared
        run = kit.start_run(name)
        costs()
        execute(kit, run.run_id, 1)
        parking = costs()
        assert kit.client.get_run(run.run_id).state == "waiting"
        wake(kit, run.run_id, costs)
        execute(kit, run.run_id, 2)
        going_on = costs()
        assert kit.client.get_run(run.run_id).result == "begun"
        kit.verify()
    return parking, going_on


@pytest.mark.parametrize(("name", "reads"), [("naps", 0), ("naps_in_list", 1)])
def test_a_sleep_is_one_round_trip_behind_its_claim(
    beatless: Kit, costs: Costs, name: str, reads: int
) -> None:
    """A run of a list reads its journal where its claim begins no step."""
    parking, going_on = measured(beatless, costs, name)
    assert parking == Counter(statements=4 + reads, answers=2 + reads)
    assert going_on == Counter(statements=6, answers=3)


@pytest.mark.parametrize("name", ["hears", "hears_in_list"])
def test_a_run_that_got_a_signal_goes_on_with_two_commits_beside_its_claim(
    beatless: Kit, costs: Costs, name: str
) -> None:
    """The claim has taken in the signal and read the journal: in one round trip."""
    _, going_on = measured(beatless, costs, name)
    assert going_on == Counter(statements=6, answers=3)


def test_a_woken_run_is_sent_by_the_look_that_has_woken_it(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the next one, which the relay takes once it has looked for events and due times."""
    run = beatless.start_run("hears")
    beatless.work_until_idle()
    beatless.signal(run.run_id, "go")
    sent: list[list[str]] = []
    take_step, fetch = Drain.step, TaskLane.fetch

    def begun(drain: Drain, *shards: Any, **options: Any) -> int:
        sent.append([])
        return take_step(drain, *shards, **options)

    def fetched(lane: TaskLane, *answers: Any) -> Batch:
        batch = fetch(lane, *answers)
        sent[-1] += [message.run_id for message in batch.messages]
        return batch

    monkeypatch.setattr(Drain, "step", begun)
    monkeypatch.setattr(TaskLane, "fetch", fetched)
    beatless.drain_outbox_once()
    assert sent[0] == [run.run_id]
    assert [run_ids for run_ids in sent[1:] if run_ids] == []


def test_runs_of_an_async_worker_are_read_with_their_common_claim(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [beatless.start_run(name).run_id for name in beatless.app.plans]
    beatless.work_until_idle()
    for run_id in runs:
        if "hears" in beatless.client.get_run(run_id).plan:
            beatless.signal(run_id, "go")
    beatless.drain_outbox_once()
    beatless.advance(HOUR_S)
    read: list[str] = []
    checkpoint_page = Journal.checkpoint_page

    def noted(journal: Journal, connection: Any, run_id: str, **options: Any) -> Any:
        read.append(run_id)
        return checkpoint_page(journal, connection, run_id, **options)

    monkeypatch.setattr(Journal, "checkpoint_page", noted)
    executor = beatless.app.executors.begin_concurrent()
    for run_id in runs:
        found = beatless.app.plans[beatless.client.get_run(run_id).plan]
        executor.spawn(partial(executor.execute, found, run_id, 2))
    executor.start()
    executor.stop()

    assert read == []
    assert {beatless.client.get_run(run_id).result for run_id in runs} == {"begun"}
    beatless.verify()


@pytest.mark.parametrize("signalled", [False, True])
def test_runs_of_an_async_worker_go_to_sleep(beatless: Kit, signalled: bool) -> None:
    runs = [beatless.start_run(name).run_id for name in ("naps", "naps_in_list")]
    for run_id in runs if signalled else []:
        beatless.signal(run_id, "go")
    executor = beatless.app.executors.begin_concurrent()
    for run_id in runs:
        found = beatless.app.plans[beatless.client.get_run(run_id).plan]
        executor.spawn(partial(executor.execute, found, run_id, 1))
    executor.start()
    executor.stop()

    assert {beatless.client.get_run(run_id).state for run_id in runs} == {"waiting"}
    for run_id in runs:
        assert beatless.event_types(run_id).count("SignalReceived") == signalled
    beatless.advance(HOUR_S)
    beatless.work_until_idle()
    assert {beatless.client.get_run(run_id).result for run_id in runs} == {"begun"}
    beatless.verify()


@pytest.mark.parametrize("name", ["naps", "naps_in_list"])
def test_a_sleep_whose_run_is_claimed_before_its_end_goes_on_to_that(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    """It may be due a moment before, as both times are read while the start is written."""
    run = beatless.start_run(name)
    beatless.work_until_idle()
    due = "SELECT due_at - now() > interval '1 s' FROM dispatches"
    assert postgres.execute(due).fetchall() == [(True,)]
    postgres.execute("UPDATE runs SET not_before = now()")
    execute(beatless, run.run_id, 2)
    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.attempt) == ("waiting", 2)
    assert postgres.execute(due).fetchall() == [(True,)]
    beatless.advance(HOUR_S)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "begun"
    assert beatless.event_types(run.run_id).count("WaitStarted") == 1
    beatless.verify()


@pytest.mark.parametrize("name", ["naps", "naps_in_list"])
def test_a_signal_that_came_before_a_sleep_is_in_the_journal_before_it_ends(
    beatless: Kit, name: str
) -> None:
    run = beatless.start_run(name)
    beatless.signal(run.run_id, "go")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    assert "SignalReceived" in beatless.event_types(run.run_id)
    beatless.advance(HOUR_S)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "begun"
    beatless.verify()


@pytest.mark.parametrize("name", ["naps", "naps_in_list"])
def test_a_signal_that_comes_while_a_run_waits_for_its_row_to_sleep_is_in_the_journal(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    """A relay that looks meanwhile leaves it to the worker, which has the run until then."""
    run = beatless.start_run(name)
    claimed, held = threading.Event(), threading.Event()

    class Gate(CrashPoints):
        def reach(self, point: str) -> None:
            if point == "wait.before":
                claimed.set()
                assert held.wait(60)

    executor = beatless.executor()
    executor.faults = Gate()
    relay = postgres
    with ThreadPoolExecutor(1) as pool, beatless.app.direct_connection() as look:
        worker = pool.submit(execute, beatless, run.run_id, 1)
        try:
            assert claimed.wait(60)
            with relay.transaction():
                relay.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (run.run_id,))
                held.set()
                until_blocked(look, blocked_by=relay.info.backend_pid)
                beatless.signal(run.run_id, "go")
                cancels = CancelsChildren(beatless.app.journal, {})
                Wakes(beatless.app.settings.schema, cancels).wake(relay, range(SHARDS))
        finally:
            held.set()
        worker.result(60)
    executor.faults = CrashPoints()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    assert "SignalReceived" in beatless.event_types(run.run_id)
    beatless.verify()
    beatless.advance(HOUR_S)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "begun"


@pytest.mark.parametrize("name", ["hears", "hears_in_list"])
def test_a_signal_that_is_there_as_a_run_would_begin_its_wait_ends_it(
    beatless: Kit, name: str
) -> None:
    """The start of the wait is not written with the parking then."""
    run = beatless.start_run(name)
    beatless.signal(run.run_id, "go")
    beatless.work_until_idle()
    found = beatless.client.get_run(run.run_id)
    assert (found.result, found.attempt) == ("begun", 1)
    assert beatless.event_types(run.run_id) == [
        "RunStarted",
        *("SignalReceived", "WaitStarted", "WaitFinished", "StepStarted", "StepFinished"),
        "RunFinished",
    ]
    beatless.verify()


@pytest.mark.parametrize("counted", [True, False])
def test_a_claim_takes_a_run_whose_journal_it_cannot_read(
    beatless: Kit, postgres: psycopg.Connection, counted: bool
) -> None:
    """As only SQL can have written it: who executes the run meets the error, and says so.

    Its row may not know of its last event: no signal is to be taken in then.
    """
    run = beatless.start_run("naps")
    beatless.work_until_idle()
    beatless.advance(HOUR_S)
    restarted = '{"signals_from": "no number"}' if counted else '{"signals_from": 1}'
    postgres.execute(
        "INSERT INTO run_events (run_id, seq, ts, type, source, data)"
        " SELECT run_id, last_seq + 1, now(), 'RunRestarted', 'worker', %s FROM runs",
        (restarted,),
    )
    if counted:
        postgres.execute("UPDATE runs SET last_seq = last_seq + 1")
    else:
        beatless.signal(run.run_id, "go")
    app = beatless.app
    with app.direct_connection() as connection:
        lease = app.leases.claim(
            connection,
            run.run_id,
            plan="naps",
            worker="w",
            first_step=None,
            dispatch=2,
            ahead=ReadAhead(app.journal, app.leases.inbox).send,
        )
    assert lease is not None
    assert lease.ahead == ()


def test_what_was_read_ahead_is_read_again_once_more_was_written(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim after one that died notes that first, and counts itself."""
    calls: list[int] = []

    def die(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise SimulatedCrash("as the function is called")

    run = beatless.start_run("naps")
    beatless.work_until_idle()
    beatless.advance(HOUR_S)
    monkeypatch.setattr(function_execution, "call_function", die)
    for _ in range(MAX_TAKEOVERS):
        with pytest.raises(SimulatedCrash):
            beatless.work_until_idle()
        beatless.forget_worker()
        beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    assert (error["type"], len(calls)) == ("PlanCrashed", MAX_TAKEOVERS)
