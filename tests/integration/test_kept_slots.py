"""Limits with `hold="run"`: a run keeps its slot until its end, and lends it to its children."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    Limit,
    Plan,
    RunContext,
    RunState,
    StepContext,
    map_,
    plan,
    retry,
    step,
    wait,
)
from beatless.doctor import Doctor, Status
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.plan import PlanError
from beatless.testing import Kit
from beatless.verify import verify
from tests.integration.test_races import until
from tests.integration.test_run_limits import assert_idle, claim, end, parked, slots

BODIES: list[str] = []


@step
def charge(ctx: StepContext) -> None:
    BODIES.append(ctx.run_id)


@step
def later(ctx: StepContext) -> None: ...


@step(retry=retry(max_attempts=2, initial=60, jitter=0))
def flaky(ctx: StepContext) -> None:
    BODIES.append(ctx.run_id)
    if BODIES.count(ctx.run_id) == 1:
        raise ValueError("once")


ONE = Limit("gpu", at_once=1, hold="run")
TWO = Limit("pair", at_once=2, hold="run")
LLM = Limit("llm", at_once=1)

LEAF = Plan("leaf", [charge], limits=[Limit("gpu", at_once=1)])


@plan("middle")
def middle(run: RunContext[Any]) -> Any:
    return len(list(run.map(LEAF, [None] * 2)))


@plan("tree", limits=[ONE])
def tree(run: RunContext[Any]) -> Any:
    return [*run.map(LEAF, [None] * 3), run.child(middle, None).result()]


@plan("leaves", limits=[ONE])
def leaves(run: RunContext[Any]) -> Any:
    run.child(LEAF, None, detach=run.input == "detached")
    return run.wait("go").data


@pytest.fixture
def beatless_plans() -> list[Plan]:
    BODIES.clear()
    return [
        Plan("pays", [charge, wait("paid"), later], limits=[ONE]),
        Plan("flaky", [flaky], limits=[ONE]),
        Plan("both", [charge, wait("paid"), later], limits=[TWO, LLM]),
        Plan("llm", [charge], limits=[LLM]),
        Plan("pair", [charge, wait("paid")], limits=[TWO]),
        Plan("free", [charge]),
        Plan("list", [map_("all", LEAF, inputs=lambda ctx: [None] * 3)], limits=[ONE]),
        LEAF,
        middle,
        tree,
        leaves,
    ]


def start(kit: Kit, plan: str, input: Any = None, **options: Any) -> str:
    return kit.start_run(plan, input, **options).run_id


def loans(postgres: psycopg.Connection) -> list[str]:
    """The runs that have a lease by the slot of another one."""
    rows = postgres.execute("SELECT run_id FROM limit_loans ORDER BY run_id").fetchall()
    return [run_id for (run_id,) in rows]


def child_of(kit: Kit, run_id: str) -> str:
    [child] = kit.client.children(run_id)
    return child.run_id


@pytest.fixture
def session(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session of a worker."""
    with closing(beatless_app.executors.connect()) as found:
        yield found


