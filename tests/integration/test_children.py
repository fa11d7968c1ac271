"""Runs that other runs have started: their starts, their ends, and what becomes of both."""

import logging
from collections.abc import Callable
from itertools import islice
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    BadRequest,
    ChildFailed,
    Plan,
    RunContext,
    RunNotFound,
    RunState,
    StepContext,
    child,
    map_,
    plan,
    step,
)
from beatless.orchestrator import children
from beatless.orchestrator.child_calls import child_call
from beatless.orchestrator.child_options import check_group, check_map, child_tags
from beatless.orchestrator.children import CancelsChildren, ChildRuns
from beatless.orchestrator.function_boundaries import MAX_TAKEOVERS
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.options import TAGS_BYTES
from beatless.orchestrator.plan import PlanError
from beatless.orchestrator.retention import REST_S, Retention
from beatless.outbox.waking import Woken
from beatless.testing import Kit
from beatless.verify import verify


@step
def pack(ctx: StepContext) -> str:
    if ctx.input == "broken":
        raise ValueError("it broke")
    return f"parcel {ctx.input}"


parcel = Plan("parcel", [pack], queue="children")


@step
def add(ctx: StepContext, parcels: list[str]) -> int:
    return len(parcels)


@plan("one_child")
def one_child(run: RunContext[Any]) -> Any:
    child = run.child(parcel, run.input)
    try:
        return {"child": child.run_id, "result": child.result()}
    except ChildFailed as failed:
        return {"child": failed.run_id, "failed": f"{failed.type}: {failed.message}"}


@plan("fan_out")
def fan_out(run: RunContext[Any]) -> Any:
    options = run.input.get("options", {})
    parcels = run.map(parcel, run.input["lines"], **options)
    return {"count": run.step(add, parcels), "parcels": parcels, "last": parcels[-1:]}


@plan("collects")
def collects(run: RunContext[Any]) -> Any:
    found = run.map(parcel, run.input, failure="collect")
    return [each.type if isinstance(each, ChildFailed) else each for each in found]


@plan("asks_async")
async def asks_async(run: RunContext[Any]) -> Any:
    child = await run.child(parcel, 1)
    parcels = await run.map(parcel, [2, 3])
    return [await child.result(), *parcels]


@plan("grows")
def grows(run: RunContext[Any]) -> Any:
    return run.map(parcel, ["x", "x" * run.input])


@plan("turns")
def turns(run: RunContext[Any]) -> Any:
    parcels = run.map(parcel, [run.input, run.input])
    return run.again(run.input - 1) if run.input else parcels


@plan("grouped")
def grouped(run: RunContext[Any]) -> Any:
    run.map(parcel, run.input, group="bulk", tags={"size": "s"})
    alone = run.child(parcel, 3, group="alone", tags={"shop": "us"})
    return [alone.result(), run.child(parcel, 4).result()]


grouped_list = Plan(
    "grouped_list",
    [
        map_("many", parcel, group="bulk", tags={"size": "s"}),
        child("alone", parcel, input=lambda ctx: 3, group="alone", tags={"shop": "us"}),
        child("own", parcel, input=lambda ctx: 4),
    ],
)


@plan("told")
def told(run: RunContext[Any]) -> Any:
    run.wait("go")
    if run.input == "broken":
        raise ValueError("it broke")
    return run.input


@plan("asks_all")
def asks_all(run: RunContext[Any]) -> Any:
    return run.map(told, run.input)


@plan("counts_all")
def counts_all(run: RunContext[Any]) -> Any:
    return len(run.map(told, run.input))


@plan("gives_all")
async def gives_all(run: RunContext[Any]) -> Any:
    return await run.map(told, run.input)


@plan("draws")
def draws(run: RunContext[Any]) -> Any:
    run.step(add, [])
    child = run.child(told, 1, id=f"drawn-{run.uuid()}")
    DRAWN.append(str(run.uuid()))
    return [child.run_id, child.result()]


DRAWN: list[str] = []


@plan("leaves")
def leaves(run: RunContext[Any]) -> Any:
    child = run.child(parcel, 1, detach=run.input == "detached", deadline=3600)
    run.wait("go")
    return child.run_id


@plan("makes_a_plan")
def makes_a_plan(run: RunContext[Any]) -> Any:
    return run.child(Plan("made", [pack])).result()


@plan("makes_plans")
async def makes_plans(run: RunContext[Any]) -> Any:
    return await run.map(Plan("made", [pack]), [1, 2])


