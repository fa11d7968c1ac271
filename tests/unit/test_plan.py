"""Plans and steps: what is refused, and that the refusal says where."""

import pytest

from beatless import Finish, Goto, Plan, Snooze, StepContext, step
from beatless.orchestrator.plan import PlanError


def one(ctx: StepContext) -> int:
    return 1


def two(ctx: StepContext) -> int:
    return 2


def goes(ctx: StepContext) -> Goto:
    return Goto("two")


def goes_or_ends(ctx: StepContext) -> Goto | Finish:
    return Finish()


async def asynchronous(ctx: StepContext) -> int:
    return 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan("a b", [step(one)]), "plan name 'a b' must match"),
        (lambda: Plan("it's", [step(one)]), "plan name"),
        (lambda: Plan("", [step(one)]), "plan name"),
        (lambda: Plan("p", []), "plan p has no steps"),
        (lambda: Plan("p", [one]), "plan p: .* is not a step; decorate it with @step"),
        (lambda: Plan("p", [step(one), step(one)]), "plan p has two steps called one"),
        (lambda: Plan("p", [step(one)], routes={"one": ["three"]}), "plan p: routes name 'three'"),
        (lambda: Plan("p", [step(one)], routes={"zero": []}), "plan p: routes name 'zero'"),
        (
            lambda: Plan("p", [step(goes), step(one), step(two)], routes={"goes": ["two"]}),
            "plan p: nothing leads to step one: the step before it goes elsewhere",
        ),
        (
            lambda: Plan(
                "p",
                [step(goes_or_ends), step(one), step(two)],
                routes={"goes_or_ends": ["goes_or_ends"], "one": ["two"], "two": ["one"]},
            ),
            "plan p: nothing leads to step one",
        ),
        (lambda: Plan("p", [step(goes), step(two)]), "plan p: step goes is annotated to return a"),
        (lambda: Plan("p", [step(one)], on_cancel=two), "plan p: on_cancel is .* not a step"),
        (
            lambda: Plan("p", [step(one)], on_cancel=step(one)),
            "plan p: on_cancel is one, which is also one of its steps",
        ),
        (
            lambda: Plan("p", [step(one)], on_cancel=step(terminate_on_cancel=True)(two)),
            "plan p: step two is called by a cancel and cannot also be ended by it",
        ),
        (
            lambda: Plan("p", [step(one)], default_input={"at": {1}}),
            "plan p: default_input.at is a set, which is not JSON",
        ),
        (lambda: step(name="a#2")(one), "step name 'a#2' must match"),
        (lambda: step(timeout=0)(one), "step one: timeout must be more than 0"),
        (lambda: step(timeout=float("nan"))(one), "step one: timeout must be more than 0"),
        (lambda: step(asynchronous), "step asynchronous is async"),
        (lambda: step(name="none")(lambda: 1), "step none must take exactly one argument"),
        (lambda: step(name="both")(lambda a, b: 1), "step both must take exactly one argument"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_when_it_is_built(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_a_step_can_be_called_like_its_function():
    assert step(one)(None) == 1
    assert step(name="other")(two)(None) == 2


def test_a_step_is_named_after_its_function_unless_told_otherwise():
    assert step(one).name == "one"
    assert step(name="Uno")(one).name == "Uno"


def test_steps_follow_in_the_order_of_the_list_and_the_last_one_ends():
    plan = Plan("p", [step(one), step(two)])
    assert plan.first.name == "one"
    assert plan.after("one") is plan.get("two")
    assert plan.after("two") is None
    assert plan.get("three") is None


def test_only_declared_routes_may_be_taken():
    plan = Plan("p", [step(one), step(two)], routes={"two": ["one"]})
    assert plan.may_go("two", "one")
    assert not plan.may_go("one", "two")


def test_the_version_depends_on_names_and_routes_and_not_on_code():
    plan = Plan("p", [step(one), step(two)])
    assert plan.version == Plan("p", [step(name="one")(two), step(name="two")(one)]).version
    assert plan.version != Plan("p", [step(two), step(one)]).version
    assert plan.version != Plan("p", [step(one), step(two)], routes={"two": ["one"]}).version


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_a_snooze_takes_a_real_number_of_seconds(seconds):
    with pytest.raises(ValueError, match="0 or more"):
        Snooze(seconds)


def test_outcomes_are_values():
    assert Goto("a", result=1) == Goto("a", 1)


def test_a_step_that_others_route_to_need_not_follow_any():
    plan = Plan("p", [step(goes), step(one), step(two)], routes={"goes": ["two", "one"]})
    assert plan.following("goes") == ["two", "one"]
    assert plan.following("one") == ["two"]


def test_the_on_cancel_step_is_known_by_name_and_follows_nothing():
    plan = Plan("p", [step(one)], on_cancel=step(two))
    assert plan.get("two") is plan.on_cancel
    assert plan.after("one") is None
    assert plan.after("two") is None
    assert plan.version != Plan("p", [step(one)]).version
