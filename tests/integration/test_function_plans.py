"""Plans that are functions, on Postgres: events, crashes, changed code, and what people see."""

import itertools
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg
import pytest

from beatless import (
    App,
    BadPayload,
    Fatal,
    Plan,
    RunContext,
    RunState,
    StepContext,
    StepFailed,
    plan,
    retry,
    step,
)
from beatless.doctor import Doctor, Status
from beatless.http import Client
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.plan import PlanError
from beatless.orchestrator.progress import CHANGED_CALL, FOLDED, SNOOZED, UNKNOWN_STEP, VALUE
from beatless.outbox.faults import SimulatedCrash
from beatless.places import places
from beatless.testing import Kit
from beatless.testing.names import own_tables
from tests.plans import asks
from tests.serving import serving

LEASE_S = 60


@step
def reserve(ctx: StepContext, lines: list[int]) -> dict[str, Any]:
    return {"lines": lines, "total": sum(lines), "key": ctx.key.partition(":")[2]}


@step(retry=retry(max_attempts=2, initial=10, jitter=0))
def charge(ctx: StepContext, amount: int, *, currency: str = "eur") -> str:
    if amount > 100:
        raise ValueError("declined")
    return f"{amount} {currency}, attempt {ctx.attempt}"


@step(transactional=True)
def book(ctx: StepContext, what: str) -> str:
    ctx.connection.exec_driver_sql(f"INSERT INTO {ctx.input['table']} VALUES (%s)", (what,))
    return what


@step
def release(ctx: StepContext, stock: dict[str, Any]) -> str:
    return f"released {stock['total']}"


@step
def undo(ctx: StepContext) -> list[str]:
    return sorted(ctx.results)


@plan("order", on_cancel=undo)
def order(run: RunContext[dict[str, Any]]) -> dict[str, Any]:
    began = run.now()
    stock = run.step(reserve, run.input["lines"])
    try:
        paid = run.step(charge, stock["total"], currency="usd")
    except StepFailed as failed:
        return {"refused": failed.message, "release": run.step(release, stock)}
    if "table" in run.input:
        run.step(book, str(run.uuid()))
    receipts = [run.step(charge, number) for number in run.input["lines"]]
    return {"paid": paid, "receipts": receipts, "seconds": (run.now() - began).total_seconds()}


@plan("order_async")
async def order_async(run: RunContext[dict[str, Any]]) -> Any:
    stock = await run.step(reserve, run.input["lines"])
    return [await run.step(charge, number) for number in stock["lines"]]


@dataclass
class Parcel:
    weight: float
    to: str = "Ghent"


@plan("send", input=Parcel)
def send(run: RunContext[Parcel]) -> Any:
    return [type(run.input).__name__, run.input.weight, run.input.to]


@step
def label(ctx: StepContext) -> Any:
    return ctx.input


@step
def recall(ctx: StepContext) -> None:
    ctx.trace("recalled", to=ctx.input["to"])


@plan("posted", input=Parcel, on_cancel=recall)
def posted(run: RunContext[Parcel]) -> Any:
    told = [run.step(label), run.step(label)]
    if run.input.weight > 10:
        return run.again(Parcel(weight=run.input.weight / 10))
    return told if run.input.weight > 1 else run.wait("left")


@plan("flaky_plan")
def flaky_plan(run: RunContext[Any]) -> int:
    COUNTER.append(1)
    return len(COUNTER)


COUNTER: list[int] = []


@plan("names_calls")
def names_calls(run: RunContext[Any]) -> Any:
    run.step(charge, 1)
    return run.step(charge, 2, id=f"drawn-{run.uuid()}")


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [order, order_async, send, posted, flaky_plan, names_calls]


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


def test_a_run_that_is_given_back_keeps_the_values_by_which_its_next_call_was_chosen(
    beatless: Kit,
) -> None:
    run = beatless.start_run("names_calls")
    beatless.step(run.run_id)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == "2 eur, attempt 1"