@plan("rivals")
def rivals(run: RunContext[Any]) -> Any:
    """Gives what the first of several children has, and how each other one has ended."""
    children = [run.child(told, each, detach=True) for each in run.input]
    won = run.first(children)
    others = [each for each in children if each is not won]
    ends = []
    for each in others:
        try:
            ends.append(each.result())
        except ChildFailed as failed:
            ends.append(failed.type)
    return {"won": won.run_id, "result": run.step(add, [won.result()]), "ends": ends}


@plan("asks_first")
async def asks_first(run: RunContext[Any]) -> Any:
    slow = await run.child(told, "slow")
    quick = await run.child(parcel, "quick")
    won = await run.first([slow, quick], name="race", id="only")
    return [won is quick, await won.result()]


@step
def change(ctx: StepContext) -> int:
    CHANGES.pop(ctx.input, lambda: None)()
    return ctx.input


changer = Plan("changer", [change])


@plan("changes")
def changes(run: RunContext[Any]) -> Any:
    """What its inputs are is said by the test, each time that it is called."""
    return run.map(changer, INPUTS, at_once=50)


INPUTS: list[int] = []
CHANGES: dict[int, Callable[[], object]] = {}


@plan("nested")
def nested(run: RunContext[Any]) -> Any:
    return run.map(fan_out, [{"lines": lines} for lines in run.input])


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        parcel,
        one_child,
        fan_out,
        collects,
        asks_async,
        asks_first,
        rivals,
        grouped,
        grouped_list,
        grows,
        leaves,
        nested,
        turns,
        changes,
        changer,
        told,
        asks_all,
        gives_all,
        counts_all,
        draws,
        makes_a_plan,
        makes_plans,
    ]


LEASE_S = 60


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


def parked(kit: Kit, name: str, input: Any, **options: Any) -> str:
    """The id of a run that has started its children, of which none was executed."""
    kit.client.pause_queue("children")
    run = kit.start_run(name, input, **options)
    kit.work_until_idle()
    assert kit.client.get_run(run.run_id).state is RunState.WAITING
    return run.run_id


def state_of(kit: Kit, run_id: str) -> str:
    return kit.client.get_run(run_id).state.value


def types_of(kit: Kit, run_id: str) -> list[str]:
    return [event.type for event in kit.client.events(run_id)]


def test_a_run_starts_a_child_and_waits_for_its_result(beatless: Kit) -> None:
    run = beatless.start_run("one_child", 7)
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert found.result["result"] == "parcel 7"
    (child,) = beatless.client.children(run.run_id)
    assert child.run_id == found.result["child"]
    assert (child.parent_id, child.child_no, child.state) == (run.run_id, 1, RunState.COMPLETED)
    assert types_of(beatless, run.run_id) == [
        "RunStarted",
        "ChildrenStarted",
        "ChildrenFinished",
        "RunFinished",
    ]


def test_a_child_that_fails_raises_its_error_in_its_parent(beatless: Kit) -> None:
    run = beatless.start_run("one_child", "broken")
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    (child,) = beatless.client.children(run.run_id)
    assert found.result == {"child": child.run_id, "failed": "ValueError: it broke"}


@pytest.mark.parametrize("at_once", [None, 1, 3, 100])
def test_a_map_starts_a_run_for_each_input_and_gives_results_in_order(
    beatless: Kit, at_once: int | None
) -> None:
    lines = list(range(12))
    run = beatless.start_run("fan_out", {"lines": lines, "options": {"at_once": at_once}})
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    parcels = [f"parcel {line}" for line in lines]
    assert found.result == {"count": 12, "parcels": parcels, "last": ["parcel 11"]}
    children = beatless.client.children(run.run_id)
    assert [child.child_no for child in children] == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changer", "change", "started"),
    [
        (1, lambda: INPUTS.append(110), range(50, 51)),
        (1, lambda: INPUTS.__setitem__(109, -1), range(50, 101)),
        (105, lambda: INPUTS.__setitem__(0, -1), range(110, 111)),  # started long ago
    ],
    ids=["one more", "one that is to be started", "one that was started"],
)
def test_a_map_whose_inputs_change_while_it_waits_is_no_longer_the_call_that_was_stored(
    beatless: Kit, changer: int, change: Callable[[], object], started: range
) -> None:
    INPUTS[:] = range(110)
    CHANGES[changer] = change
    run_id = beatless.start_run("changes").run_id
    with pytest.raises(AssertionError, match="changed_call"):
        beatless.work_until_idle()
    beatless.work_until_idle()  # the children

    with beatless.app.engine.begin() as connection:
        dispatch = beatless.app.journal.dispatch_status(connection, run_id).dispatch
    assert dispatch is not None
    assert dispatch[2] == "changed_call"
    assert len(beatless.client.children(run_id, limit=1000)) in started
    texts = [moment.text for moment in beatless.client.explain(run_id)]
    assert any("give one of them other arguments" in text for text in texts)

    INPUTS[:] = range(110)
    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).result == list(range(110))
    beatless.verify()


