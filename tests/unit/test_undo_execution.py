"""The undoing of a run without Postgres: whatever dies, each step that was begun is undone once."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from beatless import Plan, RunContext, Undone, plan, retry, step
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import Journal, Raised, RunBody, TransactionLost, Worker, WorkerDied

undo_one = step(name="undo_one")(lambda ctx, undone: None)
undo_two = step(name="undo_two")(lambda ctx, undone: None)
one = step(name="one", undo=undo_one)(lambda ctx: None)
two = step(name="two", undo=undo_two)(lambda ctx, number=0: None)
three = step(name="three")(lambda ctx: None)
notify = step(name="notify")(lambda ctx: None)

LIST = Plan("list", [one, two, three], on_cancel=notify)


@plan("function", on_cancel=notify)
def function(run: RunContext) -> None:
    run.step(one)
    run.step(two, 1)
    run.step(two, 2)
    run.step(three)


@plan("branches", on_cancel=notify)
async def branches(run: RunContext) -> None:
    await asyncio.gather(run.step(one), run.step(two, 1), run.step(two, 2))
    await run.step(three)


UNDONE = {
    "list": ["undo_two#undo:two", "undo_one#undo:one"],
    "branches": ["undo_two#undo:two#2", "undo_two#undo:two", "undo_one#undo:one"],
    "function": ["undo_two#undo:two#2", "undo_two#undo:two", "undo_one#undo:one"],
}


def body(request: RunBody) -> Any:
    return Raised(ValueError("no")) if request.step.name == "three" else request.occurrence


def worked(journal: Journal, **options: Any) -> None:
    """Let workers take the run until it has ended; the first one dies as it is told."""
    with suppress(WorkerDied):
        Worker(journal, body, **options).work()
    while not journal.state.final:
        Worker(journal, body).work()


def finished(journal: Journal) -> list[str | None]:
    return [event.step for event in journal.events if event.type == "StepFinished"]


@pytest.mark.parametrize("made", [LIST, function, branches])
@pytest.mark.parametrize("dies", ["dies_before", "dies_after"])
def test_a_run_that_dies_anywhere_is_undone_as_if_it_had_not(made: Plan, dies: str) -> None:
    requests = Worker(journal := Journal(made), body)
    requests.work()
    while not journal.state.final:
        requests.work()
    for number in range(1, len(requests.requests) + 1):
        journal = Journal(made)
        worked(journal, **{dies: number})
        assert journal.state is RunState.FAILED, number
        undone = [name for name in finished(journal) if "#undo:" in str(name)]
        assert undone == UNDONE[made.name], number
        assert [event.seq for event in journal.events] == list(range(1, len(journal.events) + 1))


@pytest.mark.parametrize("made", [LIST, function, branches])
def test_a_cancel_at_any_moment_undoes_what_was_begun_and_calls_on_cancel_last(made: Plan) -> None:
    for number in range(1, 12):
        journal = Journal(made)
        worker = Worker(journal, body, dies_before=number)
        with suppress(WorkerDied):
            worker.work()
        if journal.state.final:
            continue
        journal.cancel()
        worked(journal)
        begun = {
            str(event.step)
            for event in journal.events
            if event.type == "StepStarted" and "undo" in (event.data or {})
        }
        ends = [str(name) for name in finished(journal)]
        assert journal.state is RunState.CANCELLED, number
        assert {name.partition(":")[2] for name in ends if "#undo:" in name} == begun, number
        assert len([name for name in ends if "#undo:" in name]) == len(begun), number
        assert ends[-1] == "notify", number


def test_an_undo_whose_transaction_is_lost_is_called_again() -> None:
    journal, lost = Journal(LIST), [1]

    def loses(request: RunBody) -> Any:
        if request.step.name == "undo_two" and lost:
            lost.pop()
            return TransactionLost("the connection broke")
        return body(request)

    while not journal.state.final:
        Worker(journal, loses).work()
    assert [name for name in finished(journal) if "#undo:" in str(name)] == UNDONE["list"]


def test_the_step_that_undoes_is_given_what_it_undoes() -> None:
    found: list[Undone] = []
    undo = step(name="undo")(lambda ctx, undone: found.append(undone))
    pays = step(name="pays", undo=undo)(lambda ctx, amount, *, to="me": None)

    @plan("asks")
    def asks(run: RunContext) -> None:
        run.step(pays, (1, 2), to="you")
        run.step(three)

    # Its code names no step: they are closed over.
    journal = Journal(asks)
    while not journal.state.final:
        Worker(
            journal,
            lambda request: (
                request.step.function(None) if request.step.name == "undo" else body(request)
            ),
        ).work()
    (undone,) = found
    assert (undone.step, undone.key, undone.finished) == ("pays", "r:pays", True)
    assert (undone.args, dict(undone.kwargs), undone.result) == (([1, 2],), {"to": "you"}, "pays")


@pytest.mark.parametrize("on_cancel", [None, notify])
def test_a_failure_of_a_run_that_was_cancelled_meanwhile_is_told_as_the_last(
    on_cancel: Any,
) -> None:
    tried = step(name="tried", undo=undo_one, retry=retry(max_attempts=3))(lambda ctx: None)
    journal = Journal(Plan("cancelled_meanwhile", [tried, three], on_cancel=on_cancel))

    def fails(request: RunBody) -> Any:
        if request.step.name != "tried":
            return body(request)
        journal.cancel()
        return Raised(ValueError("no"))

    while not journal.state.final:
        Worker(journal, fails).work()
    (failed,) = [event for event in journal.events if event.type == "StepFailed"]
    assert (failed.data or {})["final"]
    assert "undo_one#undo:tried" in finished(journal)
