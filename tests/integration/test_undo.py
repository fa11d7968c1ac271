"""Steps that are undone: what a run has begun, when it fails or is cancelled."""

from collections.abc import Callable
from typing import Any

import pytest

from beatless import (
    App,
    Fatal,
    Plan,
    RunContext,
    RunState,
    Snooze,
    StepContext,
    Undone,
    plan,
    retry,
    step,
    wait,
)
from beatless.orchestrator.errors import CannotRetry
from beatless.orchestrator.outcomes import PlanError
from beatless.places import places
from beatless.testing import Kit

CALLS: list[Undone] = []
"""The undos whose bodies were called, in order."""


SNOOZED: list[str] = []


def noted(ctx: StepContext, undone: Undone) -> dict[str, Any]:
    CALLS.append(undone)
    if ctx.attempt <= (ctx.input or {}).get("failures", {}).get(undone.step, 0):
        raise ValueError(f"{undone.step} cannot be undone")
    return {"undid": undone.result}


release = step(name="release", retry=retry(max_attempts=2, initial=1, jitter=0))(noted)
refund = step(name="refund", retry=retry(max_attempts=2, initial=1, jitter=0))(noted)


@step(name="unship")
async def unship(ctx: StepContext, undone: Undone) -> Any:
    if (ctx.input or {}).get("snoozes") and not SNOOZED:
        SNOOZED.append(undone.step)
        return Snooze(1)
    return noted(ctx, undone)


@step(undo=release)
def reserve(ctx: StepContext) -> dict[str, int]:
    return {"stock": 3}


@step(undo=refund, retry=retry(max_attempts=2, initial=1, jitter=0))
def charge(ctx: StepContext, amount: int = 5, *, currency: str = "EUR") -> dict[str, Any]:
    if (ctx.input or {}).get("charge") == "fails":
        raise ValueError("perhaps it was charged")
    return {"charged": amount}


@step(undo=unship)
async def ship(ctx: StepContext) -> dict[str, bool]:
    return {"shipped": True}


@step
def deliver(ctx: StepContext) -> str:
    if (ctx.input or {}).get("deliver") != "works":
        raise Fatal("nobody is at home")
    return "delivered"


@step
def notify(ctx: StepContext) -> list[str]:
    return sorted(ctx.results)


@step
def rest(ctx: StepContext) -> None: ...


@step
def is_cancelled(ctx: StepContext) -> None:
    CANCELS["cancel"](ctx.run_id)


CANCELS: dict[str, Callable[[str], object]] = {}

ends_later = Plan("ends_later", [rest, wait("go")], on_cancel=notify, queue="later")

told = Plan("told", [wait("go")], queue="children")


@plan("pays")
def pays(run: RunContext[Any]) -> Any:
    stock = run.step(reserve)
    for amount in (1, 2):
        run.step(charge, amount, currency="USD")
    if run.input.get("waits"):
        run.wait("go")
    return run.step(deliver, id=str(stock["stock"]) + "x")


@plan("has_children")
def has_children(run: RunContext[Any]) -> Any:
    run.step(reserve)
    run.child(told, detach=True)
    run.child(told)
    if run.input.get("waits"):
        run.wait("go")
    return run.step(deliver)


@plan("has_slow_children")
def has_slow_children(run: RunContext[Any]) -> Any:
    """Its child ends once a worker has called the `on_cancel` step of that."""
    if not run.input.get("second"):
        run.child(ends_later)
        if run.input.get("again"):
            return run.again({"second": True})
    run.step(reserve)
    run.wait("go")
    return run.step(deliver)


@plan("cancelled_in_function")
def cancelled_in_function(run: RunContext[Any]) -> Any:
    run.step(is_cancelled)
    run.step(charge)
    return run.step(deliver)


@plan("hides")
def hides(run: RunContext[Any]) -> Any:
    return run.step(HIDDEN["step"])


@plan("large")
def large(run: RunContext[Any]) -> Any:
    return run.step(charge, 1, currency="x" * 70_000)


HIDDEN = {"step": step(name="hidden", undo=refund)(lambda ctx: 1)}