def test_a_map_of_nothing_ends_at_once(beatless: Kit) -> None:
    run = beatless.start_run("fan_out", {"lines": []})
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == {"count": 0, "parcels": [], "last": []}


def test_the_first_failure_of_a_map_cancels_the_others_and_fails_it_once_they_have_ended(
    beatless: Kit,
) -> None:
    run = beatless.start_run("fan_out", {"lines": ["broken", *range(9)], "options": {"at_once": 4}})
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert found.state is RunState.FAILED
    assert found.error is not None
    assert found.error["type"] == "ChildFailed"
    assert "ValueError: it broke" in found.error["message"]
    states = [child.state.value for child in beatless.client.children(run.run_id)]
    assert states[0] == "failed"
    assert set(states) <= {"failed", "completed", "cancelled"}
    assert len(states) < 10


def test_the_failure_of_a_map_is_the_first_one_and_not_a_cancel_that_follows_from_it(
    beatless: Kit,
) -> None:
    run = beatless.start_run("asks_all", [1, "broken", 3])
    beatless.work_until_idle()
    _, broken, _ = beatless.children(run.run_id)
    beatless.signal(broken.run_id, "go")
    beatless.work_until_idle()

    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    assert (error["child"], "it broke" in error["message"]) == (broken.run_id, True)


def test_a_map_collects_failures_where_it_is_asked_to(beatless: Kit) -> None:
    run = beatless.start_run("collects", [1, "broken", 2])
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert found.result == ["parcel 1", "ValueError", "parcel 2"]


@pytest.mark.parametrize(
    ("lines", "failed"),
    [([1, "broken", 2, "broken"], 2), (["broken"], 1), ([1, 2], None), ([], None)],
)
def test_the_end_of_a_map_that_collects_says_how_many_have_failed(
    beatless: Kit, lines: list[Any], failed: int | None
) -> None:
    run = beatless.start_run("collects", lines)
    beatless.work_until_idle()

    ends = [e.data for e in beatless.client.events(run.run_id) if e.type == "ChildrenFinished"]
    assert [(data or {}).get("failed") for data in ends] == [failed]
    told = " ".join(moment.text for moment in beatless.client.explain(run.run_id))
    assert (f"has ended: {failed} of {len(lines)} failed" in told) == (failed is not None)


def test_a_child_that_was_removed_counts_as_failed(beatless: Kit) -> None:
    run_id = parked(beatless, "collects", [1, 2, 3])
    beatless.client.cancel_run(beatless.children(run_id)[1].run_id)
    beatless.client.remove_run(beatless.children(run_id)[1].run_id)
    beatless.client.resume_queue("children")
    beatless.work_until_idle()

    (end,) = [e.data for e in beatless.client.events(run_id) if e.type == "ChildrenFinished"]
    assert (end or {})["failed"] == 1
    assert beatless.client.get_run(run_id).result == ["parcel 1", "RunNotFound", "parcel 3"]


def test_an_async_function_awaits_its_children(beatless: Kit) -> None:
    run = beatless.start_run("asks_async")
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == ["parcel 1", "parcel 2", "parcel 3"]


def raced(kit: Kit, *inputs: str) -> tuple[str, list[str]]:
    """A run that waits for the first of its children, and theirs."""
    run = kit.start_run("rivals", list(inputs))
    kit.work_until_idle()
    assert state_of(kit, run.run_id) == "waiting"
    return run.run_id, [child.run_id for child in kit.children(run.run_id)]


