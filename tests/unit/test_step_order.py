"""Which step a version of a plan would leave out of a run that another version has begun."""

import random
from collections.abc import Sequence

import pytest

from beatless import Goto, Plan, step
from beatless.orchestrator.events import Event
from beatless.orchestrator.progress import fold
from beatless.orchestrator.step_order import changed_places, passed_by, removed

BODY = step(name="body")(lambda ctx: None)


def choice(ctx: object) -> Goto:
    raise NotImplementedError


def plan(names: str, *, choices: str = "", **options: object) -> Plan:
    steps = [
        step(name=name)(choice if name in choices else BODY.function) for name in names.split()
    ]
    return Plan("p", steps, **options)


def journal(told: str) -> list[Event]:
    """As in "a b b!": `a` and `b` have finished, and `b` has begun again. `a>c`: a Goto."""
    found = [Event(run_id="r", seq=1, ts=0, type="RunStarted", source="client", data={})]
    for word in told.split():
        name, goes, target = word.rstrip("!").partition(">")
        types = ["StepStarted"] + ["StepFinished"] * (not word.endswith("!"))
        for type in types:
            data = {"next": target} if goes and type == "StepFinished" else {}
            seq = len(found) + 1
            found.append(
                Event(run_id="r", seq=seq, ts=0, type=type, source="w", step=name, data=data)
            )
    return found


def left_out(now: Plan, told: str, steps: Sequence[str] | None) -> str | None:
    return passed_by(now, fold(now, journal(told)), lambda: steps)


@pytest.mark.parametrize(
    ("now", "told", "lost"),
    [
        # of runs that were started with "a b c d"
        ("b a c d", "", None),
        ("b a c d", "a!", "b"),
        ("b a c d", "a", "b"),
        ("b a c d", "a b!", None),
        ("b a c d", "a b", None),
        ("b a c d", "b a!", None),
        ("a c b d", "a!", None),
        ("a c b d", "a", None),
        ("a c b d", "a b!", "c"),
        ("a c b d", "a b", "c"),
        ("a c b d", "a b c!", None),
        ("a b c d", "a c!", "b"),  # a worker with `a c b d` has begun `c`
        ("a b c d", "a c", "b"),
        ("d a b c", "a!", "d"),
        ("d a b c", "a b c", "d"),  # nothing follows `c`
        ("d a b c", "a b c d!", None),
        ("d c b a", "a b!", "c"),
        ("c a d", "a!", "c"),
        ("c a d", "a", "c"),
        # added
        ("x a b c d", "a!", None),
        ("a b x c d", "a", None),
        ("x b a c d", "a!", "b"),
        ("b x a c d", "a x!", "b"),  # `x` is not in the order: counted from `a`
        ("a b x c d", "x!", None),  # from nowhere
        # gone
        ("a c d", "a!", None),
        ("a d c", "a c!", "d"),
    ],
)
def test_a_step_is_left_out_that_came_later_and_stands_before_the_place_now(
    now: str, told: str, lost: str | None
) -> None:
    assert left_out(plan(now), told, ["a", "b", "c", "d"]) == lost
    assert left_out(plan(now), told, None) is None  # of a version that nobody has stored
    if lost is not None:
        assert left_out(plan(now, moved=[lost]), told, ["a", "b", "c", "d"]) != lost


def test_names_are_those_of_now() -> None:
    old = ["a", "b", "c"]
    assert left_out(plan("pay a c", renamed={"b": "pay"}), "a!", old) == "pay"
    assert left_out(plan("a pay c", renamed={"b": "pay"}), "a!", old) is None
    assert left_out(plan("b first c", renamed={"a": "first"}), "a!", old) == "b"


def test_what_a_route_passes_by_or_an_earlier_turn_has_executed_is_not_left_out() -> None:
    routes = {"a": ["c"], "c": ["a"]}
    old = ["a", "b", "c"]
    assert left_out(plan("a b c", routes=routes), "a>c c!", old) is None
    assert left_out(plan("b a c", routes=routes), "a>c", old) is None
    assert left_out(plan("b a c", routes=routes), "a b c>a a!", old) is None
    assert left_out(plan("b a c", routes=routes), "a>c c>a a!", old) == "b"