def test_a_run_that_waits_keeps_its_slot_until_it_has_ended(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    first, second = start(beatless, "pays"), start(beatless, "pays")
    beatless.work_until_idle()

    assert [first] == BODIES
    assert (slots(postgres), parked(postgres)) == ([first], [second])
    beatless.verify()
    (state,) = beatless.client.limits()
    assert (state.running, state.waiting, state.hold) == (1, 1, "run")
    assert [each.status for each in Doctor(beatless_app).examine(["limits"])][-1] is Status.OK

    beatless.signal(first, "paid")
    beatless.work_until_idle()
    assert [first, second] == BODIES
    assert slots(postgres) == [second]
    assert beatless.client.cancel_run(second).state is RunState.CANCELLED
    beatless.drain_outbox_once()
    assert_idle(postgres)


def test_a_run_keeps_its_slot_between_the_attempts_of_a_step(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    first, second = start(beatless, "flaky"), start(beatless, "flaky")
    beatless.work_until_idle()
    assert [first] == BODIES
    assert slots(postgres) == [first]

    for _ in range(2):
        beatless.advance(60)
        beatless.work_until_idle()
    assert [first, first, second, second] == BODIES
    assert_idle(postgres)


@pytest.mark.parametrize("name", ["tree", "list"])
def test_children_and_theirs_take_no_slot_of_a_limit_of_which_an_ancestor_keeps_one(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    """One slot is all there is: a child that waited for one would wait for ever."""
    run_id, other = start(beatless, name), start(beatless, "leaf")
    beatless.work_once()
    assert slots(postgres) == [run_id]

    beatless.work_until_idle()

    assert {beatless.client.get_run(each).state for each in (run_id, other)} == {RunState.COMPLETED}
    assert BODIES[-1] == other
    assert_idle(postgres)
    assert loans(postgres) == []


def test_a_detached_child_takes_a_slot_of_its_own(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run_id = start(beatless, "leaves", "detached")
    beatless.work_until_idle()
    assert BODIES == []
    assert slots(postgres) == [run_id]
    assert len(parked(postgres)) == 1

    beatless.signal(run_id, "go")
    beatless.work_until_idle()
    assert len(BODIES) == 1
    assert_idle(postgres)


def test_a_slot_that_is_lent_is_the_childs_when_its_parent_has_ended(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, session: psycopg.Connection
) -> None:
    parent, other = start(beatless, "leaves"), start(beatless, "leaf")
    beatless.work_once()
    child = child_of(beatless, parent)
    lease = claim(beatless_app, session, child)
    assert lease is not None
    assert (slots(postgres), loans(postgres)) == ([parent], [child])
    beatless.verify()

    beatless.client.cancel_run(parent)

    assert (slots(postgres), loans(postgres)) == ([child], [])
    beatless.drain_outbox_once()
    assert parked(postgres) == [other]
    beatless.verify()
    end(beatless_app, session, lease)
    assert parked(postgres) == []
    beatless.work_until_idle()
    assert_idle(postgres)


def test_of_several_children_each_has_it_in_turn(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, session: psycopg.Connection
) -> None:
    parent, other = start(beatless, "list"), start(beatless, "leaf")
    beatless.work_once()
    children = [each.run_id for each in beatless.client.children(parent)]
    leases = {run_id: claim(beatless_app, session, run_id) for run_id in children}
    assert loans(postgres) == sorted(children)
    beatless.client.cancel_run(parent)

    for left in (2, 1, 0):
        (holder,) = slots(postgres)
        assert len(loans(postgres)) == left
        assert parked(postgres) == [other]
        found = verify(session, beatless_app.settings.schema)
        assert [each for each in found if each.invariant == "I14"] == []
        lease = leases.pop(holder)
        assert lease is not None
        end(beatless_app, session, lease)

    assert leases == {}
    assert (slots(postgres), parked(postgres)) == ([], [])


@pytest.mark.parametrize("first", ["claim", "end"])
def test_a_childs_claim_and_the_end_of_its_parent_leave_one_slot(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    session: psycopg.Connection,
    first: str,
) -> None:
    """Each waits for the other one's commit: the slot is lent before, or is free after."""
    parent, other = start(beatless, "leaves"), start(beatless, "leaf")
    beatless.work_once()
    child = child_of(beatless, parent)
    schema = beatless_app.settings.schema

    def cancel() -> None:
        beatless.client.cancel_run(parent)

    def takes() -> bool:
        with session.transaction():
            row = session.execute(f"SELECT {schema}.take_slots(%s)".encode(), (child,)).fetchone()
        return row == (True,)

    with ThreadPoolExecutor(1) as pool, closing(beatless_app.executors.connect()) as caller:
        if first == "claim":
            with session.transaction():
                lease = claim(beatless_app, session, child)
                assert isinstance(lease, Lease)
                cancelled = pool.submit(cancel)
                until(postgres, blocked_by=session.info.backend_pid)
            cancelled.result()
            assert (slots(postgres), loans(postgres)) == ([child], [])
            assert parked(postgres) == [other]
        else:
            with caller.transaction():
                beatless.client.cancel_run(parent, connection=caller)
                taken = pool.submit(takes)
                until(postgres, blocked_by=caller.info.backend_pid)
            # The end lets in the run that has waited; the child is lent nothing.
            assert taken.result()
            assert (slots(postgres), loans(postgres)) == ([child], [])


def test_a_run_that_waits_for_another_limit_keeps_what_it_keeps_but_for_its_first_claim(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, session: psycopg.Connection
) -> None:
    run_id = start(beatless, "both")
    beatless.work_until_idle()
    assert slots(postgres) == [run_id]
    holder = claim(beatless_app, session, start(beatless, "llm"))
    assert holder is not None
    beatless.signal(run_id, "paid")
    new = start(beatless, "both")
    postgres.execute(
        "UPDATE dispatches SET state = 'waiting', reason = 'start', due_at = now() "
        "WHERE state = 'delayed'"
    )
    postgres.execute("UPDATE runs SET not_before = NULL WHERE state = 'queued'")
    for each in (run_id, new):
        assert claim(beatless_app, session, each) is None

    assert parked(postgres) == sorted([run_id, new])
    assert slots(postgres) == sorted([run_id, holder.run.run_id])
    end(beatless_app, session, holder)
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    assert slots(postgres) == [new]


def test_a_run_that_has_its_slot_takes_no_room_from_others_when_it_is_woken(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    first, second = start(beatless, "pair"), start(beatless, "pair")
    beatless.work_until_idle()
    assert slots(postgres) == sorted([first, second])
    beatless.client.cancel_run(second)
    beatless.signal(first, "paid")
    relay = beatless_app.relay()
    relay.drain_once()
    woken = postgres.execute("SELECT state FROM dispatches WHERE run_id = %s", (first,)).fetchone()
    assert woken in (("waiting",), ("sent",))

    third = start(beatless, "pair")
    assert parked(postgres) == []

    postgres.execute(
        "UPDATE dispatches SET state = 'delayed', reason = 'limit', limit_since = now(), "
        "due_at = '9999-01-01Z' WHERE run_id = %s",
        (third,),
    )
    postgres.execute("INSERT INTO limit_notes (shard, limit_id) VALUES (0, 'pair:')")
    relay.drain_once()
    relay.stop()
    assert parked(postgres) == []


def test_verify_and_doctor_tell_of_slots_and_loans_without_a_lease(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, session: psycopg.Connection
) -> None:
    run_id = start(beatless, "free")
    postgres.execute("INSERT INTO limit_slots (limit_id, n, run_id) VALUES ('x', 1, %s)", (run_id,))
    assert [each.status for each in Doctor(beatless_app).examine(["limits"])][-1] is Status.PROBLEM
    postgres.execute("DELETE FROM limit_slots")
    postgres.execute("INSERT INTO limit_loans (limit_id, run_id, n) VALUES ('x', %s, 2)", (run_id,))

    found = {each.problem for each in verify(session, beatless_app.settings.schema)}

    assert found == {
        "it is queued and has 1 slots of 0 limits",
        "it has a lease by slot 2 of the limit x, which nobody holds",
    }
    postgres.execute("DELETE FROM limit_loans")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Limit("a", at_once=1, hold="step"), "limit a: hold is 'step'; give hold=\"run\""),
        (lambda: Limit("a", rate="1/s", hold="run"), "limit a: a rate has no slots to hold"),
    ],
)
def test_a_hold_that_cannot_work_is_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(PlanError) as refused:
        make()
    assert told in str(refused.value)
