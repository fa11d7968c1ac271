"""Plans and steps: what is refused, and that the refusal says where."""

from functools import partial
from time import thread_time

import pytest

from beatless import Finish, Goto, Plan, Snooze, StepContext, plan, step
from beatless.cli.plans import as_dict, as_svg, as_text
from beatless.orchestrator.outcomes import PlanError


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


def yields(ctx: StepContext):
    yield 1


async def async_yields(ctx: StepContext):
    yield 1


class Callable:
    def __call__(self, ctx: StepContext) -> Goto:
        return Goto("two")

    def method(self, ctx: StepContext) -> int:
        return 7


class AsyncCallable:
    async def __call__(self, ctx: StepContext) -> int:
        return 1


BOTH = step(name="both")(lambda a, b: 1)
BOTH_TOO = step(name="both")(lambda a, b: 2)


def moved(names: object) -> Plan:
    return Plan("p", [step(one), step(two)], moved=names)


def renamed(names: dict) -> Plan:
    return Plan("p", [step(one), step(two)], on_cancel=step(name="undo")(one), renamed=names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan("a b", [step(one)]), "plan name 'a b' must match"),
        (lambda: Plan("it's", [step(one)]), "plan name"),
        (lambda: Plan("", [step(one)]), "plan name"),
        (lambda: Plan("p", []), "plan p has no steps"),
        (
            lambda: Plan("p", [one]),
            "plan p: .* is not a step; decorate it with @step",
        ),
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
        (
            lambda: Plan("p", [step(one)], on_cancel=two),
            "plan p: on_cancel: .* is not a step; decorate",
        ),
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
        (lambda: step(timeout=float("inf"))(one), "step one: timeout must be more than 0"),
        (lambda: step(timeout="5")(one), "step one: timeout must be more than 0"),
        (lambda: step(retry=3)(one), "step one: retry is 3; give it a policy"),
        (lambda: step(name="")(one), "step name '' must match"),
        (lambda: step(name=5)(one), "step name 5 must match"),
        (lambda: step(lambda ctx: 1), "step name '<lambda>' must match .* give one"),
        (lambda: step(partial(one)), "has no name of its own"),
        (lambda: step(name="p")(partial(one, None)), "step p must take the context"),
        (lambda: step(Callable()), "has no name of its own"),
        (lambda: step(yields), "step yields is a generator"),
        (lambda: step(name="y")(partial(yields)), "step y is a generator"),
        (lambda: step(async_yields), "step async_yields is a generator"),
        (lambda: step(Callable), "step Callable is a class"),
        (lambda: step(dict), "step dict is a class"),
        (lambda: step(max), "step max is a builtin without a signature"),
        (lambda: Plan("p", [step(Callable.method)]), "step method must take exactly one argument"),
        (lambda: step(classmethod(one)), "step one is a classmethod, which cannot be called"),
        (lambda: step(name="n")(5), "step n is a int, which cannot be called"),
        (lambda: step(step(one)), "has no name of its own"),
        (lambda: renamed({"one": "two"}), "renamed has 'one' as a former name, and it is one of"),
        (lambda: renamed({"undo": "two"}), "renamed has 'undo' as a former name"),
        (lambda: renamed({"old": "three"}), "renamed leads from 'old' to 'three', which is not"),
        (lambda: renamed({"old": "older", "older": "old"}), "renamed goes round in a circle"),
        (lambda: renamed({"old": "old"}), "renamed goes round in a circle at 'old'"),
        (lambda: renamed({"old#2": "two"}), "renamed names 'old#2', which is no step name"),
        (lambda: renamed({"old": None}), "renamed names None, which is no step name"),
        (lambda: moved("one"), "moved is 'one'; give a list of names of its steps and waits"),
        (lambda: moved(["three"]), "moved is .'three'.; give a list of names of its steps"),
        (lambda: moved([None]), "moved is .None.; give a list of names of its steps"),
        (lambda: moved(5), "moved is 5; give a list of names of its steps"),
        (lambda: step(name="none")(lambda: 1), "step none must take the context"),
        (lambda: Plan("p", [BOTH]), "plan p: step both must take exactly one argument"),
        (lambda: Plan("p", [step(one)], on_cancel=BOTH), "step both must take exactly one"),
        (lambda: plan(one), 'needs the name of the plan: @plan\\("checkout"\\)'),
        (lambda: plan("of order")(one), "plan name 'of order' must match"),
        (lambda: plan("p", version=0)(one), "version is 0; give a number from 1 on"),
        (lambda: plan("p", version=2**30)(one), "version is 1073741824; give .* below 2..30"),
        (lambda: plan("p")(Callable.method), "plan p must take exactly one argument"),
        (lambda: plan("p")(lambda: 1), "plan p must take exactly one argument"),
        (lambda: plan("p")(Callable), "which is no function"),
        (lambda: plan("p")(classmethod(one)), "which is no function"),
        (lambda: plan("p")(max), "plan p is a builtin without a signature"),
        (lambda: plan("p")(yields), "plan p is a generator"),
        (lambda: plan("p")(step(one)), "plan p is step one: a plan asks for steps"),
        (lambda: plan("p")(plan("q")(one)), "plan p is plan q already"),
        (lambda: plan("p", on_cancel=BOTH)(one), "step both must take exactly one"),
        (lambda: plan("p", removed=["a b"])(one), "removed names 'a b', which is no step name"),
        (lambda: plan("p", renamed={"a": "b", "b": "a"})(one), "renamed goes round in a circle"),
        (lambda: plan("p", input=Callable)(one), "is no type of JSON"),
        (lambda: plan("p", input=int, default_input="x")(one), "plan p: default_input: the run's"),
        (lambda: plan("p")(lambda run: (BOTH, BOTH_TOO)), "plan p names two steps called both"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_when_it_is_built(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_a_step_can_be_called_like_its_function():
    assert step(one)(None) == 1
    assert step(name="other")(two)(None) == 2


@pytest.mark.parametrize(
    ("function", "result"),
    [(partial(lambda by, ctx: by, 5), 5), (Callable().method, 7), (id, None)],
)
def test_whatever_takes_the_context_and_can_be_called_is_a_step(function, result):
    found = step(name="s")(function)(None)
    assert found == (id(None) if result is None else result)


def test_what_an_object_is_annotated_to_return_is_said_by_its_call():
    assert step(name="s")(Callable()).outcomes == {Goto}
    assert step(name="s")(partial(goes)).outcomes == {Goto}


def test_renames_are_followed_to_the_name_that_a_step_has_now():
    plan = renamed({"a": "b", "b": "two", "c": "two", "unwind": "undo"})
    assert [plan.current(name) for name in ("a", "b#2", "c", "two", "d#3")] == [
        "two",
        "two#2",
        "two",
        "two",
        "d#3",
    ]
    assert plan.get("unwind") is plan.on_cancel
    assert plan.get("d") is None
    assert plan.version != renamed({}).version


@pytest.mark.slow
def test_a_plan_of_ten_thousand_steps_is_built_walked_and_drawn_in_no_time():
    steps = [step(name=f"s{number}")(one) for number in range(10_000)]
    began = thread_time()
    plan = Plan("many", steps)
    names, current = 0, plan.first
    while current is not None:
        names, current = names + 1, plan.after(current.name)
    assert names == 10_000
    assert as_text(plan).count("s9999") == 1
    assert as_svg(plan)
    assert len(as_dict(plan)["steps"]) == 10_000
    assert thread_time() - began < 30  # one second; two minutes if it is n²


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