def test_a_function_runs_with_the_events_of_a_list(beatless: Kit) -> None:
    run = beatless.start_run("order", {"lines": [1, 2]})
    assert beatless.work_until_idle() == 1
    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.COMPLETED
    assert ended.result["paid"] == "3 usd, attempt 1"
    assert ended.result["receipts"] == ["1 eur, attempt 1", "2 eur, attempt 1"]
    assert ended.plan_version == "v1"
    events = beatless.client.events(run.run_id)
    assert [(event.type, event.step) for event in events if event.type != "DebugTrace"] == [
        ("RunStarted", None),
        *((kind, "reserve") for kind in ("StepStarted", "StepFinished")),
        *((kind, "charge") for kind in ("StepStarted", "StepFinished")),
        *((kind, "charge#2") for kind in ("StepStarted", "StepFinished")),
        *((kind, "charge#3") for kind in ("StepStarted", "StepFinished")),
        ("RunFinished", None),
    ]
    assert events[-2].data["kind"] == "now"
    beatless.verify()


def test_an_async_function_runs_alike(beatless: Kit) -> None:
    run = beatless.start_run("order_async", {"lines": [4, 5]})
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == ["4 eur, attempt 1", "5 eur, attempt 1"]
    beatless.verify()


def test_a_step_that_has_failed_for_good_is_told_and_passed(beatless: Kit) -> None:
    run = beatless.start_run("order", {"lines": [200]})
    beatless.work_until_idle()
    beatless.advance(10)
    beatless.work_until_idle()
    ended = beatless.client.get_run(run.run_id)
    assert ended.result == {"refused": "declined", "release": "released 200"}
    beatless.verify()


POINTS = ["claim.committed", "step.before", "step.effect_done", "step.committed"]


def test_a_crash_at_any_boundary_loses_and_doubles_nothing(
    beatless: Kit, postgres: psycopg.Connection, subtests: pytest.Subtests
) -> None:
    for number, (point, nth) in enumerate(itertools.product(POINTS, (1, 3))):
        with subtests.test(point, nth=nth):
            table = f"{own_tables(beatless.app.settings.schema)}.booked_{number}"
            postgres.execute(f"CREATE TABLE {table} (what text)")
            run = beatless.start_run("order", {"lines": [1, 2], "table": table})
            later = point == "claim.committed" and nth > 1
            if later:
                beatless.step(run.run_id)
            with beatless.crash(at=point, nth=1 if later else nth):
                beatless.work_once()
            beatless.advance(LEASE_S)
            beatless.work_until_idle()
            ended = beatless.client.get_run(run.run_id)
            assert ended.state is RunState.COMPLETED
            receipts = [receipt.partition(",")[0] for receipt in ended.result["receipts"]]
            assert receipts == ["1 eur", "2 eur"]
            assert postgres.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)
            events = beatless.client.events(run.run_id)
            finished = [event.step for event in events if event.type == "StepFinished"]
            assert sorted(finished) == ["book", "charge", "charge#2", "charge#3", "reserve"]
            beatless.verify()


def test_steps_find_the_defaults_of_a_typed_input_however_the_run_was_started(
    beatless: Kit,
) -> None:
    """By a JSON object without them, by an object of the type, and by `again`."""
    given = [{"weight": 2}, Parcel(2), {"weight": 20, "to": "Ghent"}]
    runs = [beatless.start_run("posted", each) for each in given]
    assert runs[0].input == {"weight": 2}, "as it was given"
    beatless.work_until_idle()
    for run in runs:
        ended = beatless.client.get_run(run.run_id)
        assert ended.result == [{"weight": 2, "to": "Ghent"}] * 2
        assert beatless.client.get_run(run.run_id).input == run.input
    again = beatless.start_run("posted", {"weight": 2}, key="once")
    assert beatless.start_run("posted", {"weight": 2}, key="once").run_id == again.run_id
    beatless.verify()


