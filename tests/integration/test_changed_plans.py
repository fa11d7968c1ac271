"""A plan that changes while runs are in flight: where each of them goes on, and where it waits."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    CannotRetry,
    Fatal,
    Goto,
    Plan,
    RunState,
    Snooze,
    StepContext,
    approve,
    child,
    retry,
    sleep,
    step,
    wait,
)
from beatless.api import create_api
from beatless.doctor import Doctor, Status
from beatless.orchestrator.plan import Element, Step
from beatless.orchestrator.progress import UNKNOWN_STEP
from beatless.places import places, why_it_waits
from beatless.testing import Kit

LEASE_S = 60
OLD = ("one", "charge", "mail")


def make(name: str, ledger: list[str], *, obeys: bool = True) -> Step:
    """A step that notes its key and attempt, and ends as the run's input says of it."""

    rested: list[bool] = []

    @step(name=name, retry=retry(max_attempts=3, initial=10, jitter=0))
    def body(ctx: StepContext) -> object:
        ledger.append(f"{name} {ctx.key.partition(':')[2]} {ctx.attempt}")
        match (ctx.input or {}).get(ctx.step) if obeys else None:
            case "fails" if ctx.attempt == 1:
                raise ValueError("away")
            case "snoozes" if not rested:
                rested.append(True)
                return Snooze(10)
            case "fatal":
                raise Fatal("for good")
            case "again":
                return Goto(name, result="first")
        return name

    return body


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("order", [make(name, []) for name in OLD])]


class Version:
    """A worker with one version of the plan, and what its bodies did."""

    def __init__(
        self,
        app: App,
        names: str,
        *,
        undo: str = "",
        obeys: bool = False,
        deployed: bool = True,
        **options: Any,
    ) -> None:
        self.ledger: list[str] = []
        self.plan = Plan(
            "order",
            [make(name, self.ledger, obeys=obeys) for name in names.split()],
            on_cancel=make(undo, self.ledger) if undo else None,
            **options,
        )
        self.app = App(app.settings, [self.plan])
        self.kit = Kit(self.app)
        if deployed:
            self.kit.apply_plans()

    def take(self, run_id: str, *, max_steps: int = 0) -> bool:
        """Execute the run as far as it goes, if it is due."""
        return self.kit.executor().execute(self.plan, run_id, 0, max_steps=max_steps)

    def close(self) -> None:
        self.kit.close()
        self.app.close()


Make = Callable[..., Version]


@pytest.fixture
def version(beatless_app: App) -> Iterator[Make]:
    made: list[Version] = []

    def version(names: str, **options: Any) -> Version:
        made.append(Version(beatless_app, names, **options))
        return made[-1]

    yield version
    for each in made:
        each.close()


def bring(kit: Kit, old: Version, where: str) -> str:
    """A run that the old version has brought there."""
    how = {"failed": {"charge": "fails"}, "snoozed": {"charge": "snoozes"}}.get(where)
    run_id = kit.start_run("order", how).run_id
    match where:
        case "killed":
            with old.kit.crash("step.before", nth=2):
                old.take(run_id)
        case "failed" | "snoozed":
            old.take(run_id)
        case "finished":
            old.take(run_id, max_steps=2)
        case "mail begun":
            with old.kit.crash("step.before", nth=3):
                old.take(run_id)
    old.ledger.clear()
    kit.advance(LEASE_S + 1)
    return run_id


STATES = ("not begun", "killed", "failed", "snoozed", "finished", "mail begun")
CHARGE = {"killed": 2, "failed": 2, "snoozed": 1}
"""The attempt of `charge` that comes next."""


def expected(names: str, where: str, *, renamed: bool) -> list[str] | None:
    """What the new version executes; None if it waits."""
    if where == "not begun":
        return [f"{name} {name} 1" for name in names.split()]
    if where == "finished":
        return ["mail mail 1"]
    if where == "mail begun":
        return ["mail mail 2"]
    if renamed:
        return [f"pay charge {CHARGE[where]}", "mail mail 1"]
    if "charge" in names.split():
        return [f"charge charge {CHARGE[where]}", "mail mail 1"]
    return None


