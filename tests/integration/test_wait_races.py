"""Each race of a wait, forced: against its time-out, a cancel, a claim, the parking, a deadline."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy

from beatless import (
    Goto,
    Plan,
    RunContext,
    RunEnded,
    StepContext,
    days,
    plan,
    step,
    wait,
)
from beatless.orchestrator.boundaries import Boundaries
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.progress import Progress
from beatless.orchestrator.wakes import BATCH
from beatless.outbox.faults import CrashPoints, SimulatedCrash
from beatless.outbox.message import shard_of
from beatless.testing import Kit
from tests.integration.test_queues import blocking

CALLS: list[str] = []


@step
def reserve(ctx: StepContext) -> str:
    CALLS.append(ctx.key)
    return "reserved"


@step
def ship(ctx: StepContext) -> Any:
    CALLS.append(ctx.key)
    return ctx.results["paid"].data


@step
def release(ctx: StepContext) -> str:
    CALLS.append(ctx.key)
    return "released"


@step
def undo(ctx: StepContext) -> str:
    CALLS.append(ctx.key)
    return "undone"


PAYS = [reserve, wait("paid", timeout=days(3), on_timeout=Goto("release")), ship, release]
THREE_DAYS_S = 3 * 86_400.0


def pays(run: RunContext[Any]) -> Any:
    run.step(reserve)
    if run.wait("paid", timeout=days(3)) is not None:
        run.step(ship)
    return run.step(release)


async def waits_twice(run: RunContext[Any]) -> Any:
    await run.wait("paid")
    await run.wait("paid", name="again")
    return await run.step(ship)


@pytest.fixture(params=["list", "function"])
def beatless_plans(request: pytest.FixtureRequest) -> list[Plan]:
    CALLS.clear()
    if request.param == "function":
        return [
            plan("pays")(pays),
            plan("undone", on_cancel=undo)(pays),
            plan("two")(waits_twice),
        ]
    return [
        Plan("pays", PAYS),
        Plan("undone", PAYS, on_cancel=undo),
        Plan("two", [wait("paid"), wait("paid", name="again"), ship]),
    ]


class Acts(CrashPoints):
    """Does something once, at a point of the executor."""

    def __init__(self, point: str, act: Callable[[], object]) -> None:
        super().__init__()
        self._point = point
        self._act: Callable[[], object] | None = act

    def reach(self, point: str) -> None:
        if point == self._point and self._act is not None:
            act, self._act = self._act, None
            act()


def at(kit: Kit, point: str, act: Callable[[], object]) -> None:
    """Let the kit's worker do something when it reaches this point."""
    kit.executor().faults = Acts(point, act)


def outcomes(kit: Kit, run_id: str) -> list[str]:
    """Those of the run's waits."""
    events = kit.client.events(run_id)
    return [(e.data or {})["outcome"] for e in events if e.type == "WaitFinished"]


def test_a_signal_that_comes_as_the_run_is_parked_ends_the_wait(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    at(beatless, "wait.before", lambda: beatless.signal(run.run_id, "paid", 12))

    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.result, found.attempt) == ("completed", "released", 1)
    assert outcomes(beatless, run.run_id) == ["received"]
    beatless.verify()


def leased(kit: Kit, run_id: str) -> Lease:
    """The lease of a run whose wait has begun, as its worker has it before it looks."""
    with kit.crash("wait.before"):
        kit.work_once()
    with psycopg.connect(kit.app.settings.database_url.replace("+psycopg", "")) as connection:
        connection.execute(f"SET search_path TO {kit.app.settings.schema}")
        row = connection.execute(
            "SELECT lease_token FROM runs WHERE run_id = %s", (run_id,)
        ).fetchone()
    assert row is not None
    return Lease(run=kit.client.get_run(run_id), token=row[0])


