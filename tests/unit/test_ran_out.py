"""A lease that ran out is no crash: nobody knows that its process has died."""

import asyncio
from typing import Any

import pytest

from beatless import Plan, RunContext, Snooze, plan, retry, step
from beatless.orchestrator.function_boundaries import MAX_TAKEOVERS
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.plan import Step
from beatless.orchestrator.progress import GIVEN_BACK, MAX_RAN_OUT, RAN_OUT
from beatless.orchestrator.requests import Raised, RunBody
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import FAILS, Journal, WorkerDied, steps
from tests.unit.test_function_execution import double, finish, note, outcome, work


def stands_still(_request: RunBody) -> Any:
    """Its worker is not heard of again, whatever has become of it."""
    raise WorkerDied


def left(journal: Journal, times: int, *, unseen: bool = True) -> Journal:
    """So many workers are claimed by, one after the other, and say nothing of the body."""
    for _ in range(times):
        work(journal, stands_still)
        journal.unseen = unseen
    return journal


def attempts(journal: Journal) -> list[int | None]:
    return [event.attempt for event in journal.events if event.type == "StepStarted"]


def failed(journal: Journal) -> list[int | None]:
    return [event.attempt for event in journal.events if event.type == "StepFailed"]


def list_of_one(**options: Any) -> Plan:
    return Plan("p", steps("a", **options))


def function_of_one(**options: Any) -> FunctionPlan:
    (only,) = steps("a", **options)

    @plan("p")
    def function(run: RunContext) -> Any:
        return run.step(only)

    return function


KINDS = {"list": list_of_one, "function": function_of_one}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


def test_leases_that_run_out_are_no_crash_and_cost_no_attempt(make: Any) -> None:
    journal = left(Journal(make()), MAX_RAN_OUT - 1)
    finish(journal, lambda request: request.attempt)
    assert outcome(journal) == 1
    assert attempts(journal) == [1] * MAX_RAN_OUT
    traces = [e.data for e in journal.events if (e.data or {}).get("name") == GIVEN_BACK]
    assert traces == [{"name": GIVEN_BACK, RAN_OUT: True}] * (MAX_RAN_OUT - 1)


def test_from_the_third_lease_on_it_is_a_suspect_which_has_ever_fewer_beside_it(make: Any) -> None:
    """Else a step that kills its worker unseen has those beside it given up, too."""
    told = []

    def tells(request: RunBody) -> Any:
        told.append(request.deaths)
        raise WorkerDied

    journal = Journal(make())
    for _ in range(5):
        work(journal, tells)
        journal.unseen = True
    assert told == [0, 0, 0, 1, 2]


def test_a_step_whose_lease_runs_out_again_and_again_fails_with_the_true_reason(make: Any) -> None:
    journal = finish(left(Journal(make()), MAX_RAN_OUT))
    assert attempts(journal) == [1] * MAX_RAN_OUT
    error = outcome(journal)
    assert error["type"] in ("LeaseRanOut", "StepFailed")
    assert "the lease of step a ran out 20 times in a row" in str(error)
    assert "ended its process" not in str(error)
    assert failed(journal) == [1]


def test_a_step_that_shall_not_begin_twice_does_not_after_its_lease_ran_out(make: Any) -> None:
    journal = finish(left(Journal(make(retry=retry(max_crashes=1))), 1))
    assert attempts(journal) == [1]
    assert "the lease of step a ran out once" in str(outcome(journal))
    assert failed(journal) == [1]


def test_a_death_that_is_known_is_a_crash_after_leases_that_ran_out(make: Any) -> None:
    journal = left(Journal(make(retry=retry(max_crashes=2))), 3)
    finish(left(journal, 2, unseen=False))
    assert attempts(journal) == [1, 1, 1, 1, 2]
    error = str(outcome(journal))
    assert "step a ended its process 2 times" in error
    assert "ran out 3 times in a row" in error
    assert failed(journal) == [2]


@pytest.mark.parametrize("said", [Raised(FAILS), Snooze(1)], ids=["fails", "snoozes"])
def test_what_a_step_says_forgives_the_leases_that_ran_out(make: Any, said: Any) -> None:
    again = retry(max_attempts=2, initial=1, jitter=0)
    journal = left(Journal(make(retry=again)), MAX_RAN_OUT - 1)
    work(journal, lambda _: said)
    journal.passed_s += 5
    finish(left(journal, MAX_RAN_OUT - 1), lambda request: "done")
    assert outcome(journal) == "done"


def test_a_worker_that_lacks_the_step_says_that_the_lease_ran_out() -> None:
    journal = left(Journal(list_of_one(retry=retry(max_crashes=1))), 1)
    journal.plan = Plan("p", steps("b"))
    work(journal)
    assert journal.state is RunState.QUEUED
    journal.unseen = False
    journal.plan = list_of_one(retry=retry(max_crashes=2))
    work(journal, lambda _: "done")
    assert outcome(journal) == "done"
    assert attempts(journal) == [1, 1]


def test_an_undo_whose_lease_runs_out_has_not_crashed() -> None:
    undo = step(name="undo")(lambda ctx, undone: None)
    (begun,) = steps("a", undo=undo)
    journal = Journal(Plan("p", [begun]))
    work(journal, lambda _: Raised(FAILS))
    finish(left(journal, MAX_TAKEOVERS + 1))
    assert "undo" not in outcome(journal)
    assert attempts(journal) == [1] * (MAX_TAKEOVERS + 3)


def test_a_function_that_is_not_heard_of_again_has_not_ended_its_process() -> None:
    calm = False

    @plan("p")
    def long(run: RunContext) -> str:
        if not calm:
            raise SystemExit
        return "done"

    journal = Journal(long)

    def fall_silent(times: int) -> None:
        for _ in range(times):
            with pytest.raises(SystemExit):
                work(journal, leaving=lambda: True)
            journal.state, journal.unseen = RunState.RUNNING, True

    fall_silent(MAX_TAKEOVERS + 1)
    calm = True
    assert outcome(finish(journal)) == "done"

    calm, journal = False, Journal(long)
    fall_silent(MAX_RAN_OUT)
    work(journal)
    assert outcome(journal)["type"] == "PlanCrashed"
    assert "20 times its lease ran out" in outcome(journal)["message"]


def beside(*calls: tuple[Step, int]) -> FunctionPlan:
    @plan("p")
    async def several(run: RunContext) -> Any:
        return await asyncio.gather(*(run.step(*each) for each in calls), return_exceptions=True)

    return several


def test_steps_beside_each_other_are_no_crash_and_then_each_is_alone() -> None:
    journal = left(Journal(beside((double, 1), (note, 2))), MAX_TAKEOVERS + 1)
    finish(journal, lambda request: request.attempt)
    assert outcome(journal) == [1, 1]
    told = [e.data for e in journal.events if (e.data or {}).get("name") == GIVEN_BACK]
    assert told
    assert all(data == {"name": GIVEN_BACK, RAN_OUT: True} for data in told)


def test_the_last_of_several_is_no_crash_either() -> None:
    """One waits for its next attempt: only the other was in hand."""
    shaky = step(name="shaky", retry=retry(max_attempts=2, initial=3600, jitter=0))(
        lambda ctx, _: 1
    )
    journal = Journal(beside((shaky, 1), (double, 2)))

    def fails(request: RunBody) -> Any:
        if request.occurrence == "shaky":
            return Raised(FAILS)
        raise WorkerDied

    for _ in range(7):
        work(journal, fails)
        journal.unseen = True
    journal.passed_s = 7200
    finish(journal, lambda request: request.attempt)
    assert outcome(journal) == [2, 1]