PLANS = [
    ("one pack pay mail", False),
    ("one pack pay mail", True),
    ("one pack charge mail", False),
    ("one mail", False),
]


@pytest.mark.parametrize(("names", "renamed"), PLANS)
def test_a_run_goes_on_where_it_stands_or_waits_for_a_version_that_knows_the_place(
    beatless: Kit, version: Make, subtests: pytest.Subtests, names: str, renamed: bool
) -> None:
    old = version("one charge mail", obeys=True)
    runs = {where: bring(beatless, old, where) for where in STATES}
    new = version(names, renamed={"charge": "pay"} if renamed else None)

    for where, run_id in runs.items():
        with subtests.test(where):
            new.ledger.clear()
            old.ledger.clear()

            assert new.take(run_id)

            run = beatless.client.get_run(run_id)
            todo = expected(names, where, renamed=renamed)
            if todo is not None:
                assert (run.state, new.ledger) == (RunState.COMPLETED, todo)
            else:
                assert (run.state, new.ledger) == (RunState.QUEUED, [])
                assert not new.take(run_id)  # not before its time
                beatless.advance(16)
                assert new.take(run_id)
                now = beatless.client.get_run(run_id)
                assert now.last_seq == run.last_seq  # nothing was counted
                beatless.advance(16)
                assert old.take(run_id)
                assert old.ledger == [f"charge charge {CHARGE[where]}", "mail mail 1"]
                assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    beatless.verify()


def stands(kit: Kit, old: Version, name: str, how: str) -> str:
    """A run that the old version has brought to this step, in this way."""
    number = old.plan.names.index(name) + 1
    run_id = old.kit.start_run("order", {name: how}).run_id
    if how == "killed":
        with old.kit.crash("step.before", nth=number):
            old.take(run_id)
    else:
        old.take(run_id, max_steps=number if how == "finished" else 0)
    old.ledger.clear()
    kit.advance(LEASE_S + 1)
    return run_id


@pytest.mark.parametrize("how", ["killed", "fails", "snoozes", "finished"])
def test_a_run_waits_for_the_former_order_if_the_new_one_would_leave_out_a_step_of_its(
    beatless: Kit, version: Make, how: str
) -> None:
    """All other orders and places: `tests/unit/test_step_order.py`."""
    old = version("a b c", obeys=True)
    run_id = stands(beatless, old, "a", how)
    new = version("b a c")
    for _ in range(2):
        assert new.take(run_id)
        assert (beatless.client.get_run(run_id).state, new.ledger) == (RunState.QUEUED, [])
        beatless.advance(16)
    assert old.take(run_id)
    done = [line.split()[0] for line in old.ledger]
    assert done == (["b", "c"] if how == "finished" else ["a", "b", "c"])
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    beatless.verify()


@pytest.mark.parametrize("executed_by", ["work_until_idle", "step"])
def test_a_test_whose_plan_changes_needs_no_deploy_to_see_that_a_run_waits(
    version: Make, executed_by: str
) -> None:
    old, new = (version(names, obeys=True, deployed=False) for names in ("a b c", "b a c"))
    kit = old.kit
    run_id = kit.start_run("order", {"a": "snoozes"}).run_id
    kit.work_until_idle()
    kit.app.plans["order"] = new.plan
    kit.advance(11)
    if executed_by == "step":
        kit.drain_outbox_once()
        kit.step(run_id)
    kit.work_until_idle()
    assert new.ledger == []
    assert 'moved=["b"]' in kit.describe(run_id)
    kit.app.plans["order"] = old.plan
    kit.advance(16)
    kit.work_until_idle()
    assert kit.client.get_run(run_id).state is RunState.COMPLETED