def test_the_first_child_that_ends_well_has_the_others_cancelled(beatless: Kit) -> None:
    run_id, (_, two, _) = raced(beatless, "a", "b", "c")
    beatless.signal(two, "go")
    beatless.work_until_idle()

    assert beatless.client.get_run(run_id).result == {
        "won": two,
        "result": 1,
        "ends": ["RunCancelled", "RunCancelled"],
    }
    states = [child.state.value for child in beatless.children(run_id)]
    assert states == ["cancelled", "completed", "cancelled"]
    (end,) = [e for e in beatless.client.events(run_id) if e.type == "ChildrenFinished"]
    assert (end.step, end.data and end.data["rivals"], end.data and end.data["won"]) == (
        "first",
        [1, 2, 3],
        2,
    )
    assert "the first of children 1, 2, 3 has ended: child 2 came first" in " ".join(
        moment.text for moment in beatless.client.explain(run_id)
    )
    beatless.verify()


def test_the_function_is_not_told_of_the_first_child_before_the_others_have_ended(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, (one, two) = raced(beatless, "a", "b")
    with monkeypatch.context() as without_relays:
        without_relays.setattr(CancelsChildren, "step", lambda *_: Woken(done=0, left=0))
        beatless.signal(one, "go")
        beatless.work_until_idle()
        assert (state_of(beatless, run_id), state_of(beatless, two)) == ("waiting", "waiting")
        # It ends well, and too late: its cancel is not carried out yet.
        beatless.signal(two, "go")
        beatless.work_until_idle()

    found = beatless.client.get_run(run_id).result
    assert (found["won"], found["ends"]) == (one, ["b"])


def test_a_child_that_fails_is_waited_for_no_longer_and_ends_no_race(beatless: Kit) -> None:
    run_id, (broken, other) = raced(beatless, "broken", "b")
    beatless.signal(broken, "go")
    beatless.work_until_idle()
    assert (state_of(beatless, run_id), state_of(beatless, other)) == ("waiting", "waiting")

    beatless.signal(other, "go")
    beatless.work_until_idle()
    found = beatless.client.get_run(run_id).result
    assert (found["won"], found["ends"]) == (other, ["ValueError"])


def test_a_race_in_which_all_have_failed_raises_the_error_of_the_first_in_the_list(
    beatless: Kit,
) -> None:
    run_id, (one, two) = raced(beatless, "broken", "b")
    beatless.client.cancel_run(two)
    beatless.signal(one, "go")
    beatless.work_until_idle()

    error = beatless.client.get_run(run_id).error
    assert error is not None
    assert (error["type"], error["child"]) == ("ChildFailed", one)
    (end,) = [e.data for e in beatless.client.events(run_id) if e.type == "ChildrenFinished"]
    assert (end or {})["failed"] == 2
    beatless.verify()


def test_a_removed_child_has_lost_the_race(beatless: Kit) -> None:
    run_id, (one, two) = raced(beatless, "a", "b")
    beatless.client.remove_run(one)
    beatless.signal(two, "go")
    beatless.work_until_idle()

    found = beatless.client.get_run(run_id).result
    assert (found["won"], found["ends"]) == (two, ["RunNotFound"])


def test_an_async_function_awaits_the_first_of_its_children(beatless: Kit) -> None:
    run = beatless.start_run("asks_first")
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == [True, "parcel quick"]
    assert "race#only" in [event.step for event in beatless.client.events(run.run_id)]


@pytest.mark.slow
def test_no_crash_changes_which_child_came_first(beatless: Kit, subtests: pytest.Subtests) -> None:
    crashes = [
        ("claim.committed", 1),
        ("children.before", 2),
        ("children.started", 1),
        ("wait.before", 1),
        ("wait.before", 2),
        ("wait.committed", 1),
        ("wait.committed", 2),
        ("wait.signalled", 1),
        ("step.before", 1),
        ("step.committed", 1),
    ]
    for point, nth in crashes:
        with subtests.test(point, nth=nth):
            with beatless.crash(at=point, nth=nth):
                parent = beatless.start_run("rivals", ["a", "b", "c"])
                beatless.work_until_idle()
                beatless.signal(beatless.children(parent.run_id)[1].run_id, "go")
                beatless.work_until_idle()
            beatless.advance(LEASE_S + 1)
            beatless.work_until_idle()
            two = beatless.children(parent.run_id)[1]
            if not two.state.final:
                beatless.signal(two.run_id, "go")
                beatless.advance(LEASE_S + 1)
                beatless.work_until_idle()

            found = beatless.client.get_run(parent.run_id).result
            assert (found["won"], found["ends"]) == (two.run_id, ["RunCancelled"] * 2)
            assert len(beatless.children(parent.run_id)) == 3
            beatless.verify()


def test_children_have_children(beatless: Kit) -> None:
    run = beatless.start_run("nested", [[1, 2], [3]])
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert [each["parcels"] for each in found.result] == [["parcel 1", "parcel 2"], ["parcel 3"]]


CRASHES = [
    ("claim.committed", 1),
    ("claim.committed", 2),
    ("claim.committed", 3),
    ("children.before", 1),
    ("children.started", 1),
    ("step.committed", 1),
    ("step.committed", 3),
    ("wait.before", 1),
    ("wait.before", 2),
    ("wait.committed", 1),
    ("wait.committed", 2),
    ("wait.signalled", 1),
    ("task.before_ack", 1),
    ("task.before_ack", 2),
    ("relay.after_claim", 2),
    ("relay.after_publish", 2),
]


@pytest.mark.slow
def test_no_crash_starts_a_child_twice_or_loses_one(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    given = {"lines": [1, 2, 3, 4], "options": {"at_once": 2}}
    for point, nth in CRASHES:
        with subtests.test(point, nth=nth):
            with beatless.crash(at=point, nth=nth):
                run = beatless.start_run("fan_out", given)
                beatless.work_until_idle()
            beatless.advance(LEASE_S + 1)
            beatless.work_until_idle()

            assert beatless.client.get_run(run.run_id).result["count"] == 4
            children = beatless.client.children(run.run_id)
            assert [child.input for child in children] == [1, 2, 3, 4]
            assert {child.state.value for child in children} == {"completed"}
            beatless.verify()


@pytest.mark.slow
def test_a_parent_whose_workers_die_now_and_then_has_not_crashed(beatless: Kit) -> None:
    deaths = MAX_TAKEOVERS
    run = beatless.start_run("fan_out", {"lines": [*range(deaths)], "options": {"at_once": 1}})
    for _ in range(deaths):
        with beatless.crash(at="wait.before", nth=2):  # the first claim has parked it
            beatless.work_until_idle()
        beatless.advance(LEASE_S + 1)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_a_call_that_hangs_on_a_stored_value_is_asked_for_again_after_a_crash(
    beatless: Kit,
) -> None:
    DRAWN.clear()
    run = beatless.start_run("draws", {})
    with beatless.crash(at="children.before"):
        beatless.work_until_idle()
    beatless.advance(LEASE_S + 1)
    beatless.work_until_idle()
    (child,) = beatless.children(run.run_id)
    beatless.signal(child.run_id, "go")
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == [child.run_id, 1]
    assert len(DRAWN) > 1
    assert len(set(DRAWN)) == 1


def test_the_cancel_of_a_run_goes_down_to_its_children(beatless: Kit) -> None:
    run_id = parked(beatless, "nested", [[1, 2], [3]])

    beatless.client.cancel_run(run_id)
    beatless.work_until_idle()

    middle = beatless.client.children(run_id)
    assert [child.state.value for child in middle] == ["cancelled", "cancelled"]
    leaves = [leaf for child in middle for leaf in beatless.client.children(child.run_id)]
    assert [leaf.state.value for leaf in leaves] == ["cancelled"] * 3


@pytest.mark.parametrize(("input", "state"), [("attached", "cancelled"), ("detached", "queued")])
def test_an_ended_run_cancels_its_unfinished_children_unless_they_are_detached(
    beatless: Kit, input: str, state: str
) -> None:
    run_id = parked(beatless, "leaves", input)
    beatless.signal(run_id, "go")
    beatless.work_until_idle()

    assert state_of(beatless, run_id) == "completed"
    (child,) = beatless.client.children(run_id)
    assert child.state.value == state


def test_a_child_has_the_deadline_priority_group_and_tags_of_its_parent(beatless: Kit) -> None:
    by_its_own = parked(beatless, "leaves", "attached")
    options = {"deadline": 60, "priority": 7, "group": "ada", "tags": {"shop": "eu"}}
    by_its_parents = parked(beatless, "leaves", "attached", **options)

    (child,) = beatless.client.children(by_its_own)
    assert child.deadline_at is not None
    (child,) = beatless.client.children(by_its_parents)
    parent = beatless.client.get_run(by_its_parents)
    assert (child.deadline_at, child.priority) == (parent.deadline_at, 7)
    assert (child.group, child.tags) == ("ada", {"shop": "eu"})


@pytest.mark.parametrize("way", ["grouped", "grouped_list"])
def test_children_have_the_group_and_the_tags_that_their_call_gives(
    beatless: Kit, way: str
) -> None:
    tags = {"shop": "eu"}
    run = beatless.start_run(way, [1, 2], group="ada", tags=tags)
    run_id = run.run_id
    beatless.work_until_idle()

    assert state_of(beatless, run_id) == "completed"
    children = beatless.client.children(run_id)
    many = ("bulk", {"shop": "eu", "size": "s"})
    assert [(each.group, each.tags) for each in children] == [
        *(many, many),
        ("alone", {"shop": "us"}),
        ("ada", tags),
    ]
    chosen = {run_id, *(each.run_id for each in children if each.tags["shop"] == "eu")}
    assert {each.run_id for each in beatless.client.list_runs(tags=tags)} == chosen
    tail = beatless.client.tail(tags=tags, event="RunFinished", since=run.created_at, timeout=60)
    assert {told.event.run_id for told in islice(tail, len(chosen))} == chosen
    tail.close()


@pytest.mark.parametrize("way", ["grouped", "grouped_list"])
def test_tags_that_are_too_long_with_those_of_the_parent_fail_the_run(
    beatless: Kit, way: str
) -> None:
    run_id = beatless.start_run(way, [1, 2], tags={"x": "x" * (TAGS_BYTES - 1)}).run_id
    beatless.work_until_idle()

    error = beatless.client.get_run(run_id).error
    assert error is not None
    assert "tags, with those of the parent, are longer than" in error["message"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: child("one", parcel, tags={"shop": 1}),  # type: ignore[dict-item]
        lambda: map_("one", parcel, tags="shop"),  # type: ignore[arg-type]
        lambda: child_tags("one", {}, {"x": "\0"}),
    ],
)
def test_bad_tags_of_children_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=r"one: tags (must map|is)"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: child("one", parcel, group=""),
        lambda: map_("one", parcel, group="x" * 257),
        lambda: check_group("one", 7),
    ],
)
def test_a_bad_group_of_children_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=r"one: group must be .*; without group= a child"):
        call()