PLANS = [
    told,
    pays,
    has_children,
    ends_later,
    has_slow_children,
    hides,
    cancelled_in_function,
    large,
    Plan("order", [reserve, charge, ship, deliver]),
    Plan("cancelled", [reserve, charge, wait("go"), deliver], on_cancel=notify),
    Plan("cancelled_before", [is_cancelled, charge, deliver]),
    Plan("waits", [rest, reserve, wait("go"), deliver]),
    Plan("late", [rest, deliver, reserve]),
    Plan("waits_first", [rest, wait("go"), reserve]),
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    CALLS.clear()
    return PLANS


LEASE_S = 60


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


def ended(kit: Kit, name: str, input: Any = None, **options: Any) -> Any:
    """A run that was executed, with all that waits for the clock."""
    run = kit.start_run(name, input or {}, **options)
    finish(kit)
    return kit.client.get_run(run.run_id)


def finish(kit: Kit) -> None:
    for _ in range(4):
        kit.work_until_idle()
        kit.advance(5)
    kit.work_until_idle()


def undone_steps() -> list[str]:
    return [undone.step for undone in CALLS]


def steps_of(kit: Kit, run_id: str, type: str) -> list[str | None]:
    return [event.step for event in kit.client.events(run_id) if event.type == type]


def test_a_run_that_fails_is_undone_from_its_last_step_to_its_first(beatless: Kit) -> None:
    run = ended(beatless, "order")

    assert undone_steps() == ["ship", "charge", "reserve"]
    assert (run.state, run.error["type"], "undo" in run.error) == (
        RunState.FAILED,
        "Fatal",
        False,
    )
    assert [each.result for each in CALLS] == [{"shipped": True}, {"charged": 5}, {"stock": 3}]
    assert [each.key for each in CALLS][1] == f"{run.run_id}:charge"
    assert all(each.finished for each in CALLS)
    types = beatless.event_types(run.run_id)
    assert types[types.index("UndoStarted") :] == [
        "UndoStarted",
        *["StepStarted", "StepFinished"] * 3,
        "RunFinished",
    ]
    assert steps_of(beatless, run.run_id, "StepFinished")[-3:] == [
        "unship#undo:ship",
        "refund#undo:charge",
        "release#undo:reserve",
    ]
    assert "nobody is at home; its steps are undone" in " ".join(
        moment.text for moment in beatless.client.explain(run.run_id)
    )
    beatless.verify()


def test_a_step_that_has_failed_is_undone_too_for_it_may_have_had_its_effect(
    beatless: Kit,
) -> None:
    run = ended(beatless, "order", {"charge": "fails"})

    assert [(each.step, each.finished, each.result) for each in CALLS] == [
        ("charge", False, None),
        ("reserve", True, {"stock": 3}),
    ]
    assert run.error["message"] == "perhaps it was charged"
    beatless.verify()


def test_a_run_that_completes_is_not_undone(beatless: Kit) -> None:
    run = ended(beatless, "order", {"deliver": "works"})

    assert (run.state, CALLS) == (RunState.COMPLETED, [])
    assert beatless.event_types(run.run_id).count("StepStarted") == 4
    beatless.verify()


def test_a_run_that_has_begun_nothing_that_can_be_undone_ends_at_once(beatless: Kit) -> None:
    run = ended(beatless, "late")

    assert (run.state, CALLS) == (RunState.FAILED, [])
    assert "UndoStarted" not in beatless.event_types(run.run_id)


def test_a_cancelled_run_is_undone_and_its_on_cancel_step_comes_last(beatless: Kit) -> None:
    run = beatless.start_run("cancelled", {})
    beatless.work_until_idle()
    beatless.client.cancel_run(run.run_id, reason="changed my mind")
    finish(beatless)

    found = beatless.client.get_run(run.run_id)
    assert undone_steps() == ["charge", "reserve"]
    assert (found.state, found.error["message"]) == (RunState.CANCELLED, "changed my mind")
    assert steps_of(beatless, run.run_id, "StepFinished") == [
        "reserve",
        "charge",
        "refund#undo:charge",
        "release#undo:reserve",
        "notify",
    ]
    beatless.verify()


@pytest.mark.parametrize("plan", ["cancelled_before", "cancelled_in_function"])
def test_a_run_that_is_cancelled_before_the_first_step_with_an_undo_ends(
    beatless: Kit, plan: str
) -> None:
    CANCELS["cancel"] = beatless.client.cancel_run
    run = beatless.start_run(plan, {})
    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, CALLS) == (RunState.CANCELLED, [])
    assert [event.step for event in beatless.client.events(run.run_id) if event.step] == [
        "is_cancelled",
        "is_cancelled",
    ]
    beatless.verify()