def test_the_step_that_undoes_a_cancelled_run_finds_the_defaults_too(beatless: Kit) -> None:
    run = beatless.start_run("posted", {"weight": 1})
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == RunState.WAITING
    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == RunState.CANCELLED
    traced = [e.data["to"] for e in beatless.client.events(run.run_id) if e.type == "DebugTrace"]
    assert traced == ["Ghent"]
    beatless.verify()


def test_a_cancel_between_the_steps_of_a_function_is_followed_by_its_undoing(
    beatless: Kit,
) -> None:
    run = beatless.start_run("order", {"lines": [1]})
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    finished = beatless.client.events(run.run_id)[-2]
    assert (finished.step, finished.data["result"]) == ("undo", ["reserve"])
    traces = [e.data["name"] for e in beatless.client.events(run.run_id) if e.type == "DebugTrace"]
    assert traces == [VALUE]  # no claim has died
    beatless.verify()


def test_the_attempts_of_a_step_that_begins_with_the_end_of_another_are_counted_from_1(
    beatless: Kit,
) -> None:
    run = beatless.start_run("order", {"lines": [200]})
    beatless.work_until_idle()
    beatless.advance(10)
    beatless.work_until_idle()
    events = beatless.client.events(run.run_id)
    started = [(e.step, e.attempt) for e in events if e.type == "StepStarted"]
    ended = [(e.step, e.attempt) for e in events if e.type in ("StepFinished", "StepFailed")]
    assert started == ended
    assert started[:3] == [("reserve", 1), ("charge", 1), ("charge", 2)]


def other(ask: Callable[[RunContext[Any]], Any], **options: Any) -> Plan:
    return plan("order", on_cancel=undo, **options)(ask)


@pytest.mark.parametrize(
    ("changed", "difference", "reason"),
    [
        (
            other(lambda run: run.step(release, {"total": 1})),
            "plan order asks for release where reserve is stored",
            UNKNOWN_STEP,
        ),
        (
            other(lambda run: run.step(reserve, [9])),
            "plan order asks for reserve with other arguments, signals or inputs than are stored",
            CHANGED_CALL,
        ),
    ],
)
def test_a_run_that_a_changed_function_cannot_go_on_with_waits_and_is_told(
    beatless: Kit, changed: Plan, difference: str, reason: str
) -> None:
    run = beatless.start_run("order", {"lines": [1]})
    beatless.step(run.run_id)
    (can,) = places(beatless.app.engine, beatless.app.journal, {"order": order})
    assert (can.step, can.waits) == ("charge", None)

    (place,) = places(beatless.app.engine, beatless.app.journal, {"order": changed})
    assert (place.step, place.waits, place.run_ids) == ("charge", reason, [run.run_id])
    assert place.difference == difference
    assert place.advice is not None
    assert "version=N in @plan(…)" in place.advice

    before = beatless.event_types(run.run_id)
    beatless.executor().execute(changed, run.run_id, 0)
    assert beatless.event_types(run.run_id) == before
    explained = beatless.client.explain(run.run_id)
    assert f"reason: {reason}" in explained[-2].text
    assert "makes the" in explained[-2].text
    assert "has step" not in explained[-2].text
    (finding,) = Doctor(beatless.app).examine(("plans",))
    assert finding.status is Status.WARNING
    assert f"order.charge (1: {run.run_id})" in finding.text
    assert "renamed" not in finding.advice
    assert "`beatless plan check`" in finding.advice

    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_retry_takes_over_the_results_of_a_function(beatless: Kit) -> None:
    bodies: list[str] = []

    @step
    def first(ctx: StepContext) -> str:
        bodies.append("first")
        return "kept"

    @step
    def second(ctx: StepContext, given: str, at: str) -> str:
        bodies.append("second")
        if len(bodies) < 3:
            raise Fatal("no")
        return given

    def function(run: RunContext[Any]) -> Any:
        return run.step(second, run.step(first), run.now().isoformat())

    beatless.app.plans["order"] = plan("order")(function)
    run = beatless.start_run("order")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).error["message"] == "no"
    again = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    assert beatless.client.get_run(again.run_id).result == "kept"
    assert bodies == ["first", "second", "second"]

    from_first = beatless.client.retry_run(again.run_id, from_step="first")
    beatless.work_until_idle()
    assert beatless.client.get_run(from_first.run_id).result == "kept"
    assert bodies[3:] == ["first", "second"]
    beatless.verify()


