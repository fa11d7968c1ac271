"""A plan's function that begins again, without Postgres: see `test_function_execution`."""

from typing import Any

import pytest

from beatless import RunContext, plan
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import reusable_calls
from beatless.orchestrator.requests import RunBody, Stopped
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import Journal
from tests.unit.test_function_execution import (
    call,
    double,
    finish,
    note,
    outcome,
    stands,
    undo,
    work,
)


@plan("p", on_cancel=undo)
def counts(run: RunContext) -> Any:
    number = run.input or 1
    number = run.step(double, number)
    if number < 8:
        return run.again(number)
    return [number, run.random() < 2]


@plan("p")
async def counts_async(run: RunContext) -> Any:
    number = await run.step(double, run.input or 1)
    return run.again(number) if number < 8 else [number, True]


KINDS = {"sync": counts, "async": counts_async}


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_begins_again_with_another_input_and_names_that_were_not_used(
    kind: str,
) -> None:
    keys: list[str] = []

    def body(request: RunBody) -> Any:
        keys.append(request.key)
        return call(request)

    journal = Journal(KINDS[kind])
    finish(journal, body)
    assert outcome(journal) == [8, True]
    assert keys == ["r:double", "r:double#2", "r:double#3"]
    restarts = [event.data for event in journal.events if event.type == "RunRestarted"]
    assert [(each["generation"], each["input"]) for each in restarts] == [(2, 2), (3, 4)]
    # The last result of a generation is written together with the begin of the next one.
    types = [[event.type.value for event in boundary.events] for boundary in journal.boundaries]
    assert types[:2] == [["StepStarted"], ["StepFinished", "RunRestarted"]]


def test_a_signal_that_no_wait_has_taken_stays_and_one_that_was_taken_does_not() -> None:
    @plan("p")
    def takes(run: RunContext) -> Any:
        taken = [*(run.input or []), run.wait("paid").data]
        return run.again(taken) if len(taken) < 3 else taken

    journal = Journal(takes)
    journal.inbox += [("paid", 1), ("other", 0), ("paid", 2)]
    work(journal)
    work(journal)
    assert stands(journal) == (RunState.QUEUED, "again")
    work(journal)
    assert stands(journal) == (RunState.QUEUED, "wait")
    journal.inbox.append(("paid", 3))
    assert outcome(finish(journal)) == [1, 2, 3]
    started = [event.step for event in journal.events if event.type == "WaitStarted"]
    assert started == ["paid", "paid#2", "paid#3"]


def test_values_are_drawn_anew_and_pinned_calls_are_others() -> None:
    seen: list[Any] = []

    @plan("p")
    def draws(run: RunContext) -> Any:
        seen.append(run.random())
        run.step(note, run.input, id="a")
        return run.again(1) if run.input is None else "end"

    journal = finish(Journal(draws))
    assert seen[0] != seen[1]
    assert "StepFinished note#a" in journal.calls
    assert "StepFinished note#a#2" in journal.calls


def test_a_function_that_goes_on_after_it_has_begun_again_fails_with_what_to_do() -> None:
    @plan("p")
    def forgets(run: RunContext) -> Any:
        run.again(1)
        return "end"

    assert "write return run.again" in outcome(finish(Journal(forgets)))["message"]


def test_an_input_that_is_not_json_fails_the_run() -> None:
    error = outcome(finish(Journal(plan("p")(lambda run: run.again(object())))))
    assert error["type"] == "BadPayload"


def test_the_events_of_a_generation_are_counted_and_not_those_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("beatless.orchestrator.long_history.MAX_EVENTS", 20)

    @plan("p")
    def turns(run: RunContext) -> Any:
        turn = run.input or 0
        for _ in range(5):
            run.step(double, turn)
        return run.again(turn + 1) if turn < 6 else turn

    journal = finish(Journal(turns))
    assert outcome(journal) == 6
    assert len(journal.events) > 60


def test_a_cancel_before_the_begin_ends_the_run() -> None:
    journal = Journal(plan("p")(counts.function))

    def body(request: RunBody) -> Any:
        journal.cancel()
        return 2

    work(journal, body)
    assert journal.state is RunState.CANCELLED
    assert "RunRestarted" not in journal.types


def test_a_run_that_is_cancelled_later_is_undone() -> None:
    journal = Journal(counts)
    work(journal)
    work(journal, lambda request: Stopped())
    journal.cancel()
    finish(journal)
    assert journal.state is RunState.CANCELLED
    assert journal.calls[-3:] == ["StepStarted undo", "StepFinished undo", "RunFinished"]


def test_a_retry_goes_on_in_the_generation_of_the_run_that_failed() -> None:
    def function(run: RunContext) -> Any:
        first = run.step(double, run.input or 1)
        if run.input is None:
            return run.again(5)
        return [first, run.step(note, first)]

    failing: FunctionPlan = plan("p")(function)
    journal = Journal(failing)
    work(journal)
    work(journal, dies_before=5)
    assert journal.calls[-1] == "StepStarted note"
    reused = reusable_calls(failing, journal.events, "note")

    again = Journal(failing, input=5)
    again.events.clear()
    again.append("RunStarted", data={"plan": "p", "reused": reused})
    bodies: list[str] = []

    def body(request: RunBody) -> Any:
        bodies.append(request.occurrence)
        return call(request)

    again.append("DebugTrace", data={"name": "read"})
    assert outcome(finish(again, body)) == [10, [[10], {}]]
    assert bodies == ["note"]