def test_a_cancelled_child_fails_its_parent(beatless: Kit) -> None:
    run_id = parked(beatless, "one_child", 1)
    (child,) = beatless.client.children(run_id)

    beatless.client.cancel_run(child.run_id)
    beatless.work_until_idle()

    assert beatless.client.get_run(run_id).result["failed"].startswith("RunCancelled: ")


@pytest.mark.parametrize("way", ["remove", "drain", "obliterate"])
def test_a_child_that_is_removed_wakes_its_parent(beatless: Kit, way: str) -> None:
    run_id = parked(beatless, "one_child", 1)
    (child,) = beatless.client.children(run_id)

    match way:
        case "remove":
            beatless.client.remove_run(child.run_id)
        case "drain":
            beatless.client.drain_queue("children")
        case "obliterate":
            beatless.client.obliterate_queue("children", force=True)
    beatless.work_until_idle()

    assert "RunNotFound" in beatless.client.get_run(run_id).result["failed"]


def test_a_map_whose_child_was_removed_fails_though_nobody_reads_its_results(
    beatless: Kit,
) -> None:
    run = beatless.start_run("counts_all", [1, 2])
    beatless.work_until_idle()
    one, two = beatless.children(run.run_id)
    beatless.client.remove_run(two.run_id)
    beatless.signal(one.run_id, "go")
    beatless.work_until_idle()

    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    assert "RunNotFound: child 2 was removed" in error["message"]