def test_runs_go_on_without_a_step_that_the_plan_says_has_moved(
    beatless: Kit, version: Make
) -> None:
    run_id = stands(beatless, version("a b c d", obeys=True), "a", "killed")
    new = version("b a c d", moved=["b"])
    assert new.take(run_id)
    assert [line.split()[0] for line in new.ledger] == ["a", "c", "d"]
    unbegun = new.app.client.start_run("order").run_id
    new.ledger.clear()
    assert new.take(unbegun)
    assert [line.split()[0] for line in new.ledger] == ["b", "a", "c", "d"]
    beatless.verify()


def test_an_old_worker_does_not_leave_out_what_the_new_order_has_behind_the_place(
    beatless: Kit, version: Make
) -> None:
    """A run of the old version, which a new worker has taken on from its first step."""
    old, new = version("a b c d", obeys=True), version("a c b d", obeys=True)
    run_id = stands(beatless, old, "a", "finished")
    with new.kit.crash("step.before"):
        new.take(run_id)  # `c` has begun
    beatless.advance(LEASE_S + 1)
    assert old.take(run_id)
    assert old.ledger == []
    beatless.advance(16)
    new.ledger.clear()
    assert new.take(run_id)
    assert [line.split()[0] for line in new.ledger] == ["c", "b", "d"]
    beatless.verify()


def test_a_wait_that_has_moved_is_not_left_out(beatless: Kit, version: Make) -> None:
    old = version("a b", obeys=True)
    begun, asks = old.plan.steps[0], wait("paid")
    first, then = (
        App(old.app.settings, [Plan("order", [begun, asks])]),
        Plan("order", [asks, begun]),
    )
    first.client.apply_plans()
    run_id = first.client.start_run("order", {"a": "fails"}).run_id
    old.kit.executor().execute(first.plans["order"], run_id, 0)
    beatless.advance(LEASE_S)
    assert old.kit.executor().execute(then, run_id, 0)
    assert beatless.client.get_run(run_id).state is RunState.QUEUED
    assert old.ledger == ["a a 1"]
    first.close()


def test_a_run_of_a_version_that_nobody_has_stored_goes_on_as_if_its_steps_were_new(
    beatless: Kit, version: Make
) -> None:
    old = version("a b c", obeys=True, deployed=False)
    run_id = old.app.client.start_run("order").run_id
    old.take(run_id, max_steps=1)
    new = version("b a c")
    assert new.take(run_id)
    assert new.ledger == ["c c 1"]
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED


def test_a_run_that_waits_for_the_former_order_is_told_with_the_step_and_what_helps(
    beatless: Kit, version: Make
) -> None:
    old = version("a b c", obeys=True)
    run_id = stands(beatless, old, "a", "fails")
    unbegun = old.kit.start_run("order").run_id
    new = version("b a c")

    def found() -> list[tuple[str | None, str | None, str | None, list[str]]]:
        app = new.app
        return [
            (place.step, place.waits, place.advice, place.run_ids)
            for place in places(app.engine, app.journal, app.plans)
        ]

    before = found()  # as `beatless plan check` has it before the deploy
    assert new.take(run_id)
    assert found() == before
    (waits_there, goes_on) = before
    assert waits_there[:2] + tuple(waits_there[3]) == ("a", UNKNOWN_STEP, run_id)
    assert 'moved=["b"]' in str(waits_there[2])
    assert goes_on == (None, None, None, [unbegun])
    (finding,) = Doctor(new.app).examine(("plans",))
    assert finding.status is Status.WARNING
    assert f"order.a (1: {run_id})" in finding.text
    assert 'moved=["b"]' in finding.advice
    assert "has step a, and leaves out none that is next" in (
        beatless.client.explain(run_id)[-2].text
    )
    app = new.app
    told = why_it_waits(app.engine, app.journal, app.plans, run_id)
    assert told is not None
    assert told.message == (
        "the plan has b before a, behind which it came when the run was started: the run would end "
        "without it"
    )