def test_a_signal_after_the_look_finds_the_run_parked_and_wakes_it(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("pays")
    lease = leased(beatless, run.run_id)
    app = beatless.app
    parked = Boundaries(app.plans["pays"], run.run_id, max_event_bytes=1000).parked(
        Progress(step=None)
    )
    with postgres.transaction():
        look = app.leases.inbox.take_in(postgres, run.run_id, lease.token, seen=0, waits=[4])
        assert look is not None
        assert not look.events
        beatless.signal(run.run_id, "paid", 12)  # waits for no lock
        beatless.drain_outbox_once()
        (left,) = postgres.execute("SELECT count(*) FROM wakes").fetchone() or (0,)
        assert left == 1  # the relay cannot know yet whether the run will wait
        assert app.journal.settle(postgres, run.run_id, lease.token, parked) is not None

    beatless.work_until_idle()

    assert outcomes(beatless, run.run_id) == ["received"]
    beatless.verify()


def test_a_run_whose_row_is_held_keeps_no_other_of_its_shard_asleep(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """As a parent in somebody's open transaction, many of whose children end meanwhile."""
    held, other = beatless.start_run("pays").run_id, beatless.start_run("pays").run_id
    beatless.work_until_idle()
    postgres.execute(
        "INSERT INTO wakes (shard, run_id) SELECT %s, %s FROM generate_series(1, %s)",
        (shard_of(other), held, BATCH),
    )
    with postgres.transaction():
        postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (held,))
        beatless.signal(other, "paid", 12)
        beatless.work_until_idle()
        assert outcomes(beatless, other) == ["received"]


def test_a_signal_that_is_committed_while_the_run_is_being_locked_is_seen(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("pays")
    lease = leased(beatless, run.run_id)
    found = []

    def look() -> None:
        connection = beatless.app.direct_connection()
        with connection, connection.transaction():
            found.append(
                beatless.app.leases.inbox.take_in(
                    connection, run.run_id, lease.token, seen=0, waits=[4]
                )
            )

    with postgres.transaction():
        postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (run.run_id,))
        parking = threading.Thread(target=look)
        parking.start()
        blocking(postgres)
        beatless.signal(run.run_id, "paid", 12)
    parking.join(timeout=60)

    assert [[event.type for event in each.events] for each in found if each] == [["SignalReceived"]]
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["received"]
    beatless.verify()


def test_a_signal_in_the_inbox_wins_over_a_time_out_that_came_before_anybody_looked(
    beatless: Kit,
) -> None:
    run = beatless.start_run("pays")
    beatless.work_until_idle()
    beatless.signal(run.run_id, "paid", 12)
    beatless.advance(THREE_DAYS_S + 1)
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["received"]
    beatless.verify()


def test_a_signal_that_comes_as_a_wait_is_timed_out_wins(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    beatless.work_until_idle()
    beatless.advance(THREE_DAYS_S + 1)
    at(beatless, "wait.before", lambda: beatless.signal(run.run_id, "paid", 12))
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["received"]
    beatless.verify()


def test_a_signal_after_a_time_out_is_kept_and_does_nothing(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    beatless.work_until_idle()
    beatless.advance(THREE_DAYS_S + 1)
    at(beatless, "wait.committed", lambda: beatless.signal(run.run_id, "paid", 12))
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["timed_out"]
    assert beatless.client.get_run(run.run_id).result == "released"
    beatless.verify()


def test_a_deadline_wins_over_a_time_out_and_a_signal(beatless: Kit) -> None:
    run = beatless.start_run("pays", deadline=THREE_DAYS_S)
    beatless.work_until_idle()
    beatless.signal(run.run_id, "paid", 12)
    beatless.advance(THREE_DAYS_S)
    beatless.work_until_idle()
    found = beatless.client.get_run(run.run_id)
    assert found.error is not None
    assert (found.state, found.error["type"]) == ("failed", "DeadlineExceeded")
    assert outcomes(beatless, run.run_id) == []
    beatless.verify()


@pytest.mark.parametrize("point", ["wait.before", "wait.committed"])
def test_a_cancel_beside_the_parking_ends_the_run(beatless: Kit, point: str) -> None:
    run = beatless.start_run("pays")
    at(beatless, point, lambda: beatless.client.cancel_run(run.run_id))
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "cancelled"
    assert beatless.event_types(run.run_id)[-2:] == ["CancelRequested", "RunFinished"]
    beatless.verify()


def test_a_cancel_of_a_run_that_waits_calls_its_undo_step(beatless: Kit) -> None:
    run = beatless.start_run("undone")
    beatless.work_until_idle()
    assert beatless.client.cancel_run(run.run_id).state == "queued"
    beatless.signal(run.run_id, "paid", 12)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "cancelled"
    assert [f"{run.run_id}:reserve", f"{run.run_id}:undo"] == CALLS
    beatless.verify()


def test_a_run_that_was_cancelled_as_it_waited_receives_nothing_more(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    beatless.work_until_idle()
    assert beatless.client.cancel_run(run.run_id).state == "cancelled"
    with pytest.raises(RunEnded, match="has ended"):
        beatless.signal(run.run_id, "paid")
    beatless.verify()


def test_a_signal_before_the_first_claim_is_kept(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    beatless.signal(run.run_id, "paid", 12)
    assert beatless.event_types(run.run_id) == ["RunStarted"]
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["received"]
    assert beatless.client.get_run(run.run_id).attempt == 1
    beatless.verify()


def test_a_signal_in_a_transaction_that_outlives_the_lease_holds_up_nobody(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    with sqlalchemy.Connection(beatless.app.engine) as connection, connection.begin():
        beatless.signal(run.run_id, "paid", 12, connection=connection)
        beatless.work_until_idle()
        assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert outcomes(beatless, run.run_id) == ["received"]
    assert beatless.client.get_run(run.run_id).result == "released"
    beatless.verify()


def test_a_signal_in_a_transaction_that_is_rolled_back_never_was(beatless: Kit) -> None:
    run = beatless.start_run("pays")
    with sqlalchemy.Connection(beatless.app.engine) as connection, connection.begin() as begun:
        beatless.signal(run.run_id, "paid", 12, connection=connection)
        begun.rollback()
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.verify()


def test_two_signals_end_two_waits_in_the_order_in_which_they_came(beatless: Kit) -> None:
    run = beatless.start_run("two")
    beatless.work_until_idle()
    for amount in (1, 2):
        beatless.signal(run.run_id, "paid", amount)
    beatless.work_until_idle()
    finished = [e for e in beatless.client.events(run.run_id) if e.type == "WaitFinished"]
    seqs = [(event.data or {})["seq"] for event in finished]
    assert len(seqs) == 2
    assert seqs == sorted(seqs)
    assert beatless.client.get_run(run.run_id).result == 1
    beatless.verify()


def test_one_key_that_two_open_transactions_send_is_one_signal(beatless: Kit) -> None:
    run = beatless.start_run("two")
    beatless.work_until_idle()
    with (
        sqlalchemy.Connection(beatless.app.engine) as one,
        sqlalchemy.Connection(beatless.app.engine) as other,
        one.begin(),
        other.begin(),
    ):
        for connection in (one, other):
            beatless.signal(run.run_id, "paid", 1, key="psp:1", connection=connection)
    beatless.work_until_idle()
    assert beatless.event_types(run.run_id).count("SignalReceived") == 1
    assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.verify()


CRASHES = ["claim.committed", "step.committed", "wait.before", "wait.committed", "wait.signalled"]


@pytest.mark.parametrize("signal", ["before", "parking", "after", "never"])
def test_a_worker_that_dies_at_a_boundary_of_a_wait_repeats_and_loses_nothing(
    beatless: Kit, subtests: pytest.Subtests, signal: str
) -> None:
    for point in CRASHES:
        with subtests.test(point):
            die_at_a_boundary(beatless, point, signal)


def die_at_a_boundary(beatless: Kit, point: str, signal: str) -> None:
    run = beatless.start_run("pays")
    CALLS.clear()

    def send(when: str) -> None:
        if when == signal:
            beatless.signal(run.run_id, "paid", 12, key="psp:1")

    send("before")
    if signal == "parking":
        at(beatless, "wait.before", lambda: send("parking"))
        beatless.work_until_idle()
    else:
        beatless.app.faults.arm(point)
        survive(beatless)
        beatless.app.faults.disarm(point)
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    send("after")
    beatless.app.faults.arm(point)
    survive(beatless)
    beatless.app.faults.disarm(point)
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    beatless.advance(THREE_DAYS_S)
    beatless.work_until_idle()

    assert outcomes(beatless, run.run_id) == ["timed_out" if signal == "never" else "received"]
    assert len(CALLS) == len(set(CALLS)), CALLS
    assert beatless.client.get_run(run.run_id).state == "completed"
    beatless.verify()


def survive(kit: Kit) -> None:
    """Work; a worker that dies at an armed point is replaced."""
    try:
        kit.work_until_idle()
    except SimulatedCrash:
        kit.forget_worker()