def test_a_function_that_returns_the_result_of_a_removed_child_fails(beatless: Kit) -> None:
    run = beatless.start_run("gives_all", [1, 2])
    beatless.work_until_idle()
    one, two = beatless.children(run.run_id)
    beatless.client.remove_run(one.run_id)
    beatless.signal(two.run_id, "go")
    beatless.work_until_idle()

    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    assert (error["type"], "RunNotFound" in error["message"]) == ("ChildFailed", True)


def test_the_last_two_children_end_at_once_and_the_parent_goes_on(
    beatless: Kit, postgres: psycopg.Connection[Any]
) -> None:
    run_id = parked(beatless, "collects", [1, 2])
    one, two = beatless.client.children(run_id)
    engine = beatless.app.engine

    with engine.begin() as first, engine.begin() as second:
        beatless.client.cancel_run(one.run_id, connection=first)
        beatless.client.cancel_run(two.run_id, connection=second)
        first.commit()
        beatless.drain_outbox_once()
        assert state_of(beatless, run_id) == "waiting"
    assert postgres.execute(
        "SELECT count(*) FROM wakes WHERE run_id = %s", (run_id,)
    ).fetchone() == (1,)
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).result == ["RunCancelled", "RunCancelled"]


def test_a_child_that_ends_while_its_parent_is_being_parked_wakes_it(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.client.pause_queue("children")
    tend, ended = ChildRuns.tend, []

    def tend_and_end(self: ChildRuns, connection: Any, run_id: str, *args: Any) -> Any:
        looked = tend(self, connection, run_id, *args)
        ended.extend(
            beatless.client.cancel_run(child.run_id).state.value
            for child in beatless.client.children(run_id, state="queued")
        )
        return looked

    monkeypatch.setattr(ChildRuns, "tend", tend_and_end)
    run = beatless.start_run("collects", [1, 2])
    beatless.work_until_idle()

    assert ended == ["cancelled", "cancelled"]
    assert state_of(beatless, run.run_id) == "completed"


def test_retention_keeps_a_child_as_long_as_its_parent_is_unfinished(beatless: Kit) -> None:
    run_id = parked(beatless, "leaves", "attached")
    beatless.client.resume_queue("children")
    beatless.work_until_idle()
    (child,) = beatless.client.children(run_id)
    assert child.state is RunState.COMPLETED
    retention = Retention(beatless.app.settings.schema, events_days=1, runs_days=1)

    beatless.advance(3 * 86_400)
    with beatless.app.direct_connection() as connection:
        assert retention.step(connection) == REST_S  # and not soon, for it stays as it is
        assert beatless.client.get_run(child.run_id).pruned_seq == 0
        beatless.signal(run_id, "go")
        beatless.work_until_idle()
        retention.step(connection)
    assert beatless.client.get_run(child.run_id).pruned_seq == child.last_seq


def test_clean_keeps_a_child_as_long_as_its_parent_is_unfinished(beatless: Kit) -> None:
    run = beatless.start_run("asks_all", [1, 2])
    beatless.work_until_idle()
    one, two = beatless.children(run.run_id)
    beatless.signal(one.run_id, "go")
    beatless.work_until_idle()

    assert beatless.client.clean("completed", older_than=0) == 0
    beatless.signal(two.run_id, "go")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == [1, 2]
    assert beatless.client.clean("completed", older_than=0) == 3


def test_an_input_that_a_child_cannot_have_fails_the_parent_before_any_was_started(
    beatless: Kit,
) -> None:
    run = beatless.start_run("grows", 300_000)
    beatless.work_until_idle()

    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    assert error["type"] == "BadPayload"
    assert beatless.client.children(run.run_id) == []


def test_children_with_large_inputs_are_stored_by_several_statements(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[int] = []
    create = Journal.create_runs

    def create_runs(self: Journal, connection: Any, new: Any) -> Any:
        stored.append(len(new))
        return create(self, connection, new)

    monkeypatch.setattr(Journal, "create_runs", create_runs)
    monkeypatch.setattr(children, "STATEMENT_BYTES", 250)
    run = beatless.start_run("collects", ["x" * 98] * 5)
    beatless.work_until_idle()

    assert stored == [1, 2, 2, 1]  # the parent first
    assert len(beatless.client.get_run(run.run_id).result) == 5


def test_children_are_of_the_namespace_of_their_parent(beatless: Kit) -> None:
    acme = beatless.app.client_for("acme")
    run = acme.start_run("fan_out", {"lines": [1, 2]})
    beatless.work_until_idle()

    assert [child.namespace for child in acme.children(run.run_id)] == ["acme", "acme"]
    assert all(child.run_id.startswith("acme~") for child in acme.children(run.run_id))
    with pytest.raises(RunNotFound):
        beatless.client.children(run.run_id)


def test_pages_of_children_go_on_after_a_number(beatless: Kit) -> None:
    run_id = parked(beatless, "collects", list(range(5)))
    first = beatless.client.children(run_id, limit=3)
    second = beatless.client.children(run_id, after=first[-1].child_no or 0, limit=3)

    assert [child.input for child in (*first, *second)] == [0, 1, 2, 3, 4]
    assert beatless.client.children(run_id, state="running") == []
    with pytest.raises(BadRequest, match="choose queued"):
        beatless.client.children(run_id, state="gone")


def test_verify_finds_a_child_that_nobody_started_and_a_parent_that_nobody_wakes(
    beatless: Kit, postgres: psycopg.Connection[Any]
) -> None:
    run_id = parked(beatless, "collects", [1])
    stray = beatless.start_run("parcel", 1)
    postgres.execute(
        "UPDATE runs SET parent_id = %s, child_no = 7 WHERE run_id = %s", (run_id, stray.run_id)
    )
    postgres.execute("DELETE FROM dispatches WHERE parent_id = %s", (run_id,))

    with beatless.app.engine.connect() as connection:
        broken = verify(connection, beatless.app.settings.schema, [run_id, stray.run_id])
    found = {(each.invariant, each.run_id) for each in broken}
    assert found >= {("I2", stray.run_id), ("I7", run_id)}


def test_a_parent_that_holds_no_worker_is_logged_as_waiting(
    beatless: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "beatless")
    run_id = parked(beatless, "collects", [1, 2])

    told = [vars(each) for each in caplog.records if each.getMessage() == "run waits"]
    assert [(each["run_id"], each["state"], each["reason"]) for each in told] == [
        (run_id, "waiting", "wait")
    ]
    assert [each for each in told if "delay" in each] == []  # it has no end


def test_a_map_is_told_by_explain(beatless: Kit) -> None:
    run_id = parked(beatless, "collects", [1, 2])
    told = " ".join(moment.text for moment in beatless.client.explain(run_id))
    assert "started children 1 to 2, 2 runs of plan parcel" in told
    assert "its children" in told


@pytest.mark.slow
def test_the_waits_of_a_run_have_those_for_its_children(beatless: Kit) -> None:
    waits: dict[str, list[tuple[str, str]]] = {}
    for name, input in [("asks_all", [1, 2]), ("one_child", 7), ("leaves", "attached")]:
        run_id = parked(beatless, name, input)
        waits[name] = [(wait.occurrence, wait.kind) for wait in beatless.client.waits(run_id)]
    assert waits == {
        "asks_all": [("told", "children")],
        "one_child": [("parcel", "children")],
        "leaves": [("go", "signal")],  # and for no child, though one is unfinished
    }
    beatless.client.resume_queue("children")
    beatless.work_until_idle()
    (run,) = beatless.client.list_runs(plan="one_child")
    assert beatless.client.waits(run.run_id) == []


def test_an_app_without_the_plan_of_a_child_is_refused(beatless: Kit) -> None:
    with pytest.raises(PlanError, match="names plan parcel, which the App does not have"):
        App(beatless.app.settings, plans=[one_child])


def test_a_plan_that_the_app_does_not_have_fails_the_run_and_starts_no_child(beatless: Kit) -> None:
    for name in ("makes_a_plan", "makes_plans"):
        run = beatless.start_run(name)
        beatless.work_until_idle()

        error = beatless.client.get_run(run.run_id).error
        assert error is not None
        assert error["type"] == "PlanError"
        assert f"plan {name} starts a run of plan made, which the App does not have" in str(error)
        assert beatless.client.children(run.run_id) == []


def test_only_a_plan_can_be_started() -> None:
    with pytest.raises(PlanError, match="give them a plan of the App"):
        child_call(pack, [1])
    with pytest.raises(PlanError, match="at_once is 0"):
        check_map("run.map", 0, "fail")
    with pytest.raises(PlanError, match="choose fail or collect"):
        check_map("run.map", None, "ignore")


def test_a_retry_starts_the_children_again(beatless: Kit) -> None:
    run = beatless.start_run("fan_out", {"lines": ["broken"]})
    beatless.work_until_idle()
    again = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()

    assert beatless.client.get_run(again.run_id).state is RunState.FAILED
    assert [child.child_no for child in beatless.client.children(again.run_id)] == [1]
    assert len(beatless.client.children(run.run_id)) == 1


@pytest.mark.slow
def test_a_function_that_begins_again_numbers_its_children_on(beatless: Kit) -> None:
    run = beatless.start_run("turns", 3)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == ["parcel 0", "parcel 0"]
    children = beatless.client.children(run.run_id)
    assert [child.input for child in children] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert [child.child_no for child in children] == list(range(1, 9))


def test_the_result_of_a_child_that_is_not_awaited_is_named_with_its_line(beatless: Kit) -> None:
    @plan("forgets")
    async def forgets(run: RunContext[Any]) -> Any:
        child = await run.child(parcel, 1)
        return child.result()

    beatless.app.plans["forgets"] = forgets
    run = beatless.start_run("forgets")
    beatless.work_until_idle()
    error = beatless.client.get_run(run.run_id).error
    assert error is not None
    line = forgets.function.__code__.co_firstlineno + 3
    told = (
        f"plan forgets: the result() of a child in line {line} of test_children.py was not awaited"
    )
    assert told in error["message"]
    assert "write await child.result(), also for run.step(…)," in error["message"]