def test_an_input_of_another_type_is_refused_before_it_is_stored(beatless: Kit) -> None:
    for bad, told in [
        (None, "the run's input"),
        ({"to": "Gent"}, "the run's input.weight"),
        ({"weight": "heavy"}, "the run's input.weight"),
        ({"weight": 2, "too": "Gent"}, r"the run's input\.too is refused: .* has no such member"),
    ]:
        with pytest.raises(BadPayload, match=told):
            beatless.start_run("send", bad)
    beatless.assert_started("send", count=0)
    runs = [
        beatless.start_run("send", given) for given in ({"weight": 2, "to": "Aalst"}, Parcel(0.5))
    ]
    beatless.work_until_idle()
    assert [beatless.client.get_run(run.run_id).result for run in runs] == [
        ["Parcel", 2, "Aalst"],
        ["Parcel", 0.5, "Ghent"],
    ]


def test_the_kit_notices_a_function_that_does_not_do_the_same_twice(beatless: Kit) -> None:
    beatless.start_run("flaky_plan")
    with pytest.raises(AssertionError, match="does not do the same when it is called again"):
        beatless.work_until_idle()


@step
def noted(ctx: StepContext, what: int) -> int:
    return what


def clocked(asks: Callable[[RunContext[Any], int], Any]) -> Plan:
    """A plan that gives a step another number at each call, and then asks for this."""
    numbers = itertools.count(1)

    @plan("clocked")
    def function(run: RunContext[Any]) -> Any:
        run.step(noted, number := next(numbers))
        return asks(run, number)

    return function


def worked_twice(beatless: Kit) -> None:
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()


CLOCKS: dict[str, tuple[Callable[[RunContext[Any], int], Any], str]] = {
    "an approval": (lambda run, _number: run.approve("go?"), "asks for noted with other arguments"),
    "a time": (lambda run, _number: run.sleep(60), "asks for noted with other arguments"),
    "a retry": (
        lambda run, number: run.step(charge, 200 if number == 1 else 1),
        "asks for noted with other arguments",
    ),
}


@pytest.mark.parametrize(("asks", "found"), CLOCKS.values(), ids=CLOCKS)
def test_the_kit_notices_a_clock_in_the_arguments_before_the_run_has_ended(
    beatless: Kit, asks: Callable[[RunContext[Any], int], Any], found: str
) -> None:
    beatless.app.plans["clocked"] = clocked(asks)
    run = beatless.start_run("clocked")
    with pytest.raises(AssertionError, match=found) as failed:
        worked_twice(beatless)
    assert "does not do the same when it is called again" in str(failed.value)
    assert f"run {run.run_id}" in str(failed.value)
    assert "Use run.now()" in str(failed.value)


def test_the_kit_notices_what_has_changed_after_the_first_wait(beatless: Kit) -> None:
    odd = itertools.chain([1, 1, 1], itertools.repeat(2))  # the second call is the kit's own

    @plan("clocked")
    def function(run: RunContext[Any]) -> None:
        run.step(noted, next(odd))
        run.wait("a")
        run.wait("b")

    beatless.app.plans["clocked"] = function
    run = beatless.start_run("clocked")
    beatless.work_until_idle()
    beatless.signal(run.run_id, "a")
    beatless.work_until_idle()
    beatless.signal(run.run_id, "b")
    with pytest.raises(AssertionError, match=r"other arguments.*\(changed_call\)\. Use run\.now"):
        beatless.work_until_idle()
    with pytest.raises(AssertionError, match="plan clocked asks for noted with other arguments"):
        beatless.wait_for_run_completion(run.run_id, timeout=0.01)