@pytest.mark.parametrize("where", [*CHARGE, "finished", "mail begun"])
def test_an_old_worker_gives_back_a_run_that_stands_at_a_step_it_does_not_know(
    beatless: Kit, version: Make, where: str
) -> None:
    new, old = version("one charge mail", obeys=True), version("one ship")
    run_id = bring(beatless, new, where)
    for _ in range(3):
        assert old.take(run_id)
        beatless.advance(16)
    assert old.ledger == []
    assert new.take(run_id)
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    beatless.verify()


def test_an_old_worker_does_not_pass_by_a_step_that_comes_next_and_that_it_does_not_know(
    beatless: Kit, version: Make
) -> None:
    """Given back between two steps, as at each deploy: nothing of the next one has begun."""
    new, old = version("reserve charge ship"), version("reserve ship")
    run_id = beatless.start_run("order").run_id
    new.take(run_id, max_steps=1)
    assert old.take(run_id)
    assert old.ledger == []
    beatless.advance(16)
    assert new.take(run_id)
    assert new.ledger == ["reserve reserve 1", "charge charge 1", "ship ship 1"]


def waits(postgres: psycopg.Connection, run_id: str) -> tuple[str, float]:
    """Why it waits, and for how many seconds more."""
    found = postgres.execute(
        "SELECT reason, extract(epoch FROM due_at - clock_timestamp())::float8 "
        "FROM dispatches WHERE run_id = %s",
        (run_id,),
    ).fetchone()
    assert found is not None
    return found


def test_who_waits_for_a_version_is_looked_for_less_and_less_often_and_never_in_a_hurry(
    beatless: Kit, version: Make, postgres: psycopg.Connection
) -> None:
    old, new = version("one charge mail", obeys=True), version("one mail")
    run_id = beatless.start_run("order", {"charge": "fails"}).run_id
    old.take(run_id)
    beatless.advance(10)
    delays = []
    for _ in range(4):
        assert new.take(run_id)
        reason, delay = waits(postgres, run_id)
        assert reason == UNKNOWN_STEP
        delays.append(delay)
        beatless.advance(delay + 1)
    assert delays[0] < 6
    assert delays == sorted(delays)
    assert 14 < delays[-1] <= 15  # as long as a lost message may take
    told = beatless.client.explain(run_id)
    assert "a worker whose version of plan order has step charge" in told[-2].text


def test_a_renamed_step_goes_on_through_three_versions_and_each_hands_back_what_it_cannot_know(
    beatless: Kit, version: Make
) -> None:
    first = version("one charge mail", obeys=True)
    second = version("one pay mail", obeys=True, renamed={"charge": "pay"})
    third = version("one settle mail", renamed={"charge": "pay", "pay": "settle"})
    run_id = beatless.start_run("order", {"charge": "fails"}).run_id
    first.take(run_id)
    beatless.advance(10)
    with second.kit.crash("step.before"):
        second.take(run_id)
    beatless.advance(LEASE_S + 1)
    first.ledger.clear()
    for stranger in (first, version("one mail")):
        assert stranger.take(run_id)
        assert stranger.ledger == []
        beatless.advance(16)
    assert third.take(run_id)
    assert third.ledger == ["settle charge 3", "mail mail 1"]
    begun = [
        (event.step, event.attempt, event.data)
        for event in beatless.client.events(run_id)
        if event.type == "StepStarted"
    ]
    assert begun[1:4] == [
        ("charge", 1, None),
        ("pay", 2, {"renamed_from": "charge"}),
        ("settle", 3, {"renamed_from": "charge"}),
    ]
    beatless.verify()