def test_a_cancel_of_a_run_that_waits_is_undone_without_an_on_cancel_step(beatless: Kit) -> None:
    run = beatless.start_run("waits", {})
    beatless.work_until_idle()
    assert beatless.client.cancel_run(run.run_id).state is RunState.QUEUED
    finish(beatless)

    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    assert undone_steps() == ["reserve"]
    beatless.verify()


def test_an_undo_that_fails_is_tried_again(beatless: Kit) -> None:
    run = ended(beatless, "order", {"failures": {"charge": 1}})

    assert undone_steps() == ["ship", "charge", "charge", "reserve"]
    assert "undo" not in run.error
    beatless.verify()


@pytest.mark.parametrize("name", ["order", "pays"])
def test_a_run_that_is_undone_is_not_told_as_one_that_another_version_has_changed(
    beatless: Kit, name: str
) -> None:
    beatless.start_run(name, {"failures": {"charge": 1}})
    beatless.work_until_idle()

    assert "charge" in undone_steps()
    (place,) = places(beatless.app.engine, beatless.app.journal, beatless.app.plans)
    assert (place.waits, place.difference) == (None, None)


def test_an_undo_that_fails_for_good_is_told_and_the_others_are_still_called(
    beatless: Kit,
) -> None:
    run = ended(beatless, "order", {"failures": {"charge": 9}})

    assert undone_steps() == ["ship", "charge", "charge", "reserve"]
    (failure,) = run.error["undo"]
    assert (failure["undoes"], failure["type"], failure["message"]) == (
        "charge",
        "ValueError",
        "charge cannot be undone",
    )
    assert run.error["type"] == "Fatal"
    assert beatless.client.events(run.run_id)[-1].data["error"] == run.error
    beatless.verify()


def test_an_undo_may_snooze(beatless: Kit) -> None:
    SNOOZED.clear()
    ended(beatless, "order", {"snoozes": True})
    assert SNOOZED == ["ship"]
    assert undone_steps() == ["ship", "charge", "reserve"]
    beatless.verify()


def test_each_call_of_a_function_is_undone_with_its_own_arguments(beatless: Kit) -> None:
    ended(beatless, "pays")

    assert [(each.step, each.args, dict(each.kwargs), each.result) for each in CALLS] == [
        ("charge#2", (2,), {"currency": "USD"}, {"charged": 2}),
        ("charge", (1,), {"currency": "USD"}, {"charged": 1}),
        ("reserve", (), {}, {"stock": 3}),
    ]
    beatless.verify()


def test_a_function_that_is_cancelled_while_it_waits_is_undone(beatless: Kit) -> None:
    run = beatless.start_run("pays", {"waits": True})
    beatless.work_until_idle()
    beatless.client.cancel_run(run.run_id)
    finish(beatless)

    assert undone_steps() == ["charge#2", "charge", "reserve"]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


@pytest.mark.parametrize("cancels", [False, True])
def test_nothing_is_undone_before_the_children_have_ended(beatless: Kit, cancels: bool) -> None:
    run = beatless.start_run("has_children", {"waits": cancels})
    if cancels:
        beatless.work_until_idle()
        beatless.client.cancel_run(run.run_id)
    finish(beatless)

    detached, child = beatless.children(run.run_id)
    assert (detached.state, child.state) == (RunState.WAITING, RunState.CANCELLED)
    began = next(e.ts for e in beatless.client.events(run.run_id) if "#undo:" in str(e.step))
    assert child.finished_at is not None
    assert child.finished_at.timestamp() * 1000 <= began
    assert undone_steps() == ["reserve"]
    assert beatless.client.get_run(run.run_id).state.final
    beatless.verify()


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_run_leaves_its_worker_until_its_children_have_ended(
    beatless: Kit, again: bool, cancels: bool
) -> None:
    """Also if they were started before its function began again."""
    run = beatless.start_run("has_slow_children", {"again": again})
    beatless.work_until_idle()
    beatless.client.pause_queue("later")
    if cancels:
        beatless.client.cancel_run(run.run_id)
    else:
        beatless.signal(run.run_id, "go")
    beatless.work_until_idle(limit=20)

    assert CALLS == []
    assert beatless.client.get_run(run.run_id).state is RunState.WAITING
    beatless.client.resume_queue("later")
    beatless.work_until_idle(limit=20)
    assert undone_steps() == ["reserve"]
    assert beatless.client.get_run(run.run_id).state.final
    beatless.verify()


