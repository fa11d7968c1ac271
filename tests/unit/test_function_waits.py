"""The waits of a plan that is a function, without Postgres: see `test_function_execution`."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from beatless import Plan, RunContext, Signal, days, plan, step
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.requests import RunBody
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import Journal, Worker
from tests.unit.test_function_execution import double, finish, note, outcome, stands, undo, work


@plan("p", on_cancel=undo)
def pays(run: RunContext) -> Any:
    stock = run.step(double, 4)
    paid = run.wait("paid", "refused", timeout=100)
    if paid is None:
        return run.step(note, "late", stock)
    return run.step(note, paid.name, paid.data, paid.seq)


@plan("p")
async def pays_async(run: RunContext) -> Any:
    stock = await run.step(double, 4)
    paid = await run.wait("paid", "refused", timeout=100)
    if paid is None:
        return await run.step(note, "late", stock)
    return await run.step(note, paid.name, paid.data, paid.seq)


PARCEL = Plan("parcel", [step(name="pack")(lambda ctx: None)])

KINDS = {"sync": pays, "async": pays_async}

BEGUN = ["StepStarted", "StepFinished", "WaitStarted"]
ENDED = ["WaitFinished", "StepStarted", "StepFinished", "RunFinished"]


def committed(journal: Journal) -> list[list[str]]:
    """The types of the events of each boundary."""
    return [[event.type.value for event in boundary.events] for boundary in journal.boundaries]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wait_begins_with_the_end_of_a_step_and_ends_with_the_start_of_the_next(
    kind: str,
) -> None:
    journal = Journal(KINDS[kind])
    work(journal)
    assert stands(journal)[0] is RunState.QUEUED
    assert journal.reasons[-1] == "wait"
    assert journal.types == BEGUN

    journal.inbox.append(("refused", {"why": "no money"}))
    work(journal)
    assert journal.types == [*BEGUN, "SignalReceived", *ENDED]
    assert outcome(journal) == [["refused", {"why": "no money"}, 5], {}]
    assert committed(journal) == [
        ["StepStarted"],
        ["StepFinished", "WaitStarted"],
        [],  # parked
        ["WaitFinished", "StepStarted"],
        ["StepFinished", "RunFinished"],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_begins_with_the_end_of_another_or_of_a_wait_is_at_its_first_attempt(
    kind: str,
) -> None:
    journal = Journal(KINDS[kind])
    work(journal)
    journal.inbox.append(("refused", None))
    work(journal)
    started = [event.attempt for event in journal.events if event.type == "StepStarted"]
    ended = [event.attempt for event in journal.events if event.type == "StepFinished"]
    assert started == ended == [1] * len(ended)
    assert len(ended) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_out_gives_none(kind: str) -> None:
    journal = Journal(KINDS[kind])
    work(journal)
    journal.passed_s = 99
    work(journal)
    assert journal.state is RunState.QUEUED
    journal.passed_s = 101
    work(journal)
    assert outcome(journal) == [["late", 8], {}]
    assert journal.types == [*BEGUN, *ENDED]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before the claim", "as it parks", "as it is timed out"])
def test_a_signal_wins_whenever_it_comes(kind: str, when: str) -> None:
    journal = Journal(KINDS[kind])

    def send() -> None:
        if not any(event.type == "SignalReceived" for event in journal.events):
            journal.inbox.append(("paid", 12))

    if when == "before the claim":
        send()
        work(journal)
    elif when == "as it parks":
        work(journal, looks=send)
    else:
        work(journal)
        journal.passed_s = 101
        work(journal, looks=send)
    result = outcome(journal)
    assert result[0][:2] == ["paid", 12]
    assert journal.types.count("WaitFinished") == 1
    # The function was told that nothing came, or not: what it does is by the journal alone.
    assert journal.calls.count("StepStarted note") == 1


def test_waits_are_named_in_the_order_of_the_calls_and_take_the_oldest_signal() -> None:
    @plan("p")
    def waits(run: RunContext) -> Any:
        found = [run.wait("a"), run.wait("a", "b"), run.wait("b", "a", id="x")]
        run.sleep(10)
        run.sleep(10, name="nap")
        run.sleep(days(1))
        return [each.data for each in found]

    journal = Journal(waits)
    journal.inbox += [("b", 1), ("a", 2), ("c", 3), ("a", 4)]
    for _ in range(4):
        work(journal)
        journal.passed_s += 86_401
    assert outcome(journal) == [2, 1, 4]
    started = [call for call in journal.calls if call.startswith("WaitStarted")]
    assert started == [f"WaitStarted {name}" for name in ["a", "a#2", "b#x", "sleep", "nap"]] + [
        "WaitStarted sleep#2"
    ]


def waits_then(ask: Callable[[RunContext], Any], **options: Any) -> FunctionPlan:
    def function(run: RunContext) -> Any:
        run.step(double, 1)
        found = ask(run)
        return run.step(note, None if found is None else found.data)

    return plan("p", **options)(function)


WAITS = waits_then(lambda run: run.wait("paid", timeout=100))

PAID = Signal(name="paid", data=12, seq=5)

CHANGED: dict[str, tuple[FunctionPlan, Any]] = {
    "the same": (WAITS, RunState.COMPLETED),
    "another time-out": (waits_then(lambda run: run.wait("paid", timeout=1)), RunState.COMPLETED),
    "other signals": (waits_then(lambda run: run.wait("paid", "refused")), "changed_call"),
    "a sleep": (waits_then(lambda run: run.sleep(9, name="paid")), "changed_call"),
    "no wait": (waits_then(lambda run: PAID), "unknown_step"),
    "another wait": (waits_then(lambda run: run.wait("refused")), "unknown_step"),
    "a step before": (
        waits_then(lambda run: run.step(double, 2) and run.wait("paid")),
        "unknown_step",
    ),
    "removed": (waits_then(lambda run: PAID, removed=["paid"]), RunState.COMPLETED),
    "renamed": (
        waits_then(lambda run: run.wait("paid", name="money"), renamed={"paid": "money"}),
        RunState.COMPLETED,
    ),
}


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("change", CHANGED)
def test_a_run_at_a_wait_or_behind_it_under_a_changed_plan(change: str, ended: bool) -> None:
    changed, expected = CHANGED[change]
    journal = Journal(WAITS)
    work(journal)
    if ended:
        journal.inbox.append(("paid", 12))
        work(journal, dies_before=4)
        assert journal.calls[-2:] == ["WaitFinished paid", "StepStarted note"]
    journal.plan = changed
    journal.inbox.append(("paid", 13))
    before = journal.types.count("WaitFinished")
    work(journal)
    if isinstance(expected, RunState):
        assert journal.state is expected
        assert outcome(journal) == [[12 if ended or change == "removed" else 13], {}]
        return
    assert stands(journal) == (RunState.QUEUED, expected)
    assert journal.types.count("WaitFinished") == before
    journal.plan = WAITS
    assert outcome(finish(journal)) == [[12 if ended else 13], {}]


@pytest.mark.parametrize("first", [True, False])
def test_a_wait_stores_the_version_that_began_it(first: bool) -> None:
    def function(run: RunContext) -> Any:
        if not first:
            run.step(double, 1)
        return run.wait("paid").data

    journal = Journal(plan("p", version=3)(function), version="v1")
    work(journal)
    assert journal.types[-1] == "WaitStarted"
    journal.plan = plan("p", version=2)(function)
    journal.inbox.append(("paid", 7))
    work(journal)
    assert stands(journal) == (RunState.QUEUED, "unknown_step")
    journal.plan = plan("p", version=3)(function)
    assert outcome(finish(journal)) == 7


def test_a_pinned_wait_goes_on_with_other_signals_as_it_began() -> None:
    journal = Journal(waits_then(lambda run: run.wait("paid", id="order")))
    work(journal)
    journal.plan = waits_then(lambda run: run.wait("paid", "refused", id="order"))
    journal.inbox += [("refused", 1), ("paid", 2)]
    assert outcome(finish(journal)) == [[2], {}]


def test_what_the_function_does_to_the_data_of_a_signal_is_seen_by_nobody_else() -> None:
    seen: list[Any] = []

    @plan("p")
    def changes(run: RunContext) -> Any:
        paid = run.wait("paid")
        paid.data["amount"] = 0
        return run.step(double, 1)

    def body(request: RunBody) -> Any:
        seen.append(request.results["paid"].data)
        return 2

    journal = Journal(changes)
    journal.inbox.append(("paid", {"amount": 12}))
    work(journal, body)
    assert seen == [{"amount": 12}]


def test_a_value_that_new_code_draws_before_an_open_wait_is_stored_with_its_end() -> None:
    journal = Journal(plan("p")(lambda run: [run.wait("paid"), run.step(note, "x")][1]))
    work(journal)
    journal.plan = plan("p")(lambda run: [run.random(), run.wait("paid"), run.step(double, 1)][0])
    journal.inbox.append(("paid", None))
    work(journal, dies_before=4)
    values = [event.data["value"] for event in journal.events if event.type == "DebugTrace"]
    assert len(values) == 1
    assert outcome(finish(journal)) == values[0]


def test_a_worker_that_stops_as_a_wait_ends_says_what_would_have_followed() -> None:
    journal = Journal(pays)
    work(journal)
    journal.inbox.append(("paid", 12))
    work(journal, stopping=lambda: journal.types[-1] == "SignalReceived")
    finished = next(event for event in journal.events if event.type == "WaitFinished")
    assert finished.data["following"] == "note"
    assert stands(journal) == (RunState.QUEUED, "shutdown")
    assert outcome(finish(journal))[0][0] == "paid"


def test_a_step_that_is_followed_by_a_wait_names_it_as_its_worker_stops() -> None:
    journal = Journal(pays)
    work(journal, max_steps=1)
    assert journal.events[-1].data == {"result": 8, "following": "paid"}
    work(journal)
    assert journal.types[-1] == "WaitStarted"


def test_a_cancelled_run_that_waits_is_undone_without_a_call_of_its_function() -> None:
    journal = Journal(pays)
    work(journal)
    journal.cancel()
    seen: list[Any] = []
    work(journal, lambda request: seen.append(sorted(request.results)))
    assert seen == [["double"]]
    assert journal.state is RunState.CANCELLED
    assert journal.calls[-3:] == ["StepStarted undo", "StepFinished undo", "RunFinished"]
    assert "DebugTrace" not in journal.types  # no claim has died


def test_a_cancel_wins_over_a_signal_that_came_before_the_boundary() -> None:
    journal = Journal(plan("p")(pays.function))
    journal.inbox.append(("paid", 1))

    def body(request: RunBody) -> Any:
        journal.cancel()
        return 8

    work(journal, body)
    assert journal.state is RunState.CANCELLED
    assert "WaitFinished" not in journal.types


def test_the_deadline_wins_over_a_signal() -> None:
    journal = Journal(plan("p")(pays.function))
    work(journal)
    journal.inbox.append(("paid", 1))
    journal.take_in()
    Worker(journal).work(late=True)
    assert outcome(journal)["type"] == "DeadlineExceeded"


def test_a_run_of_a_list_that_waits_goes_on_as_a_function() -> None:
    journal = Journal(WAITS)
    journal.append("StepStarted", step="double", attempt=1)
    journal.append("StepFinished", step="double", attempt=1, data={"result": 2})
    journal.append("WaitStarted", step="paid", data={"kind": "signal", "names": ["paid"]})
    journal.inbox.append(("paid", 7))
    assert outcome(finish(journal)) == [[7], {}]


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (lambda run: run.wait(), "needs the name of a signal"),
        (lambda run: run.wait("a b"), "must match"),
        (lambda run: run.wait("a", timeout=-1), "timeout must be more than 0 seconds"),
        (lambda run: run.sleep(0), "must be more than 0 seconds"),
        (lambda run: run.sleep("a day"), "must be more than 0 seconds"),
        (lambda run: run.wait("a", id="7"), "a#7 is the seventh call of a"),
        (
            lambda run: (run.step(double, 1), run.wait("double")),
            "a step, and a wait or children, called double",
        ),
    ],
)
def test_a_bad_wait_fails_the_run_with_what_to_do(
    asks: Callable[[RunContext], Any], message: str
) -> None:
    error = outcome(finish(Journal(plan("p")(asks))))
    assert error["type"] == PlanError.__name__
    assert message in error["message"]


def test_a_step_with_the_name_of_a_wait_is_refused() -> None:
    paid = step(name="paid")(lambda ctx: 1)
    journal = Journal(plan("p")(lambda run: (run.wait("paid"), run.step(paid))))
    journal.inbox.append(("paid", 1))
    assert "a step, and a wait or children, called paid" in outcome(finish(journal))["message"]


def test_a_call_of_an_async_plan_that_is_not_awaited_is_named() -> None:
    @plan("p")
    async def last(run: RunContext) -> Any:
        await run.step(double, 1)
        run.sleep(10)

    @plan("p")
    async def before_another(run: RunContext) -> Any:
        run.sleep(10)
        return await run.step(double, 1)

    @plan("p")
    async def takes_it_for_the_result(run: RunContext) -> Any:
        return run.child(PARCEL).result()

    @plan("p")
    async def takes_it_for_results(run: RunContext) -> Any:
        return list(run.map(PARCEL, [1, 2]))

    for forgets in (last, before_another, takes_it_for_the_result, takes_it_for_results):
        error = outcome(finish(Journal(forgets)))
        assert error["type"] == PlanError.__name__
        assert "was not awaited" in error["message"]
        assert "write await " in error["message"]
        assert "run.child(…), run.map(…) and the result() of a child" in error["message"]


def test_a_call_that_is_not_awaited_is_named_with_its_line() -> None:
    @plan("p")
    async def a_step(run: RunContext) -> Any:
        await run.step(double, 1)
        run.step(double, 2)
        await run.sleep(10)

    @plan("p")
    async def a_wait_that_is_kept(run: RunContext) -> Any:
        paid = run.wait("paid")
        return paid is not None

    @plan("p")
    async def the_second_of_two(run: RunContext) -> Any:
        one, two = run.sleep(1), run.sleep(2)
        del two
        await one

    named = {
        a_step: ("run.step(…), called double#2,", 2),
        a_wait_that_is_kept: ("run.wait(…), called paid,", 1),
        the_second_of_two: ("run.sleep(…), called sleep#2,", 1),
    }
    for forgets, (call, line) in named.items():
        error = outcome(finish(Journal(forgets)))
        line += forgets.function.__code__.co_firstlineno + 1
        assert f"plan p: {call} in line {line} of test_function_waits.py was" in error["message"]


def test_an_error_behind_a_call_that_was_not_awaited_is_shown_as_its_cause() -> None:
    @plan("p")
    async def forgets(run: RunContext) -> Any:
        return run.child(PARCEL).result()

    traceback = outcome(finish(Journal(forgets)))["traceback"]
    assert "return run.child(PARCEL).result()" in traceback
    assert "AttributeError" in traceback
    assert traceback.rindex("return run.child") > traceback.index("direct cause")


def test_what_needs_a_clock_or_a_thread_is_refused_with_what_to_do() -> None:
    @plan("p")
    async def has_a_clock(run: RunContext) -> Any:
        async with asyncio.timeout(1):
            await run.wait("paid")

    @plan("p")
    async def times(run: RunContext) -> Any:
        await asyncio.to_thread(print)

    for refused, use in ((has_a_clock, "run.sleep(…)"), (times, "a thread")):
        error = outcome(finish(Journal(refused)))
        assert error["type"] == PlanError.__name__
        assert use in error["message"]
        assert "do the rest in a step" in error["message"]


def test_an_option_that_is_given_by_its_place_fails_the_run_with_what_to_write() -> None:
    @plan("p")
    def asks(run: RunContext) -> Any:
        return run.approve("Refund?", dict, 60)

    @plan("p")
    async def sleeps(run: RunContext) -> Any:
        return await run.sleep(60, "night")

    for refused, written in (
        (asks, "run.approve(title, form=…, timeout=…)"),
        (sleeps, "run.sleep(duration, name=…)"),
    ):
        error = outcome(finish(Journal(refused)))
        assert error["type"] == "TypeError"
        assert written in error["message"]
