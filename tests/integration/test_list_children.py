"""Elements of lists of steps that start runs of other plans."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    ChildFailed,
    ElementContext,
    Goto,
    Plan,
    RunState,
    StepContext,
    child,
    map_,
    step,
    wait,
)
from beatless.orchestrator.outcomes import PlanError
from beatless.testing import Kit


@step
def pack(ctx: StepContext) -> str:
    if ctx.input == "broken":
        raise ValueError("it broke")
    return f"parcel {ctx.input}"


@step
def reserve(ctx: StepContext) -> list[Any]:
    return list(ctx.input["lines"])


@step
def ship(ctx: StepContext) -> Any:
    parcels = ctx.results["parcels"]
    return [each.type if isinstance(each, ChildFailed) else each for each in parcels]


@step
async def ship_async(ctx: StepContext) -> Any:
    return [*ctx.results["parcels"], type(ctx.results["parcels"]).__name__]


@step
def release(ctx: StepContext) -> Any:
    failed = ctx.results.get("parcels") or ctx.results.get("one")
    return {"released": failed["type"]}


@step
def refund(ctx: StepContext) -> None:
    ctx.trace("undone", results=sorted(ctx.results))


parcel = Plan("parcel", [pack], queue="children")
slow_parcel = Plan("slow_parcel", [wait("go"), pack], queue="children")

INPUTS: list[Any] = []


def lines(ctx: ElementContext) -> Any:
    INPUTS.append(ctx.run_id)
    return ctx.results["reserve"]


def changing(ctx: ElementContext) -> list[int]:
    INPUTS.append(ctx.run_id)
    return [len(INPUTS), 2, 3]


PLANS = [
    parcel,
    slow_parcel,
    Plan("fulfil", [reserve, map_("parcels", parcel, inputs=lines, at_once=2), ship]),
    Plan("collects", [reserve, map_("parcels", parcel, failure="collect"), ship]),
    Plan("awaits", [reserve, map_("parcels", parcel), ship_async]),
    Plan("routed", [reserve, map_("parcels", parcel, on_failure=Goto("release")), ship, release]),
    Plan("fails", [reserve, map_("parcels", parcel), ship]),
    Plan("one", [child("one", parcel)]),
    Plan("chosen", [child("one", parcel, input=lambda ctx: ctx.tags["line"]), wait("go")]),
    Plan("two", [child("one", parcel), child("two", parcel)]),
    Plan("one_routed", [child("one", parcel, on_failure=Goto("release")), release]),
    Plan("undone", [reserve, map_("parcels", slow_parcel), ship], on_cancel=refund),
    Plan("no_list", [map_("parcels", parcel), ship]),
    Plan("raises", [map_("parcels", parcel, inputs=lambda ctx: 1 / 0), ship]),
    Plan("changes", [map_("parcels", slow_parcel, inputs=changing, at_once=1), ship]),
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return PLANS


LEASE_S = 60


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


def ended(kit: Kit, name: str, input: Any = None, **options: Any) -> Any:
    run = kit.start_run(name, input, **options)
    kit.work_until_idle()
    return kit.client.get_run(run.run_id)


def types_of(kit: Kit, run_id: str) -> list[str]:
    return [event.type for event in kit.client.events(run_id)]


def test_an_element_starts_a_run_for_each_input_and_the_next_step_finds_the_results(
    beatless: Kit,
) -> None:
    found = ended(beatless, "fulfil", {"lines": [1, 2, 3, 4, 5]})

    assert found.result == [f"parcel {line}" for line in (1, 2, 3, 4, 5)]
    children = beatless.children(found.run_id)
    assert [(each.input, each.child_no) for each in children] == [(n, n) for n in range(1, 6)]
    assert types_of(beatless, found.run_id) == [
        "RunStarted",
        "StepStarted",
        "StepFinished",
        "ChildrenStarted",
        "ChildrenFinished",
        "StepStarted",
        "StepFinished",
        "RunFinished",
    ]
    beatless.verify()


def test_an_async_step_finds_the_results_read(beatless: Kit) -> None:
    assert ended(beatless, "awaits", {"lines": [1, 2]}).result == ["parcel 1", "parcel 2", "list"]


def test_a_map_of_nothing_ends_at_once(beatless: Kit) -> None:
    assert ended(beatless, "fulfil", {"lines": []}).result == []


def test_a_map_collects_failures_where_it_is_asked_to(beatless: Kit) -> None:
    found = ended(beatless, "collects", {"lines": [1, "broken"]})
    assert found.result == ["parcel 1", "ValueError"]


@pytest.mark.parametrize(
    ("name", "input"), [("routed", {"lines": [1, "broken"]}), ("one_routed", "broken")]
)
def test_a_failure_goes_on_where_the_element_says(beatless: Kit, name: str, input: Any) -> None:
    found = ended(beatless, name, input)

    assert found.result == {"released": "ValueError"}
    (end,) = [e.data for e in beatless.client.events(found.run_id) if e.type == "ChildrenFinished"]
    assert (end or {})["next"] == "release"
    beatless.verify()


def test_a_failure_fails_the_run_where_the_element_says_nothing(beatless: Kit) -> None:
    found = ended(beatless, "fails", {"lines": ["broken"]})

    (broken,) = beatless.children(found.run_id)
    assert (found.state, found.error["type"], found.error["child"]) == (
        RunState.FAILED,
        "ChildFailed",
        broken.run_id,
    )
    beatless.verify()


def test_the_result_of_a_run_is_that_of_a_child_at_its_end(beatless: Kit) -> None:
    assert ended(beatless, "one", "x").result == "parcel x"


def test_a_child_gets_what_finished_last_unless_a_function_says_otherwise(beatless: Kit) -> None:
    assert ended(beatless, "two", "x").result == "parcel parcel x"

    chosen = ended(beatless, "chosen", "x", tags={"line": "7"})
    assert chosen.state is RunState.WAITING
    assert [each.input for each in beatless.children(chosen.run_id)] == ["7"]
    beatless.signal(chosen.run_id, "go")
    beatless.work_until_idle()
    assert beatless.client.get_run(chosen.run_id).result == "parcel 7"


@pytest.mark.parametrize(
    ("name", "type", "message"),
    [
        ("no_list", "PlanError", "parcels starts a child for each member of a list, and got str"),
        ("raises", "ZeroDivisionError", "division by zero"),
    ],
)
def test_inputs_that_cannot_be_had_fail_the_run_before_a_child_is_started(
    beatless: Kit, name: str, type: str, message: str
) -> None:
    found = ended(beatless, name, "x")

    assert found.error["type"] == type
    assert message in found.error["message"]
    assert beatless.children(found.run_id) == []


def test_a_run_whose_inputs_have_changed_waits_as_a_changed_call(beatless: Kit) -> None:
    INPUTS.clear()
    run = beatless.start_run("changes", "x")
    beatless.work_until_idle()
    (first,) = beatless.children(run.run_id)
    assert (first.input, INPUTS) == (1, [run.run_id])
    beatless.signal(first.run_id, "go")
    with pytest.raises(AssertionError, match="does not do the same when it is called again"):
        beatless.work_until_idle()

    assert len(beatless.children(run.run_id)) == 1
    with beatless.app.engine.connect() as connection:
        status = beatless.app.journal.dispatch_status(connection, run.run_id)
    assert status.dispatch is not None
    assert status.dispatch[2] == "changed_call"


def test_a_cancel_goes_down_and_the_run_is_undone(beatless: Kit) -> None:
    run = beatless.start_run("undone", {"lines": [1, 2]})
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.WAITING

    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    assert {each.state for each in beatless.children(run.run_id)} == {RunState.CANCELLED}
    (trace,) = [e.data for e in beatless.client.events(run.run_id) if e.type == "DebugTrace"]
    assert (trace or {})["results"] == ["reserve"]
    beatless.verify()


def test_a_child_without_a_number_left_keeps_no_other_from_its_cancel(
    beatless: Kit, postgres: psycopg.Connection[Any]
) -> None:
    run = beatless.start_run("undone", {"lines": [1, 2, 3]})
    beatless.work_until_idle()
    full, *others = (child.run_id for child in beatless.children(run.run_id))
    postgres.execute("UPDATE runs SET last_seq = 2147483647 WHERE run_id = %s", (full,))

    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()

    states = {beatless.client.get_run(run_id).state for run_id in others}
    assert states == {RunState.CANCELLED}
    assert not beatless.client.get_run(full).state.final


@pytest.mark.parametrize("from_step", [None, "ship", "parcels"])
def test_a_retry_starts_the_children_again(beatless: Kit, from_step: str | None) -> None:
    name, line = ("fails", "broken") if from_step is None else ("collects", 1)
    failed = ended(beatless, name, {"lines": [line]})
    again = beatless.client.retry_run(failed.run_id, from_step=from_step)
    beatless.work_until_idle()

    events = beatless.client.events(again.run_id)
    assert (events[0].data or {})["reused"]["next"] == "parcels"
    assert len(beatless.children(again.run_id)) == 1
    assert "reserve" not in [event.step for event in events]


def test_where_a_run_stands_is_told_while_it_waits_for_children(beatless: Kit) -> None:
    run = beatless.start_run("undone", {"lines": [1, 2]})
    beatless.work_until_idle()

    told = " ".join(moment.text for moment in beatless.client.explain(run.run_id))
    assert "its children: parcels, 0 of 2 have ended" in told


CRASHES = [
    ("claim.committed", 1),
    ("claim.committed", 3),
    ("children.before", 1),
    ("children.started", 1),
    ("step.committed", 1),
    ("wait.before", 1),
    ("wait.before", 2),
    ("wait.committed", 1),
    ("wait.committed", 2),
    ("wait.signalled", 1),
    ("task.before_ack", 1),
    ("relay.after_publish", 2),
]


@pytest.mark.slow
def test_no_crash_starts_a_child_twice_or_loses_one(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    for point, nth in CRASHES:
        with subtests.test(point, nth=nth):
            with beatless.crash(at=point, nth=nth):
                run = beatless.start_run("fulfil", {"lines": [1, 2, 3, 4]})
                beatless.work_until_idle()
            beatless.advance(LEASE_S + 1)
            beatless.work_until_idle()

            found = beatless.client.get_run(run.run_id)
            assert found.result == [f"parcel {line}" for line in (1, 2, 3, 4)]
            assert [each.input for each in beatless.children(run.run_id)] == [1, 2, 3, 4]
            beatless.verify()


def test_an_app_without_the_plan_of_an_element_is_refused(beatless: Kit) -> None:
    lonely = Plan("lonely", [child("one", parcel)])
    with pytest.raises(PlanError, match="starts runs of plan parcel, which the App does not have"):
        App(beatless.app.settings, plans=[lonely])


async def later(ctx: ElementContext) -> None: ...


def yields(ctx: ElementContext) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: child("a b", parcel), "must match"),
        (lambda: child("one", pack), "children are runs of a plan"),
        (lambda: child("one", parcel, input={"a": 1}), "give it a function of the run so far"),
        (lambda: child("one", parcel, input=later), "child one: its input is .* a coroutine"),
        (lambda: map_("all", parcel, inputs=partial(yields)), "map_ all: .* gives a generator"),
        (lambda: child("one", parcel, deadline=0), "more than 0 seconds"),
        (lambda: child("one", parcel, on_failure="release"), "give it a Goto"),
        (lambda: child("one", parcel, on_failure=Goto("release", 1)), "carries a result"),
        (lambda: map_("all", parcel, at_once=0), "map_ all: at_once is 0"),
        (lambda: map_("all", parcel, failure="no"), "choose fail or collect"),
        (
            lambda: map_("all", parcel, failure="collect", on_failure=Goto("release")),
            "it would never come",
        ),
        (lambda: Plan("p", [map_("all", parcel, on_failure=Goto("gone"))]), "'gone'"),
        (lambda: Plan("p", [child("one", parcel), child("one", parcel)]), "two steps called one"),
    ],
)
def test_a_bad_element_is_refused_when_the_plan_is_built(made: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        made()