@pytest.mark.parametrize(("name", "input"), [("waits", {}), ("pays", {"waits": True})])
def test_a_run_that_reaches_its_deadline_while_it_waits_is_undone(
    beatless: Kit, name: str, input: Any
) -> None:
    run = beatless.start_run(name, input, deadline=30)
    beatless.work_until_idle()
    beatless.advance(31)
    finish(beatless)

    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.error["type"]) == (RunState.FAILED, "DeadlineExceeded")
    assert undone_steps()[-1] == "reserve"
    beatless.verify()


def other_process(kit: Kit, plans: list[Plan]) -> Kit:
    """A relay and client with other plans than the workers."""
    return Kit(App(kit.app.settings, plans))


@pytest.mark.parametrize("known", ["no plans", "a plan without undo"])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
@pytest.mark.parametrize(("name", "input"), [("waits", {}), ("pays", {"waits": True})])
def test_who_knows_of_no_undo_leaves_the_run_to_a_worker_that_does(
    beatless: Kit, name: str, input: Any, how: str, known: str
) -> None:
    run = beatless.start_run(name, input, deadline=30)
    beatless.work_until_idle()
    lacks = Plan(name, [step(name="reserve")(rest.function), wait("go")])
    other = other_process(beatless, [lacks] if known == "a plan without undo" else [])
    try:
        if how == "cancel":
            other.client.cancel_run(run.run_id)
        else:
            beatless.advance(31)
            other.drain_outbox_once()
        assert not beatless.client.get_run(run.run_id).state.final
    finally:
        other.close()
        other.app.close()
    finish(beatless)

    found = beatless.client.get_run(run.run_id)
    assert found.state is (RunState.CANCELLED if how == "cancel" else RunState.FAILED)
    assert undone_steps()[-1] == "reserve"
    beatless.verify()


@pytest.mark.parametrize("how", ["deadline", "cancel"])
def test_a_run_that_waits_before_the_first_step_to_undo_ends_without_a_worker(
    beatless: Kit, how: str
) -> None:
    run = beatless.start_run("waits_first", {}, deadline=30)
    beatless.work_until_idle()
    if how == "cancel":
        beatless.client.cancel_run(run.run_id)
    else:
        beatless.advance(31)
        beatless.drain_outbox_once()

    assert beatless.client.get_run(run.run_id).state.final
    assert "UndoStarted" not in beatless.event_types(run.run_id)


def test_the_back_off_of_an_undo_outlives_the_deadline(beatless: Kit) -> None:
    run = beatless.start_run("waits", {"failures": {"reserve": 1}}, deadline=30)
    beatless.work_until_idle()
    beatless.advance(31)
    beatless.work_until_idle()

    assert undone_steps() == ["reserve"]
    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
    assert beatless.waits(run.run_id) == []
    finish(beatless)
    assert undone_steps() == ["reserve", "reserve"]
    assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"
    beatless.verify()


def test_a_cancel_while_a_run_is_undone_undoes_nothing_twice(beatless: Kit) -> None:
    run = beatless.start_run("order", {"failures": {"charge": 1}})
    beatless.work_until_idle()
    assert undone_steps() == ["ship", "charge"]
    beatless.client.cancel_run(run.run_id)
    finish(beatless)

    assert undone_steps() == ["ship", "charge", "charge", "reserve"]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


@pytest.mark.slow
def test_a_retry_of_a_run_that_was_undone_begins_at_the_beginning(beatless: Kit) -> None:
    for name in ("order", "pays"):
        run = ended(beatless, name)
        again = beatless.client.retry_run(run.run_id)
        finish(beatless)
        assert "reused" not in (beatless.client.events(again.run_id)[0].data or {})
        assert beatless.client.get_run(again.run_id).state is RunState.FAILED


@pytest.mark.parametrize("name", ["order", "pays"])
def test_a_retry_of_a_run_that_was_undone_has_its_deadline_and_begins_at_no_other_step(
    beatless: Kit, name: str
) -> None:
    run = beatless.start_run(name, {}, deadline=60)
    beatless.work_until_idle()

    with pytest.raises(CannotRetry, match="its steps were undone"):
        beatless.client.retry_run(run.run_id, from_step="deliver")
    again = beatless.client.retry_run(run.run_id)
    assert again.deadline_at is not None
    assert (again.deadline_at - again.created_at).total_seconds() == pytest.approx(60, abs=0.01)


