"""New code while runs wait everywhere: `plan check` names those that wait, the others go on."""

from collections import Counter
from typing import Any

import pytest

from beatless import Plan, RunContext, RunState, StepContext, map_, plan, retry, sleep, step, wait
from beatless.places import places
from beatless.testing import Kit

HOURS_S = 50_000.0

LATER = retry(max_attempts=2, initial=HOURS_S, cap=HOURS_S, jitter=0)
"""The first attempt at the place of a run fails: it waits there, with the step begun."""

DONE: Counter[tuple[str, str]] = Counter()
"""How often the body of a step has done its work, by run and key."""


def work(ctx: StepContext, *arguments: Any) -> str:
    if ctx.attempt == 1 and ctx.input["place"] == ctx.step:
        raise ValueError("later")
    DONE[ctx.run_id, ctx.key] += 1
    return ctx.step


pay, note, ship, send, check, pay_again = (
    step(name=name, retry=LATER)(work)
    for name in ("pay", "note", "ship", "send", "check", "pay_again")
)


@step
def tie(ctx: StepContext) -> str:
    return "tied"


@plan("parcel")
def parcel(run: RunContext[Any]) -> Any:
    if run.input["waits"]:
        run.wait("packed")
    return run.step(tie)


def inputs(place: str, number: int) -> list[dict[str, bool]]:
    return [{"waits": place == "parcels" and each == 0} for each in range(number)]


def before_the_steps(run: RunContext[Any]) -> None:
    place = run.input["place"]
    run.step(pay, 1)
    run.wait("go")
    run.sleep(HOURS_S if place == "sleep" else 60)
    run.child(parcel, {"waits": place == "child"}, id="child").result()
    run.map(parcel, inputs(place, 3), at_once=2, id="parcels")


@plan("shop")
def shop(run: RunContext[Any]) -> list[str]:
    before_the_steps(run)
    run.step(note)
    return [run.step(ship), run.step(pay, 2)]


@plan("shop", renamed={"ship": "send"}, removed=["note"])
def new_shop(run: RunContext[Any]) -> list[str]:
    """`ship` has another name, `note` is gone, `check` is new, and stands before a second `pay`."""
    before_the_steps(run)
    sent = run.step(send)
    run.step(check)
    run.step(pay, 3)
    return [sent, run.step(pay, 2)]


def listed_with(*names: Any, **options: Any) -> Plan:
    parcels = map_("parcels", parcel, inputs=lambda ctx: inputs(ctx.input["place"], 3), at_once=2)
    return Plan("listed", [pay, wait("go"), sleep(seconds=60), parcels, *names], **options)


listed = listed_with(note, ship, pay_again)
new_listed = listed_with(send, check, pay_again, renamed={"ship": "send"})

PLACES = {
    # where runs are, and whether the new code can go on there
    "shop": {
        "pay": True,
        "go": True,
        "sleep": True,
        "child": True,
        "parcels": True,
        "note": True,
        "ship": True,
        "pay#2": False,
    },
    "listed": {
        "pay": True,
        "go": True,
        "parcels": True,
        "note": False,
        "ship": True,
        "pay_again": True,
    },
}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [parcel, shop, listed]


def settle(kit: Kit, seconds: float) -> None:
    """Let so much time pass, and what follows from it happen."""
    kit.advance(seconds)
    kit.work_until_idle()


@pytest.mark.slow
@pytest.mark.parametrize("of_each", [1, pytest.param(6, marks=pytest.mark.long(minutes=1))])
def test_a_deploy_in_the_middle_loses_and_doubles_nothing(beatless: Kit, of_each: int) -> None:
    DONE.clear()
    app = beatless.app
    runs: dict[str, tuple[str, str]] = {}
    for name, at in PLACES.items():
        for place in [*at, "end"] * of_each:
            run = beatless.start_run(name, {"place": place})
            runs[run.run_id] = name, place
            if place != "go":
                beatless.signal(run.run_id, "go")
    beatless.work_until_idle()
    settle(beatless, 61)
    unfinished = {run_id for run_id, (_, place) in runs.items() if place != "end"}
    ended = {run_id for run_id in runs if beatless.client.get_run(run_id).state.final}
    assert Counter(runs[each] for each in ended) == Counter(
        place for run_id, place in runs.items() if run_id not in unfinished
    )

    app.plans |= {"shop": new_shop, "listed": new_listed}
    stuck = {run_id for run_id in unfinished if not PLACES[runs[run_id][0]][runs[run_id][1]]}

    def named() -> set[str]:
        """The runs that `plan check` names."""
        found = places(app.engine, app.journal, app.plans)
        return {run_id for each in found if each.waits for run_id in each.run_ids}

    assert Counter(map(runs.get, named())) == Counter(map(runs.get, stuck))
    for run_id, (_, place) in runs.items():
        if place == "go":
            beatless.signal(run_id, "go")
    for child in beatless.client.list_runs(plan="parcel", state="waiting", limit=200):
        beatless.signal(child.run_id, "packed")
    for seconds in (HOURS_S, 61, 0):
        settle(beatless, seconds)
    assert Counter(map(runs.get, named())) == Counter(map(runs.get, stuck))
    late = {each for each in unfinished if not beatless.client.get_run(each).state.final}
    assert Counter(map(runs.get, late)) == Counter(map(runs.get, stuck))

    app.plans |= {"shop": shop, "listed": listed}  # as a roll-back, or a worker of before
    settle(beatless, 60)
    for run_id in runs:
        assert beatless.client.get_run(run_id).state is RunState.COMPLETED, runs[run_id]
    assert set(DONE.values()) == {1}
    beatless.verify()