def test_a_deploy_in_a_test_leaves_a_run_to_the_plan_that_can_go_on(beatless: Kit) -> None:
    """It is no fault of the function: another plan has executed the run before."""
    former = plan("clocked")(lambda run: [run.step(noted, 1), run.wait("go").name])
    other = plan("clocked")(lambda run: [run.step(noted, 2), run.wait("go").name])
    beatless.app.plans["clocked"] = former
    run = beatless.start_run("clocked")
    beatless.work_until_idle()

    beatless.app.plans["clocked"] = other
    beatless.signal(run.run_id, "go")
    beatless.work_until_idle()
    assert "plan clocked asks for noted with other arguments" in beatless.describe(run.run_id)
    beatless.advance(60)
    beatless.work_until_idle()  # by the other one again

    beatless.app.plans["clocked"] = former
    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.verify()


@pytest.mark.slow
def test_a_function_lives_through_a_killed_process_and_a_body_that_hangs(
    beatless: Kit, tmp_path: Path
) -> None:
    """In a worker's own processes: nothing here waits for a lease to run out."""
    ledger = tmp_path / "ledger"
    input = {"ledger": str(ledger), "kills": 1, "started": str(tmp_path / "started"), "how": "wait"}
    beatless.app.plans["asks"] = asks
    beatless.relay_process("tests.plans:app")
    beatless.worker_process("tests.plans:app")
    run = beatless.start_run("asks", input)
    ended = beatless.wait_for_run_completion(run.run_id)
    assert ended.result == ["abc", "StepTimeout"]
    effects = [json.loads(line)["step"] for line in ledger.read_text().splitlines()]
    assert (effects.count("a"), effects.count("c")) == (1, 1)
    assert (tmp_path / "started").exists()
    beatless.verify()


DOCS = (Path(__file__).parents[2] / "docs" / "plans.md").read_text()