def test_a_function_that_has_lost_its_undo_is_not_ended_by_its_deadline(beatless: Kit) -> None:
    run = beatless.start_run("pays", {"waits": True}, deadline=30)
    beatless.work_until_idle()
    known = beatless.app.plans["pays"]
    beatless.advance(31)

    @plan("pays")
    def lacks(run: RunContext[Any]) -> Any:
        return run.step(rest)

    beatless.app.plans["pays"] = lacks
    try:
        beatless.work_until_idle()
        assert beatless.event_types(run.run_id)[-1] == "UndoStarted"
    finally:
        beatless.app.plans["pays"] = known
    finish(beatless)
    assert undone_steps() == ["charge#2", "charge", "reserve"]


def test_a_run_whose_undo_the_plan_lacks_waits_for_a_worker_that_has_it(beatless: Kit) -> None:
    run = beatless.start_run("order", {"failures": {"charge": 1}})
    beatless.work_until_idle()
    known = beatless.app.plans["order"]
    lacks = Plan("order", [reserve, step(name="charge")(deliver.function), ship, deliver])
    beatless.app.plans["order"] = lacks
    try:
        finish(beatless)
        assert not beatless.client.get_run(run.run_id).state.final
    finally:
        beatless.app.plans["order"] = known
    finish(beatless)


CRASHES = [
    ("claim.committed", 2),
    ("step.before", 5),
    ("step.before", 6),
    ("step.effect_done", 5),
    ("step.committed", 4),
    ("step.committed", 5),
    ("task.before_ack", 1),
    ("task.before_ack", 2),
    ("relay.after_claim", 2),
    ("relay.after_publish", 2),
]


@pytest.mark.parametrize("name", ["order", pytest.param("pays", marks=pytest.mark.slow)])
def test_no_crash_keeps_a_step_from_being_undone(
    beatless: Kit, subtests: pytest.Subtests, name: str
) -> None:
    for point, nth in CRASHES:
        with subtests.test(point, nth=nth):
            with beatless.crash(at=point, nth=nth):
                run = beatless.start_run(name, {})
                beatless.work_until_idle()
            beatless.advance(LEASE_S + 1)
            finish(beatless)

            found = beatless.client.get_run(run.run_id)
            assert (found.state, found.error and found.error["type"]) == (RunState.FAILED, "Fatal")
            undone = [str(each) for each in steps_of(beatless, run.run_id, "StepFinished")]
            assert len([each for each in undone if "#undo:" in each]) == 3
            beatless.verify()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["wait.before", "wait.committed"])
def test_no_crash_while_children_end_keeps_a_step_from_being_undone(
    beatless: Kit, point: str
) -> None:
    with beatless.crash(at=point):
        run = beatless.start_run("has_children", {})
        beatless.work_until_idle()
    beatless.advance(LEASE_S + 1)
    finish(beatless)

    assert beatless.client.get_run(run.run_id).state is RunState.FAILED
    assert undone_steps() == ["reserve"]
    beatless.verify()


def test_a_step_whose_undo_nobody_would_find_again_fails_the_run(beatless: Kit) -> None:
    run = ended(beatless, "hides")
    assert "in a way that its code does not show" in run.error["message"]


def test_arguments_that_are_too_large_to_be_kept_fail_the_run(beatless: Kit) -> None:
    run = ended(beatless, "large")

    assert run.error["type"] == "BadPayload"
    assert "are stored, so that it can be undone" in run.error["message"]
    assert undone_steps() == []


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: step(name="x", undo=noted)(rest.function), "decorate it with @step"),
        (lambda: step(name="x", undo=reserve)(rest.function), "no undo of its own"),
        (lambda: step(name="x", undo=rest)(rest.function), "must take two arguments"),
        (lambda: Plan("p", [reserve, step(name="release")(rest.function)]), "a name of its own"),
        (lambda: Plan("p", [reserve], on_cancel=step(name="release")(rest.function)), "name"),
    ],
)
def test_an_undo_that_cannot_work_is_refused_when_the_plan_is_built(
    made: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        made()
