"""Limits of steps: an attempt begins only with their slots, and its end frees them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    Limit,
    Plan,
    PlanError,
    RunContext,
    RunState,
    Snooze,
    StepContext,
    StepFailed,
    plan,
    retry,
    step,
    wait,
)
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.limit import RunLimit
from beatless.orchestrator.settlement import NEVER_S, Boundary, Settlement
from beatless.testing import Kit
from tests.integration.test_run_limits import parked, slots

BODIES: list[str] = []
HELD: list[list[tuple[str, str]]] = []
"""The slots and their runs while a body was called."""

CONNECTION: list[psycopg.Connection[Any]] = []

WHEN_ASKED: list[Callable[[], object]] = []
"""Called with the key of `asked`: the last step has been committed, and this one has not begun."""


def look(ctx: StepContext) -> None:
    BODIES.append(f"{ctx.run_id} {ctx.step}")
    found = CONNECTION[0].execute("SELECT limit_id, run_id FROM limit_slots ORDER BY 1").fetchall()
    HELD.append(found)


STRIPE = Limit("stripe", key=lambda order: order["account"], at_once=1)
GPU = Limit("gpu", at_once=1)


@step
def before(ctx: StepContext) -> None:
    look(ctx)


@step(limits=[STRIPE])
def charge(ctx: StepContext) -> None:
    look(ctx)


def account_of(order: Any) -> str:
    for each in WHEN_ASKED:
        each()
    return str(order["account"])


@step(limits=[Limit("stripe", key=account_of, at_once=1)])
def asked(ctx: StepContext) -> None:
    look(ctx)


@step
def after(ctx: StepContext) -> None:
    look(ctx)


@step(limits=[GPU], retry=retry(max_attempts=2, initial=60, jitter=0))
def flaky(ctx: StepContext) -> Any:
    look(ctx)
    first = BODIES.count(f"{ctx.run_id} {ctx.step}") == 1
    if first and ctx.input == "snooze":
        return Snooze(60)
    if first or ctx.input == "fail":
        raise ValueError("once")
    return None


@step(limits=[Limit("calls", rate="2/h")], retry=retry(max_attempts=3, initial=60, jitter=0))
def call(ctx: StepContext) -> None:
    BODIES.append(ctx.run_id)
    if ctx.attempt == 1:
        raise ValueError("once")


@step(limits=[GPU], transactional=True)
def stored(ctx: StepContext) -> None:
    look(ctx)


@step(limits=[GPU])
def dies(ctx: StepContext) -> None:
    look(ctx)


@step(limits=[Limit("stripe", key=lambda account, amount: account, at_once=1)])
def pay(ctx: StepContext, account: str, amount: int) -> int:
    look(ctx)
    return amount


DIES = Plan("dies", [dies, after])


@plan("function")
def function(run: RunContext[Any]) -> Any:
    run.step(before)
    paid = run.step(pay, run.input["account"], amount=5)
    run.step(after)
    return paid + run.step(pay, "other", 3)


@plan("catches")
def catches(run: RunContext[Any]) -> Any:
    try:
        run.step(flaky)
    except StepFailed:
        run.step(after)
        return run.wait("go").data


@plan("branches")
def branches(run: RunContext[Any]) -> Any:
    return run.parallel([lambda: run.step(charge), lambda: run.step(before)])


@plan("parent", limits=[Limit("gpu", at_once=1, hold="run")])
def parent(run: RunContext[Any]) -> Any:
    return len(list(run.map(DIES, [None] * 2)))


@step
def undone(ctx: StepContext) -> None:
    look(ctx)


@step
def put_back(ctx: StepContext, taken: Any) -> None:
    look(ctx)


@step(undo=put_back)
def take(ctx: StepContext) -> None:
    look(ctx)


CALLS = Limit("two", rate="2/h")


@step(limits=[CALLS])
def counted(ctx: StepContext) -> None:
    look(ctx)


ENDS = Settlement.ignoring_cancel(Boundary(state=RunState.COMPLETED))
PARKS = Settlement.ignoring_cancel(Boundary(state=RunState.QUEUED, delay_s=NEVER_S), "limit")


@pytest.fixture
def beatless_plans() -> list[Plan]:
    BODIES.clear()
    HELD.clear()
    return [
        Plan("first", [charge, after]),
        Plan("list", [before, charge, after]),
        Plan("limited", [before, dies], limits=[Limit("runs", at_once=2)]),
        Plan("keeps", [before, dies, wait("go")], limits=[Limit("kept", at_once=2, hold="run")]),
        Plan("same", [charge], limits=[STRIPE]),
        Plan("flaky", [flaky]),
        Plan("calls", [call]),
        Plan("stored", [before, stored, after]),
        DIES,
        parent,
        Plan("free", [before]),
        Plan("cleans", [before, dies], on_cancel=undone),
        Plan("undoes", [take, dies]),
        Plan("asks", [before, asked], on_cancel=undone),
        Plan("counted", [counted], limits=[CALLS]),
        function,
        catches,
        branches,
    ]


@pytest.fixture(autouse=True)
def _connection(postgres: psycopg.Connection) -> Iterator[None]:
    CONNECTION[:] = [postgres]
    yield
    CONNECTION.clear()
    WHEN_ASKED.clear()


def start(kit: Kit, plan: str, input: Any = None, **options: Any) -> str:
    return kit.start_run(plan, input, **options).run_id


def finish(kit: Kit, *runs: str) -> None:
    """Execute all, and see that nothing is left."""
    kit.work_until_idle()
    assert {kit.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}
    assert_free(kit)


def assert_free(kit: Kit) -> None:
    for table in ("limit_slots", "limit_loans", "limit_notes"):
        assert CONNECTION[0].execute(f"SELECT * FROM {table}".encode()).fetchall() == []
    assert parked(CONNECTION[0]) == []
    kit.verify()


@pytest.mark.parametrize(
    ("name", "held"),
    [("list", [[], ["stripe:a"], []]), ("first", [["stripe:a"], []])],
)
def test_a_slot_is_held_while_its_step_is_executed(
    beatless: Kit, name: str, held: list[list[str]]
) -> None:
    runs = [start(beatless, name, {"account": "a"}) for _ in range(2)]
    finish(beatless, *runs)
    assert [[limit for limit, _ in each] for each in HELD] == held * 2
    types = beatless.event_types(runs[0])
    assert types.count("StepStarted") == types.count("StepFinished") == len(held)


def test_the_key_of_a_step_is_that_of_its_arguments(beatless: Kit) -> None:
    run_id = start(beatless, "function", {"account": "a"})
    finish(beatless, run_id)
    assert beatless.client.get_run(run_id).result == 8
    held = [[limit for limit, _ in each] for each in HELD]
    assert held == [[], ["stripe:a"], [], ["stripe:other"]]


@pytest.mark.parametrize("name", ["list", "function"])
def test_a_run_waits_for_a_slot_of_its_step_outside_of_the_broker(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, name: str
) -> None:
    first, second = (start(beatless, "first", {"account": "a"}) for _ in range(2))
    with beatless.crash("step.before"):
        beatless.work_once()
    assert slots(postgres) == [first]
    other = start(beatless, name, {"account": "a"})
    beatless.work_until_idle()

    assert parked(postgres) == sorted([second, other])
    assert [f"{other} before"] == BODIES
    assert beatless.client.get_run(other).not_before is None
    told = " ".join(moment.text for moment in beatless.client.explain(other))
    assert f"waits for the limit stripe (key a): 1 of 1 in use by {first}" in told
    (state,) = beatless.client.limits()
    assert (state.name, state.running, state.waiting) == ("stripe", 1, 2)
    beatless.verify()

    beatless.advance(3600)
    finish(beatless, first, second, other)
    assert beatless.client.get_run(other).attempt > 1


def test_a_run_that_waits_for_a_slot_of_its_step_holds_none_of_its_plan(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """But those that it keeps until its end."""
    holder = start(beatless, "dies")
    with beatless.crash("step.before"):
        beatless.work_once()
    limited, keeps = start(beatless, "limited"), start(beatless, "keeps")
    beatless.work_until_idle()
    assert parked(postgres) == sorted([limited, keeps])
    assert slots(postgres) == sorted([holder, keeps])
    beatless.verify()

    beatless.advance(3600)
    beatless.work_until_idle()
    turns = postgres.execute("SELECT limit_id FROM dispatches").fetchall()
    assert turns == [("kept:",)]  # it has no turn of the limit of a step that has ended
    beatless.signal(keeps, "go")
    finish(beatless, holder, limited, keeps)
    own = [{limit for limit, by in each if by != holder} for each in HELD[-2:]]
    assert own == [{"gpu:", "kept:", "runs:"}, {"gpu:", "kept:"}]


def test_a_limit_that_the_plan_has_as_well_is_taken_once(beatless: Kit) -> None:
    runs = [start(beatless, "same", {"account": "a"}) for _ in range(2)]
    finish(beatless, *runs)
    assert [[("stripe:a", run_id)] for run_id in runs] == HELD


def test_a_rate_that_the_plan_has_as_well_is_taken_once(beatless: Kit) -> None:
    runs = [start(beatless, "counted") for _ in range(2)]
    beatless.work_until_idle()
    assert [f"{run_id} counted" for run_id in runs] == BODIES


@pytest.mark.parametrize("input", [None, "snooze"])
def test_a_step_that_is_tried_again_takes_its_slot_again(
    beatless: Kit, postgres: psycopg.Connection, input: Any
) -> None:
    first = start(beatless, "flaky", input)
    beatless.work_until_idle()
    assert slots(postgres) == []
    other = start(beatless, "dies")
    beatless.work_until_idle()
    assert beatless.client.get_run(other).state is RunState.COMPLETED

    beatless.advance(60)
    finish(beatless, first)
    assert [len(each) for each in HELD] == [1, 1, 0, 1]


def test_a_step_that_failed_for_good_frees_its_slot(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run_id = start(beatless, "catches", "fail")
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()
    assert len(HELD[0]) == len(HELD[1]) == 1
    assert HELD[2] == []
    assert slots(postgres) == []
    beatless.signal(run_id, "go")
    finish(beatless, run_id)


def test_a_rate_of_a_step_counts_its_attempts(beatless: Kit, postgres: psycopg.Connection) -> None:
    first, second = start(beatless, "calls"), start(beatless, "calls")
    beatless.work_until_idle()
    assert [first, second] == BODIES
    beatless.advance(60)
    beatless.work_until_idle()
    assert [first, second] == BODIES
    assert parked(postgres) == sorted([first, second])

    for _ in range(2):
        beatless.advance(1800)
        beatless.work_until_idle()
    assert sorted(BODIES) == sorted([first, second] * 2)
    finish(beatless, first, second)


def test_the_slot_of_a_step_is_inherited_by_a_takeover(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    first, second = start(beatless, "stored"), start(beatless, "stored")
    with beatless.crash("step.before", nth=2):
        beatless.work_once()
    assert slots(postgres) == [first]
    beatless.work_until_idle()
    assert parked(postgres) == [second]
    beatless.advance(3600)
    finish(beatless, first, second)
    assert [len(each) for each in HELD] == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("name", ["list", "function"])
def test_a_worker_that_dies_between_two_steps_has_taken_no_slot_of_the_next(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    run_id = start(beatless, name, {"account": "a"})
    with beatless.crash("step.committed"):
        beatless.work_once()
    assert slots(postgres) == []
    assert beatless.event_types(run_id)[-1] == "StepFinished"
    beatless.advance(3600)
    finish(beatless, run_id)
    assert [len(each) for each in HELD][:3] == [0, 1, 0]


def test_a_step_of_a_child_has_the_slot_that_its_parent_keeps(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run_id = start(beatless, "parent")
    finish(beatless, run_id)
    assert [[("gpu:", run_id)]] * 4 == HELD


def test_a_cancelled_run_gives_the_slot_of_its_step_back(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    holder = start(beatless, "cleans")
    with beatless.crash("step.effect_done", nth=2):
        beatless.work_once()
    assert slots(postgres) == [holder]
    waiting, cleans = start(beatless, "dies"), start(beatless, "cleans")
    beatless.work_until_idle()
    assert parked(postgres) == sorted([waiting, cleans])
    for run_id in (waiting, cleans, holder):
        beatless.client.cancel_run(run_id)

    beatless.advance(3600)
    beatless.work_until_idle()

    states = {beatless.client.get_run(each).state for each in (waiting, cleans, holder)}
    assert states == {RunState.CANCELLED}
    assert [each for each in BODIES if each.endswith("undone")]
    assert HELD[-1] == []
    assert_free(beatless)


@pytest.mark.parametrize(
    ("name", "bodies"), [("cleans", ["undone"]), ("undoes", ["put_back#undo:take"])]
)
@pytest.mark.parametrize("late", [False, True])
def test_the_end_of_a_run_waits_for_no_slot_of_a_step_that_will_not_begin(
    beatless: Kit, postgres: psycopg.Connection, name: str, bodies: list[str], late: bool
) -> None:
    """After a cancel, and a deadline; the next one in line has its turn."""
    holder = start(beatless, "dies")
    with beatless.crash("step.effect_done"):
        beatless.work_once()
    run_id, waits = start(beatless, name, deadline=60), start(beatless, "dies")
    beatless.work_until_idle()
    assert parked(postgres) == sorted([run_id, waits])
    BODIES.clear()
    postgres.execute("UPDATE runs SET lease_expires_at = 'infinity' WHERE run_id = %s", (holder,))

    if late:
        beatless.advance(60)
    else:
        beatless.client.cancel_run(run_id)
    beatless.work_until_idle()

    ended = beatless.client.get_run(run_id)
    assert ended.state is (RunState.FAILED if late else RunState.CANCELLED)
    called = [] if late and name == "cleans" else bodies
    assert [f"{run_id} {each}" for each in called] == BODIES
    assert slots(postgres) == [holder]
    assert parked(postgres) == [waits]


def test_a_run_that_is_cancelled_as_it_finds_no_slot_is_not_parked(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    holder = start(beatless, "first", {"account": "a"})
    with beatless.crash("step.before"):
        beatless.work_once()
    run_id = start(beatless, "asks", {"account": "a"})
    WHEN_ASKED.append(lambda: beatless.client.cancel_run(run_id))
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).state is RunState.CANCELLED
    assert [f"{run_id} before", f"{run_id} undone"] == BODIES
    assert slots(postgres) == [holder]
    assert parked(postgres) == []


def test_a_run_that_is_cancelled_in_its_turn_leaves_it_to_the_next(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    holder = start(beatless, "dies")
    with beatless.crash("step.effect_done"):
        beatless.work_once()
    let_in, waits = start(beatless, "cleans"), start(beatless, "dies")
    beatless.work_until_idle()
    postgres.execute("DELETE FROM dispatches WHERE run_id = %s", (holder,))
    postgres.execute("DELETE FROM runs WHERE run_id = %s", (holder,))
    assert parked(postgres) == [waits]

    beatless.client.cancel_run(let_in)
    beatless.work_until_idle()

    states = [beatless.client.get_run(each).state for each in (let_in, waits)]
    assert states == [RunState.CANCELLED, RunState.COMPLETED]


def test_a_step_with_limits_in_a_branch_is_refused(beatless: Kit) -> None:
    run_id = start(beatless, "branches", {"account": "a"})
    beatless.work_until_idle()
    run = beatless.client.get_run(run_id)
    assert run.state is RunState.FAILED
    assert run.error is not None
    assert "asks for step charge" in run.error["message"]
    assert "start children whose plan has the limits (run.map)" in run.error["message"]


def test_a_key_that_cannot_be_computed_fails_the_run(beatless: Kit) -> None:
    for name in ("list", "first"):
        run_id = start(beatless, name, {})
        beatless.work_until_idle()
        run = beatless.client.get_run(run_id)
        assert run.error is not None
        assert "the key of limit stripe cannot be computed" in run.error["message"]
    assert_free(beatless)


def test_an_end_and_a_wait_for_a_slot_that_do_not_see_each_other_strand_no_run(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """The run has found no slot, and is not parked yet, when the last one is freed."""
    holder, other = start(beatless, "dies"), start(beatless, "free")
    leases = beatless_app.leases
    with (
        closing(beatless_app.executors.connect()) as session,
        closing(beatless_app.executors.connect()) as caller,
    ):

        def claimed(run_id: str) -> Lease:
            name = beatless_app.client.get_run(run_id).plan
            found = leases.claim(
                session, run_id, plan=name, worker="w", first_step=None, dispatch=1
            )
            assert found is not None
            return found

        limits = [RunLimit(id="gpu:", at_once=1, step="dies")]
        first, second = claimed(holder), claimed(other)
        assert leases.take_slots_of_step(session, first, limits) is None
        with caller.transaction():
            assert leases.take_slots_of_step(caller, second, limits) == "gpu:"
            beatless_app.journal.settle(session, holder, first.token, ENDS)
            beatless_app.journal.settle(caller, other, second.token, PARKS)
    assert parked(postgres) == [other]
    beatless.drain_outbox_once()
    assert parked(postgres) == []
    beatless.work_until_idle()
    assert beatless.client.get_run(other).state is RunState.COMPLETED


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: step(limits=GPU)(look), "step look: limits is Limit('gpu', at_once=1); give"),
        (lambda: step(limits=[GPU, GPU])(look), "step look has two limits of one name"),
        (
            lambda: step(limits=[Limit("a", at_once=1, hold="run")])(look),
            "a step keeps no slot when it has ended: give the limit to the plan",
        ),
        (lambda: Plan("p", [before], on_cancel=charge), "its on_cancel step charge has limits"),
    ],
)
def test_limits_that_a_step_cannot_have_are_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(PlanError) as refused:
        make()
    assert told in str(refused.value)