def test_a_second_visit_is_renamed_with_its_step(beatless: Kit, version: Make) -> None:
    old = version("one charge mail", obeys=True, routes={"charge": ["charge"]})
    new = version("one pay mail", renamed={"charge": "pay"})
    run_id = beatless.start_run("order", {"charge": "again"}).run_id
    with old.kit.crash("step.before", nth=3):
        old.take(run_id)
    beatless.advance(LEASE_S + 1)
    assert new.take(run_id)
    assert new.ledger == ["pay charge#2 2", "mail mail 1"]
    beatless.verify()


def test_a_route_to_the_former_name_of_a_step_is_a_route_to_it(
    beatless: Kit, version: Make
) -> None:
    """One that the journal has, and one that a body takes."""
    leap = step(name="leap")(lambda ctx: Goto("charge"))
    old = version("one charge mail")
    new = version("one pay mail")
    before = Plan("order", [leap, *old.plan.steps], routes={"leap": ["charge"]})
    after = Plan(
        "order", [leap, *new.plan.steps], routes={"leap": ["pay"]}, renamed={"charge": "pay"}
    )
    for plan in (before, after):
        run_id = beatless.start_run("order").run_id
        old.kit.executor().execute(plan, run_id, 0, max_steps=1)
        assert new.kit.executor().execute(after, run_id, 0)
    assert new.ledger == ["pay pay 1", "mail mail 1"] * 2
    beatless.verify()


def test_a_retry_knows_steps_by_all_of_their_names(beatless: Kit, version: Make) -> None:
    old = version("one charge mail", obeys=True)
    run_id = beatless.start_run("order", {"charge": "fatal"}).run_id
    old.take(run_id)
    new = version("zero one pay mail", renamed={"charge": "pay"})
    for from_step in (None, "charge", "pay"):
        again = new.app.client.retry_run(run_id, from_step)
        assert new.take(again.run_id)
        assert new.ledger == ["pay pay 1", "mail mail 1"]
        new.ledger.clear()
    again = new.app.client.retry_run(run_id, "one")
    assert new.take(again.run_id)  # at one, not at the new beginning
    assert new.ledger == ["one one 1", "pay pay 1", "mail mail 1"]
    for gone in ("charge", None):
        with pytest.raises(CannotRetry, match="has no step charge any more; if it was renamed"):
            version("one mail").app.client.retry_run(run_id, gone)
    moved = version("charge one mail")
    again = moved.app.client.retry_run(run_id)
    assert moved.take(again.run_id)
    assert moved.ledger == ["charge charge 1", "mail mail 1"]  # `one` had finished
    beatless.verify()


def test_the_step_that_undoes_goes_on_under_its_new_name_or_waits(
    beatless: Kit, version: Make, postgres: psycopg.Connection
) -> None:
    old = version("one charge mail", obeys=True, undo="refund")
    run_id = beatless.start_run("order", {"charge": "fails", "refund": "fails"}).run_id
    old.take(run_id)
    old.app.client.cancel_run(run_id)
    assert old.take(run_id)
    assert old.ledger[-1] == "refund refund 1"
    beatless.advance(10)
    strangers = (version("one charge mail", undo="undo"), version("one charge mail"))
    for stranger in strangers:
        assert stranger.take(run_id)
        assert stranger.ledger == []
        reason, delay = waits(postgres, run_id)
        assert (reason, delay > 0) == (UNKNOWN_STEP, True)
        beatless.advance(16)
    new = version("one charge mail", undo="undo", renamed={"refund": "undo"})
    assert new.take(run_id)
    assert new.ledger == ["undo refund 2"]
    assert beatless.client.get_run(run_id).state is RunState.CANCELLED
    beatless.verify()