def test_behind_a_step_that_must_choose_all_of_its_choices_may_come_and_none_must() -> None:
    old = ["a", "v", "b", "c"]
    forward = {"v": ["b", "c"]}
    assert left_out(plan("a v c b", choices="v", routes=forward), "a!", old) is None
    assert left_out(plan("b v a c", choices="v", routes={"v": ["a"]}), "v!", old) is None


def test_a_run_that_is_undone_or_stands_at_an_unknown_step_is_not_asked_for() -> None:
    undo = step(name="undo")(BODY.function)
    now = plan("b a c", on_cancel=undo)
    progress = fold(now, journal("a!"))
    progress.compensate(undo)
    assert passed_by(now, progress, lambda: ["a", "b", "c"]) is None
    assert left_out(plan("b c"), "a!", ["a", "b", "c"]) is None


@pytest.mark.parametrize(
    ("now", "told", "gone"),
    [
        # of runs that were started with "a b c d"
        ("a b c d", "a", ""),
        ("a c d", "", "b"),
        ("b c", "", "a d"),
        ("a c d", "a!", "b"),
        ("a d", "a!", "b c"),
        ("a x c", "a", "b d"),
        ("a c d", "a b c!", ""),
        ("a c d", "a c!", "b"),  # a worker with `a c d` has begun `c`
        ("a d c", "a!", "b"),
        ("x a d", "a x!", "b c"),
    ],
)
def test_a_step_was_removed_that_came_later_and_is_in_the_plan_no_more(
    now: str, told: str, gone: str
) -> None:
    old = ["a", "b", "c", "d"]
    found = removed(plan(now), fold(plan(now), journal(told)), old)
    assert found == gone.split()


def test_no_step_was_removed_that_has_a_new_name_or_that_only_a_route_leads_to() -> None:
    old = ["a", "b", "c"]
    renamed = plan("a pay c", renamed={"b": "pay"})
    assert removed(renamed, fold(renamed, journal("a!")), old) == []
    chooses = plan("a c", choices="a", routes={"a": ["c"]})
    assert removed(chooses, fold(chooses, journal("a!")), old) == []
    assert removed(chooses, fold(chooses, journal("")), old) == []


@pytest.mark.parametrize("told", ["a b!", "a b c>b b!"])
def test_of_a_run_that_waits_for_a_step_nothing_else_was_removed(told: str) -> None:
    now = plan("a c")
    assert removed(now, fold(now, journal(told)), ["a", "b", "c", "d"]) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_version_never_leaves_out_a_step_of_its_own_runs(seed: int) -> None:
    """Whatever routes they take, and wherever they are."""
    chance = random.Random(seed)
    names = ["a", "b", "c", "d", "e", "f"]
    for _ in range(200):
        routes = {
            name: chance.sample(names, chance.randint(1, 3)) for name in chance.sample(names, 3)
        }
        now = plan(" ".join(names), routes=routes)
        told, name = [], names[0]
        for _ in range(chance.randint(0, 12)):
            targets = routes.get(name, ())
            goes = chance.choice(targets) if targets and chance.random() < 0.5 else None
            told.append(f"{name}>{goes}" if goes else name)
            stands = fold(now, journal(" ".join(told))).step
            if stands is None:
                break
            name = stands.name
        else:
            assert left_out(now, " ".join([*told, f"{name}!"]), names) is None, (routes, told)
        assert left_out(now, " ".join(told), names) is None, (routes, told)


def test_an_order_has_changed_if_steps_of_both_versions_stand_otherwise() -> None:
    now = plan("a pay c", renamed={"b": "pay"})
    assert not changed_places(now, ["a", "b", "c"])
    assert not changed_places(now, ["x", "a", "c", "y"])
    assert changed_places(now, ["b", "a", "c"])
    assert not changed_places(now, [])