def test_the_example_of_the_documentation_does_what_it_says(beatless: Kit) -> None:
    (block,) = re.findall(r"```python\n(from dataclasses.*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(block, names)
    example: FunctionPlan = names["order"]
    assert [each.name for each in example.steps] == ["reserve", "charge", "release", "pack"]
    beatless.app.plans["order"] = example
    runs = [beatless.start_run("order", {"lines": lines}) for lines in ([7, 8], [2000])]
    for _ in range(3):
        beatless.work_until_idle()
        beatless.advance(60)
    assert [beatless.client.get_run(run.run_id).result for run in runs] == [
        {"paid": "paid 15", "parcels": ["parcel 7", "parcel 8"]},
        {"refused": "declined"},
    ]
    beatless.verify()


@pytest.mark.parametrize("signal", ["paid", "refused", None])
def test_the_example_that_waits_does_what_it_says(beatless: Kit, signal: str | None) -> None:
    (block,) = re.findall(r"```python\n(from beatless import RunContext, .*?)```", DOCS, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(block, names)
    beatless.app.plans["checkout"] = names["checkout"]
    run = beatless.start_run("checkout", {"lines": [7, 8]})
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    if signal is None:
        beatless.advance(3 * 86_400)
    else:
        beatless.signal(run.run_id, signal, {"amount": 15})
    beatless.work_until_idle()
    if signal == "paid":
        assert [each.occurrence for each in beatless.waits(run.run_id)] == ["sleep"]
        beatless.advance(14 * 86_400)
        beatless.work_until_idle()
    packed = {"amount": 15, "parcels": ["parcel 7", "parcel 8"]}
    expected = packed if signal == "paid" else "released 15"
    assert beatless.client.get_run(run.run_id).result == expected
    beatless.verify()


def test_a_retry_of_a_function_takes_over_the_signal_that_a_wait_took(beatless: Kit) -> None:
    bodies: list[Any] = []

    @step
    def ship(ctx: StepContext, paid: Any) -> Any:
        bodies.append([paid.data, ctx.results["paid"].data])
        if len(bodies) == 1:
            raise Fatal("no")
        return paid.seq

    def function(run: RunContext[Any]) -> Any:
        run.sleep(60)
        return run.step(ship, run.wait("paid"))

    beatless.app.plans["order"] = plan("order")(function)
    run = beatless.start_run("order")
    beatless.signal(run.run_id, "paid", 12)
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()
    again = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    found = beatless.client.get_run(again.run_id)
    assert (found.state, found.result) == (RunState.COMPLETED, 2)
    assert bodies == [[12, 12], [12, 12]]
    assert "WaitStarted" not in beatless.event_types(again.run_id)
    beatless.verify()


@plan("turns")
def turns(run: RunContext[Any]) -> Any:
    turn = run.input["turn"]
    for _ in range(3):
        run.step(charge, run.wait("paid").data)
    return run.again({"turn": turn + 3}) if turn < 6 else [turn, run.version]


def read(kit: Kit, run_id: str) -> list[str]:
    """The types of the events that a claim of the run would read."""
    with kit.app.engine.begin() as connection:
        events = kit.app.journal.checkpoint_events(connection, run_id, names=FOLDED, rest=SNOOZED)
        return [event.type for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("point", [None, "step.committed", "wait.committed", "claim.committed"])
def test_a_function_that_begins_again_reads_no_more_than_its_generation(
    beatless: Kit, point: str | None
) -> None:
    beatless.app.plans["turns"] = turns
    run = beatless.start_run("turns", {"turn": 0})
    for number in range(9):
        beatless.signal(run.run_id, "paid", number)
        if number % 3 == 2:
            beatless.signal(run.run_id, "kept", number)
        if point is not None:
            beatless.app.faults.arm(point)
            with suppress(SimulatedCrash):
                beatless.work_until_idle()
            beatless.app.faults.disarm(point)
            beatless.forget_worker()
            beatless.advance(LEASE_S)
        beatless.work_until_idle()
        if number == 5:
            types = read(beatless, run.run_id)
            assert types.count("RunRestarted") == 1
            assert types.index("StepStarted" if "StepStarted" in types else "WaitStarted") > (
                types.index("RunRestarted")
            )
            assert types.count("StepFinished") == 0
            assert len(types) < len(beatless.event_types(run.run_id)) / 2
    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.result) == (RunState.COMPLETED, [6, 1])
    finished = [e for e in beatless.client.events(run.run_id) if e.type == "StepFinished"]
    assert [(event.data or {})["result"] for event in finished] == [
        f"{number} eur, attempt 1" for number in range(9)
    ]
    texts = [moment.text for moment in beatless.client.explain(run.run_id)]
    assert "begins again with another input: generation 3" in texts
    beatless.verify()


@pytest.mark.parametrize("when", ["before all", "in each step"])
def test_signals_that_come_early_are_taken_by_later_generations_in_their_order(
    beatless: Kit, when: str
) -> None:
    @step
    def echo(ctx: StepContext, number: int) -> int:
        if when == "in each step":
            beatless.signal(ctx.run_id, "paid", number + 1)
        return number

    def function(run: RunContext[Any]) -> Any:
        taken = [*(run.input or []), run.step(echo, run.wait("paid").data)]
        return run.again(taken) if len(taken) < 5 else taken

    beatless.app.plans["order"] = plan("order")(function)
    run = beatless.start_run("order")
    for number in range(5 if when == "before all" else 1):
        beatless.signal(run.run_id, "paid", number)
    beatless.work_until_idle()
    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.result) == (RunState.COMPLETED, [0, 1, 2, 3, 4])
    beatless.verify()


def test_what_steps_trace_and_emit_is_no_part_of_the_history_that_may_not_be_too_long(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.orchestrator.long_history.MAX_EVENTS", 20)

    @step
    def chatters(ctx: StepContext) -> None:
        for number in range(15):
            ctx.emit(number)
            ctx.trace("here", number=number)

    def function(run: RunContext[Any]) -> None:
        run.step(chatters)
        run.sleep(60)
        run.step(undo)

    beatless.app.plans["order"] = plan("order")(function)
    run = beatless.start_run("order")
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()
    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.last_seq > 30) == (RunState.COMPLETED, True)


def test_a_retry_of_a_function_that_began_again_goes_on_with_its_last_input(
    beatless: Kit,
) -> None:
    inputs: list[Any] = []

    @step
    def fails_once(ctx: StepContext) -> Any:
        inputs.append(ctx.input)
        if len(inputs) == 2:
            raise Fatal("no")
        return ctx.key.partition(":")[2]

    def function(run: RunContext[Any]) -> Any:
        key = run.step(fails_once)
        return run.again(2) if run.input == 1 else [run.input, key]

    beatless.app.plans["order"] = plan("order")(function)
    run = beatless.start_run("order", 1)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.FAILED
    again = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    assert inputs == [1, 2, 2]
    assert beatless.client.get_run(again.run_id).result[0] == 2
    beatless.verify()


class Shop:
    def __init__(self, price: int) -> None:
        self.price = price

    def sell(self, run: RunContext[Any], factor: int = 1) -> Any:
        return run.step(charge, self.price * factor)


def test_a_plan_may_be_a_bound_method_a_partial_or_one_function_under_two_names(
    beatless: Kit,
) -> None:
    sell = Shop(3).sell
    for name, function in [
        ("bound", sell),
        ("partial", partial(sell, factor=2)),
        ("again", sell),
    ]:
        beatless.app.plans[name] = plan(name)(function)
    results = {}
    for name in ("bound", "partial", "again"):
        run = beatless.start_run(name)
        beatless.executor().execute(beatless.app.plans[name], run.run_id, 0)
        results[name] = beatless.client.get_run(run.run_id).result
    assert results == {
        "bound": "3 eur, attempt 1",
        "partial": "6 eur, attempt 1",
        "again": "3 eur, attempt 1",
    }


def test_two_plans_of_one_name_are_refused_by_the_app(beatless: Kit) -> None:
    twin = plan("order")(lambda run: None)
    with pytest.raises(PlanError, match="two plans are called order"):
        App(beatless.app.settings, plans=[order, twin])


def test_a_function_costs_the_statements_of_a_list_and_one_commit_more(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """RunStarted, the claim, the first start, four boundaries and the end."""
    run = beatless.start_run("order_async", {"lines": [1, 2, 3, 4]})
    rows = f"SELECT count(*) FROM {beatless.app.settings.schema}.run_outbox WHERE run_id = %s"
    beatless.executor().execute(order_async, run.run_id, 0)
    assert postgres.execute(rows, (run.run_id,)).fetchone() == (7,)


def test_the_schema_of_a_declared_input_is_told_over_http(beatless: Kit) -> None:
    with serving(beatless.app) as api, Client(api.url) as client:
        with urlopen(f"{api.url}/v1/plans") as answer:
            told = {each["name"]: each for each in json.load(answer)["plans"]}
        assert told["send"]["input"]["required"] == ["weight"]
        assert told["send"]["input"]["additionalProperties"] is False
        assert told["order"]["input"] == {}
        assert told["order"]["function"] is True
        with pytest.raises(BadPayload, match=r"the run's input\.weight"):
            client.start_run("send", {"to": "Gent"})