@pytest.mark.parametrize("where", ["killed", "failed", "snoozed", "finished"])
def test_a_cancelled_run_waits_for_a_version_that_has_the_step_which_undoes_it(
    beatless: Kit, version: Make, postgres: psycopg.Connection, where: str
) -> None:
    """Nothing of the step has begun, and the new plan has none."""
    old = version("one charge mail", obeys=True, undo="refund")
    new = version("one charge mail")
    run_id = bring(beatless, old, where)
    old.app.client.cancel_run(run_id)
    assert [place.step for place in places(new.app.engine, new.app.journal, new.app.plans)] == [
        "refund"
    ]
    assert new.take(run_id)
    assert new.ledger == []
    reason, delay = waits(postgres, run_id)
    assert (reason, delay > 0) == (UNKNOWN_STEP, True)
    (place,) = places(new.app.engine, new.app.journal, new.app.plans)
    assert (place.step, place.waits) == ("refund", UNKNOWN_STEP)
    assert "has step refund" in beatless.client.explain(run_id)[-2].text
    (found,) = beatless.client.list_runs(step="refund")
    assert found.run_id == run_id
    beatless.advance(16)
    renamed = version("one charge mail", undo="undo", renamed={"refund": "undo"})
    assert renamed.take(run_id)
    assert renamed.ledger == ["undo undo 1"]
    assert beatless.client.get_run(run_id).state is RunState.CANCELLED
    beatless.verify()


def test_a_run_that_was_ended_without_what_its_cancel_promised_can_be_retried(
    beatless: Kit, version: Make
) -> None:
    """A worker had it that knows no step which undoes it: its plan decides."""
    old, new = version("one charge mail", undo="refund"), version("one charge mail")
    run_id = beatless.start_run("order").run_id
    cancels = step(name="one")(lambda ctx: old.app.client.cancel_run(ctx.run_id).run_id)
    plan = Plan("order", [cancels, *new.plan.steps[1:]])
    assert new.kit.executor().execute(plan, run_id, 0)
    assert beatless.client.get_run(run_id).state is RunState.CANCELLED
    again = new.app.client.retry_run(run_id)
    assert new.take(again.run_id)
    assert new.ledger == ["charge charge 1", "mail mail 1"]
    beatless.verify()


@pytest.mark.parametrize("undo", ["", "refund"])
def test_a_cancel_ends_a_run_that_waits_for_a_version(
    beatless: Kit, version: Make, undo: str
) -> None:
    old = version("one charge mail", obeys=True, undo=undo)
    new = version("one mail", undo=undo)
    run_id = beatless.start_run("order", {"charge": "fails"}).run_id
    old.take(run_id)
    beatless.advance(10)
    assert new.take(run_id)
    new.app.client.cancel_run(run_id)
    if undo:
        assert new.take(run_id)
    assert new.ledger == (["refund refund 1"] if undo else [])
    assert beatless.client.get_run(run_id).state is RunState.CANCELLED
    beatless.verify()


def test_a_run_that_waits_for_a_version_ends_at_its_deadline(
    beatless: Kit, version: Make, postgres: psycopg.Connection
) -> None:
    old, new = version("one charge mail", obeys=True), version("one mail")
    run_id = beatless.start_run("order", {"charge": "fails"}, deadline=20).run_id
    old.take(run_id)
    beatless.advance(12)
    assert new.take(run_id)
    _, delay = waits(postgres, run_id)
    assert delay < 8
    beatless.advance(9)
    assert new.take(run_id)
    run = beatless.client.get_run(run_id)
    assert run.error is not None
    assert (run.state, run.error["type"]) == (RunState.FAILED, "DeadlineExceeded")
    beatless.verify()


def test_a_run_that_waits_for_a_version_is_told_by_doctor_and_counted(
    beatless: Kit, version: Make, beatless_app: App
) -> None:
    def counted() -> float | None:
        beatless_app.metrics.postgres.forget()
        registry = beatless_app.metrics.registry
        return registry.get_sample_value("beatless_runs_unknown_step", {"plan": "order"})

    create_api(beatless_app)
    old, new = version("one charge mail", obeys=True), version("one mail")
    run_id = beatless.start_run("order", {"charge": "fails"}).run_id
    old.take(run_id)
    beatless.advance(10)
    assert counted() == 0
    assert new.take(run_id)
    assert counted() == 1
    (finding,) = Doctor(new.app).examine(("plans",))
    assert finding.status is Status.WARNING
    assert f"order.charge (1: {run_id})" in finding.text
    assert "renamed=" in finding.advice
    beatless.advance(16)
    assert old.take(run_id)
    assert counted() == 0
    (finding,) = Doctor(new.app).examine(("plans",))
    assert finding.status is Status.OK


@pytest.mark.parametrize("where", [*CHARGE, "finished", "mail begun"])
def test_a_rename_that_the_old_version_was_told_of_goes_forth_and_back(
    beatless: Kit, version: Make, where: str
) -> None:
    """A rolling deploy in two steps, and its roll-back: same key, same attempts, same results."""
    told = version("one charge mail", obeys=True, renamed={"pay": "charge"})
    run_id = bring(beatless, told, where)
    new = version("one pay mail", renamed={"charge": "pay"})
    with new.kit.crash("step.before"):
        new.take(run_id)
    beatless.advance(LEASE_S + 1)
    assert told.take(run_id)
    mail = 3 if where == "mail begun" else 2
    paid = [] if where in ("finished", "mail begun") else [f"charge charge {CHARGE[where] + 1}"]
    assert told.ledger == ([*paid, "mail mail 1"] if paid else [f"mail mail {mail}"])
    beatless.verify()


def test_the_results_of_a_renamed_step_have_the_name_that_each_version_gives_it(
    beatless: Kit, version: Make
) -> None:
    new = version("one pay mail", renamed={"charge": "pay"})
    run_id = beatless.start_run("order").run_id
    new.take(run_id, max_steps=2)
    told = version("one charge mail", renamed={"pay": "charge"})
    reads = step(name="mail")(lambda ctx: ctx.results["charge"])
    plan = Plan("order", [*told.plan.steps[:2], reads], renamed={"pay": "charge"})
    assert told.kit.executor().execute(plan, run_id, 0)
    assert beatless.client.get_run(run_id).result == "pay"


SUBSTITUTES: dict[str, Callable[[list[str]], Element]] = {
    "step": lambda ledger: make("charge", ledger),
    "wait": lambda _: wait("charge"),
    "sleep": lambda _: sleep(days=1, name="charge"),
    "approval": lambda _: approve("charge"),
    "child": lambda _: child("charge", OTHER),
}
OTHER = Plan("other", [make("other", [])])


@pytest.mark.parametrize("kind", SUBSTITUTES)
def test_what_has_begun_is_not_passed_by_as_something_else_of_its_name(
    beatless: Kit, version: Make, kind: str
) -> None:
    """It has begun as each of them in turn; only a version with the same goes on there."""
    ledger: list[str] = []

    def plan(kind: str) -> Plan:
        steps = (make("one", ledger), SUBSTITUTES[kind](ledger), make("mail", ledger))
        return Plan("order", steps)

    app = App(beatless.app.settings, [OTHER])
    kit, begun_as = Kit(app), plan(kind)
    run_id = beatless.start_run("order").run_id
    if kind == "step":
        with kit.crash("step.before", nth=2):
            kit.executor().execute(begun_as, run_id, 0)
        beatless.advance(LEASE_S + 1)
    else:
        kit.executor().execute(begun_as, run_id, 0)
    seq = beatless.client.get_run(run_id).last_seq
    ledger.clear()
    for other in SUBSTITUTES.keys() - {kind}:
        beatless.client.signal_run(run_id, other)  # which makes a run that waits due
        beatless.drain_outbox_once()
        beatless.advance(16)
        assert kit.executor().execute(plan(other), run_id, 0), other
        begun = {"StepStarted", "WaitStarted", "ChildrenStarted", "StepFinished", "RunFinished"}
        later = beatless.client.events(run_id, from_seq=seq)
        assert [event.type for event in later if event.type in begun] == [], other
    assert ledger == []
    app.close()
    kit.close()
