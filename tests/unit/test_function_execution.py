"""The execution of a plan that is a function, without Postgres: see `test_execution`."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beatless import Fatal, Finish, RunContext, Snooze, StepFailed, plan, retry, step
from beatless.orchestrator import long_history
from beatless.orchestrator.function_boundaries import MAX_TAKEOVERS
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.requests import (
    Cancelled,
    Commit,
    CommitFailed,
    Raised,
    RunBody,
    Stopped,
    TransactionLost,
)
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import Journal, Worker, WorkerDied


@step
def double(ctx: Any, number: int) -> int:
    return 2 * number


@step
def note(ctx: Any, *args: Any, **kwargs: Any) -> Any:
    return [list(args), kwargs]


@step(retry=retry(max_attempts=2, initial=10, jitter=0))
def shaky(ctx: Any, number: int = 0) -> int:
    raise ValueError("no")


@step
def undo(ctx: Any) -> None: ...


def call(request: RunBody) -> Any:
    """The body itself."""
    try:
        return request.step.function(None)
    except Exception as error:
        return Raised(error)


def work(journal: Journal, body: Callable[[RunBody], Any] = call, **options: Any) -> Worker:
    worker = Worker(journal, body, **options)
    with suppress(WorkerDied):
        worker.work()
    return worker


def finish(journal: Journal, body: Callable[[RunBody], Any] = call) -> Journal:
    """Claims until the run has ended."""
    for _ in range(50):
        if journal.state.final:
            return journal
        work(journal, body)
    raise AssertionError(journal.calls)


def outcome(journal: Journal) -> Any:
    data = journal.events[-1].data
    return data["result"] if data["outcome"] == "completed" else data["error"]


def test_five_steps_are_the_events_of_a_list_and_one_commit_more() -> None:
    @plan("p")
    def five(run: RunContext) -> int:
        number = 1
        for _ in range(5):
            number = run.step(double, number)
        return number

    journal = Journal(five)
    work(journal)
    assert outcome(journal) == 32
    assert len(journal.events) == 13 - 1  # the list's has no StepStarted more: RunStarted, ten, end
    assert len(journal.boundaries) == 6
    assert journal.calls[:4] == [
        *("StepStarted double", "StepFinished double"),
        *("StepStarted double#2", "StepFinished double#2"),
    ]


def test_a_function_is_called_once_in_a_claim_however_many_steps_it_has() -> None:
    called = []

    @plan("p")
    def many(run: RunContext) -> None:
        called.append(1)
        for number in range(20):
            run.step(double, number)

    work(Journal(many))
    assert called == [1]


def test_a_step_gets_its_arguments_and_the_context() -> None:
    @plan("p")
    def one(run: RunContext) -> Any:
        return run.step(note, 1, "two", three=[3])

    assert outcome(finish(Journal(one))) == [[1, "two"], {"three": [3]}]


def test_an_async_plan_awaits_its_steps() -> None:
    @plan("p")
    async def two(run: RunContext) -> int:
        return await run.step(double, await run.step(double, 1))

    journal = Journal(two)
    work(journal, dies_before=4)
    assert outcome(finish(journal)) == 4


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_is_called_with_the_run_is_refused(is_async: bool) -> None:
    @plan("p")
    def called(run: RunContext) -> Any:
        return double(run, 5)

    @plan("p")
    async def awaited(run: RunContext) -> Any:
        return await double(run, 5)

    error = outcome(finish(Journal(awaited if is_async else called)))
    assert (error["type"], "write run.step(double, …)" in error["message"]) == ("PlanError", True)


def test_a_step_may_call_another_as_a_function() -> None:
    @step
    def twice(ctx: Any) -> int:
        return int(double(ctx, double(ctx, 1)))

    @plan("p")
    def calls(run: RunContext) -> Any:
        return run.step(twice)

    assert outcome(finish(Journal(calls))) == 4


def test_an_async_plan_that_awaits_anything_else_fails_with_what_to_do() -> None:
    class Other:
        def __await__(self) -> Any:
            yield "a future"

    @plan("p")
    async def waits(run: RunContext) -> None:
        await Other()

    error = outcome(finish(Journal(waits)))
    assert (error["type"], "only calls of run" in error["message"]) == ("PlanError", True)


def test_the_function_gets_what_a_replay_would_decode() -> None:
    @plan("p")
    def decoded(run: RunContext) -> Any:
        given = run.step(note, (1, 2), a={1: 1.5})
        given[1]["a"]["seen"] = True  # by nobody else
        return run.step(note, given)

    seen: list[Any] = []

    def body(request: RunBody) -> Any:
        seen.append(json.dumps(request.results))
        return call(request)

    live = Journal(decoded)
    work(live, body)
    assert "seen" not in seen[-1]
    died = Journal(decoded)
    work(died, dies_before=4)
    assert outcome(finish(died)) == outcome(live)


def test_values_are_stored_with_the_next_boundary_and_given_again() -> None:
    seen: list[Any] = []

    @plan("p")
    def values(run: RunContext) -> Any:
        drawn = [run.now(), run.random(), run.uuid()]
        seen.append(list(drawn))
        run.step(double, 1)
        drawn.append(run.random())
        seen.append(list(drawn))
        return [str(each) for each in drawn]

    journal = Journal(values)
    work(journal, dies_before=3)
    finish(journal)
    assert seen[-1][:3] == seen[0]
    assert outcome(journal) == [str(each) for each in seen[-1]]
    assert journal.types[:4] == ["DebugTrace", "DebugTrace", "DebugTrace", "StepStarted"]


FAILS = {
    "retried": (shaky, ["StepStarted", "StepFailed", "StepStarted", "StepFailed"]),
    "Fatal": (step(name="fatal")(lambda ctx: fatal()), ["StepStarted", "StepFailed"]),
    "no JSON": (step(name="odd")(lambda ctx: object()), ["StepStarted", "StepFailed"]),
    "a route": (step(name="route")(lambda ctx: Finish(1)), ["StepStarted", "StepFailed"]),
}


def fatal() -> None:
    raise Fatal("never")


@pytest.mark.parametrize("failing", FAILS)
def test_a_step_that_has_failed_for_good_is_told_and_the_function_goes_on(failing: str) -> None:
    failed, types = FAILS[failing]

    @plan("p")
    def catches(run: RunContext) -> Any:
        try:
            run.step(failed)
        except StepFailed as error:
            return [run.step(double, 4), error.step, error.type, error.message]

    journal = finish(Journal(catches))
    assert journal.types == [*types, "StepStarted", "StepFinished", "RunFinished"]
    told = outcome(journal)
    assert told[:2] == [8, failed.name]

    # The same when it is replayed, at each of its events.
    for dies in range(2, 8):
        again = Journal(catches)
        work(again, dies_after=dies)
        assert outcome(finish(again)) == told


def test_a_failure_that_leaves_the_function_fails_the_run_with_the_error_of_the_step() -> None:
    @plan("p")
    def passes(run: RunContext) -> Any:
        return run.step(shaky)

    journal = finish(Journal(passes))
    assert journal.state is RunState.FAILED
    assert outcome(journal) == {"type": "ValueError", "message": "no", "step": "shaky"}


def test_an_error_of_the_function_itself_fails_the_run_with_its_traceback() -> None:
    @plan("p")
    def breaks(run: RunContext) -> Any:
        return {}[run.step(double, 2)]

    journal = finish(Journal(breaks))
    error = outcome(journal)
    assert (error["type"], error["message"]) == ("KeyError", "4")
    assert "in breaks" in error["traceback"]
    assert journal.types == ["StepStarted", "StepFinished", "RunFinished"]


def test_a_result_that_is_not_json_fails_the_run_and_not_the_step() -> None:
    @plan("p")
    def odd(run: RunContext) -> Any:
        run.step(double, 1)
        return object()

    journal = finish(Journal(odd))
    assert (outcome(journal)["type"], journal.types[1]) == ("BadPayload", "StepFinished")


def test_the_path_in_a_result_that_is_not_json_is_not_taken_for_a_run_id() -> None:
    @plan("p")
    def odd(run: RunContext) -> Any:
        return {"a": {1}}

    message = outcome(finish(Journal(odd)))["message"]
    assert message.startswith("result.a of run ")
    assert message.endswith(" is a set, which is not JSON: use sorted(…)")


def test_arguments_that_are_not_json_are_refused_by_name() -> None:
    @plan("p")
    def odd(run: RunContext) -> Any:
        run.step(note, object())

    assert "step note: its arguments" in outcome(finish(Journal(odd)))["message"]


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        (lambda run: run.step(lambda ctx: 1), "decorate it with @step"),
        (
            lambda run: (run.step(double, 1), run.step(TWINS["double"], 1)),
            "two steps called double",
        ),
        (lambda run: run.step(double), "step double: missing a required argument: 'number'"),
        (
            lambda run: run.step(double, 1, id="7"),
            "not of digits alone, since double#7 is the seventh call of double: give it a word",
        ),
        (lambda run: run.step(double, 1, id=7), "the id 7 of double must be a str of letters"),
        (lambda run: run.first([1]), "run.first waits for children, and 1 is none"),
        (lambda run: run.first([]), "run.first waits for one of 1 to 1000 children, not of 0"),
        (lambda run: run.parallel([1]), "run.parallel calls functions, and 1 is none"),
        (lambda run: run.stop(), "'RunContext' object has no attribute 'stop'"),
        (lambda run: run.step(undo), "on_cancel"),
    ],
)
def test_a_bad_call_fails_the_run_with_what_to_do(
    asks: Callable[[RunContext], Any], message: str
) -> None:
    journal = finish(Journal(plan("p", on_cancel=undo)(asks)))
    assert message in outcome(journal)["message"]


TWINS = {"double": step(name="double")(lambda ctx, number: number)}


def replayed(first: Any, second: Any, *, dies_before: int = 4) -> Journal:
    """A run that begins with one function and goes on with another."""
    journal = Journal(first)
    work(journal, dies_before=dies_before)
    journal.plan = second
    work(journal)
    return journal


def stands(journal: Journal) -> tuple[Any, ...]:
    return (journal.state, journal.reasons[-1]) if journal.reasons else (journal.state,)


def one_of(number: int, **options: Any) -> Callable[[Any], FunctionPlan]:
    def decorate(ask: Callable[[RunContext], Any]) -> FunctionPlan:
        return plan("p", version=number, **options)(ask)

    return decorate


def a_then(*after: Callable[[RunContext], Any], **options: Any) -> FunctionPlan:
    def function(run: RunContext) -> Any:
        return [run.step(double, 1), *(each(run) for each in after)]

    return plan("p", **options)(function)


SAME = a_then(lambda run: run.step(note, "x"))

CHANGED: dict[str, tuple[FunctionPlan, Any]] = {
    # what the plan is after `double` has finished and `note` has begun, and how the run goes on
    "the same": (SAME, RunState.COMPLETED),
    "other arguments": (a_then(lambda run: run.step(note, "y")), "changed_call"),
    "other arguments, pinned before": (
        a_then(lambda run: run.step(note, "y", id="other")),
        "unknown_step",
    ),
    "another step": (a_then(lambda run: run.step(shaky)), "unknown_step"),
    "the end": (a_then(), "unknown_step"),
    "a step before": (
        a_then(lambda run: run.step(shaky), lambda run: run.step(note, "x")),
        "unknown_step",
    ),
    "a step behind": (
        a_then(lambda run: run.step(note, "x"), lambda run: run.step(double, 5)),
        RunState.COMPLETED,
    ),
    "removed": (a_then(removed=["note"]), RunState.COMPLETED),
    "an error on the way": (plan("p")(lambda run: 1 / 0), "unknown_step"),
    "renamed": (
        a_then(
            lambda run: run.step(step(name="remark")(note.function), "x"),
            renamed={"note": "remark"},
        ),
        RunState.COMPLETED,
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_under_a_changed_plan(change: str) -> None:
    changed, expected = CHANGED[change]
    bodies: list[str] = []

    def body(request: RunBody) -> Any:
        bodies.append(request.key)
        return call(request)

    journal = Journal(SAME)
    work(journal, body, dies_before=4)
    assert journal.calls[-1] == "StepStarted note"
    journal.plan = changed
    before = len(journal.events)
    work(journal, body)
    if not isinstance(expected, RunState):
        assert stands(journal) == (RunState.QUEUED, expected)
        assert [event.type for event in journal.events[before:]] == ["DebugTrace"]
        journal.plan = SAME
        work(journal, body)
        assert journal.state is RunState.COMPLETED
    else:
        assert journal.state is expected
    assert bodies.count("r:double") == 1
    if change == "renamed":
        assert bodies[-1] == "r:note"
        assert journal.calls[-3] == "StepStarted remark"


def test_the_key_of_a_renamed_step_is_that_of_its_first_attempt_in_each_one() -> None:
    journal, keys = Journal(SAME), []
    work(journal, dies_before=4)
    journal.plan = CHANGED["renamed"][0]

    def dies(request: RunBody) -> Any:
        keys.append(request.key)
        raise WorkerDied

    for _ in range(3):
        work(journal, dies)
    # Of many snoozes in a row only the last start is read.
    del journal.events[next(n for n, e in enumerate(journal.events) if e.step == "note")]
    work(journal, dies)
    assert keys == ["r:note"] * 4


def test_a_pinned_call_is_found_whatever_stands_before_it_and_compares_nothing() -> None:
    first = plan("p")(lambda run: [run.step(note, 1, id="a"), run.step(note, 2, id="b")])
    second = plan("p")(lambda run: [run.step(note, 9, id="a"), run.step(note, 8, id="b")])
    journal = replayed(first, second)
    assert outcome(journal) == [[[1], {}], [[8], {}]]
    assert journal.calls[0] == "StepStarted note#a"


def test_a_worker_with_a_lower_version_leaves_the_run_alone() -> None:
    def function(run: RunContext) -> Any:
        return [run.version, run.step(double, 1), run.step(double, 2)]

    journal = Journal(plan("p", version=1)(function), version="v1")
    work(journal, dies_before=3)
    journal.plan = plan("p", version=3)(function)
    work(journal, dies_before=4)
    assert journal.events[-1].data["version"] == 3
    journal.plan = plan("p", version=2)(function)
    work(journal)
    assert stands(journal) == (RunState.QUEUED, "unknown_step")
    journal.plan = plan("p", version=3)(function)
    assert outcome(finish(journal)) == [1, 2, 4]


def test_a_run_of_a_list_goes_on_as_a_function_with_the_same_steps() -> None:
    journal = Journal(plan("p")(lambda run: [run.version, run.step(note)]))
    journal.append("StepStarted", step="note", attempt=1)
    journal.append("StepFinished", step="note", attempt=1, data={"result": "of the list"})
    assert outcome(finish(journal)) == [0, "of the list"]


def test_a_worker_that_stops_says_what_would_have_followed() -> None:
    journal = Journal(SAME)
    work(journal, max_steps=1)
    assert journal.events[-1].data == {"result": 2, "following": "note"}
    assert stands(journal) == (RunState.QUEUED, "shutdown")

    journal.plan = a_then()  # does not know the step
    work(journal)
    assert stands(journal) == (RunState.QUEUED, "unknown_step")
    journal.plan = SAME
    assert finish(journal).state is RunState.COMPLETED


def test_a_function_that_ends_its_process_fails_its_run_after_a_few_claims() -> None:
    @plan("p")
    def kills(run: RunContext) -> None:
        raise SystemExit

    journal = Journal(kills)
    for _ in range(MAX_TAKEOVERS):
        with pytest.raises(SystemExit):
            Worker(journal, leaving=lambda: True).work()
        journal.state = RunState.RUNNING
    work(journal)
    assert outcome(journal)["type"] == "PlanCrashed"


def test_a_step_that_ends_its_process_is_told_to_the_function() -> None:
    @plan("p")
    def survives(run: RunContext) -> Any:
        try:
            return run.step(double, 1)
        except StepFailed as failed:
            return failed.type

    journal = Journal(survives)

    def dies(_request: RunBody) -> Any:
        raise WorkerDied

    for _ in range(5):
        work(journal, dies)
    assert journal.types.count("StepStarted") == 5
    assert outcome(finish(journal)) == "StepCrashed"


def test_a_cancelled_run_does_not_call_the_function_and_is_undone() -> None:
    called = []

    @plan("p", on_cancel=undo)
    def cancelled(run: RunContext) -> None:
        called.append(1)
        run.step(double, 1)

    journal = Journal(cancelled)
    work(journal, dies_before=2)
    journal.cancel()
    finish(journal)
    assert called == [1]
    assert journal.state is RunState.CANCELLED
    assert journal.calls[-3:] == ["StepStarted undo", "StepFinished undo", "RunFinished"]


@pytest.mark.parametrize("value", [1, Snooze(3), Raised(Fatal("no")), Stopped(), Cancelled()])
def test_a_cancel_that_was_accepted_before_a_boundary_ends_the_run(value: Any) -> None:
    journal = Journal(SAME)

    def body(_request: RunBody) -> Any:
        journal.cancel()
        return value

    work(journal, body)
    assert journal.state is RunState.CANCELLED
    assert "StepStarted note" not in journal.calls


def test_a_snooze_calls_the_same_step_again_and_the_function_from_its_stored_results() -> None:
    journal, naps = Journal(SAME), iter([Snooze(5), Snooze(5)])

    def body(request: RunBody) -> Any:
        return next(naps, 7) if request.occurrence == "note" else call(request)

    work(journal, body)
    assert stands(journal) == (RunState.QUEUED, "snooze")
    assert outcome(finish(journal, body)) == [2, 7]


def test_a_run_that_is_late_ends_without_a_call_of_its_function() -> None:
    journal = Journal(plan("p")(lambda run: 1 / 0))
    Worker(journal).work(late=True)
    assert outcome(journal)["type"] == "DeadlineExceeded"


def test_a_lost_transaction_calls_the_function_again_on_what_the_journal_has() -> None:
    seen: list[Any] = []

    @plan("p")
    def watches(run: RunContext) -> Any:
        seen.append("called")
        first = run.step(double, 1)
        seen.append(first)
        return run.step(double, first)

    losses = iter([TransactionLost("gone")])

    def commit(request: Commit) -> Any:
        finishing = any(event.type == "StepFinished" for event in request.settlement.normal.events)
        return next(losses, None) if finishing else None

    journal = Journal(watches)
    work(journal, commit=commit)
    assert outcome(journal) == 4
    assert seen == ["called", 2, "called", 2]


@pytest.mark.parametrize("failure", [CommitFailed(ValueError("no"), False), Raised(KeyError(1))])
def test_a_commit_that_failed_fails_the_step_though_the_function_had_seen_its_result(
    failure: CommitFailed | Raised,
) -> None:
    @plan("p")
    def goes_on(run: RunContext) -> Any:
        try:
            return run.step(double, run.step(double, 1))
        except StepFailed as failed:
            return [failed.step, failed.type]

    failures = iter([failure])

    def commit(request: Commit) -> Any:
        finishing = any(event.type == "StepFinished" for event in request.settlement.normal.events)
        return next(failures, None) if finishing else None

    journal = Journal(goes_on)
    work(journal, commit=commit)
    assert stands(journal) == (RunState.QUEUED, "retry")
    assert outcome(finish(journal)) == ["double", type(failure.error).__name__]


def test_a_run_with_too_many_events_is_given_no_further_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(long_history, "MAX_EVENTS", 20)

    @plan("p")
    def endless(run: RunContext) -> None:
        while True:
            run.step(double, 1)

    journal = finish(Journal(endless))
    assert outcome(journal)["type"] == "HistoryTooLong"
    assert "return run.again(…) before" in outcome(journal)["message"]
    assert len(journal.events) <= 24


def test_a_function_is_left_by_an_exception_and_its_finally_can_start_nothing() -> None:
    left: list[str] = []

    @plan("p")
    def tidy(run: RunContext) -> None:
        try:
            run.step(double, 1)
        finally:
            left.append("left")
            run.step(note, "never")

    journal = Journal(tidy)
    work(journal, lambda request: Stopped())
    assert left == ["left"]
    assert journal.calls == ["StepStarted double", "DebugTrace double"]


@pytest.mark.parametrize("endless", [False, True])
def test_a_function_that_keeps_the_exception_that_leaves_it_is_named(
    endless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @plan("p")
    def keeps(run: RunContext) -> None:
        while True:
            try:
                run.step(double, 1)
            except BaseException:
                if not endless:
                    return

    journal = Journal(keeps)
    work(journal, lambda request: Stopped())
    assert journal.state is RunState.QUEUED
    (record,) = [each for each in caplog.records if each.action == "plan_left"]
    assert record.plan == "p"


# Random functions, a crash at every boundary

Program = list[Any]
"""Statements of a function: a call of a step, a value, a loop, a catch, a wait."""

statements = st.deferred(
    lambda: st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.integers(0, 3)),
            st.tuples(st.just("fails"), st.integers(0, 3)),
            st.tuples(st.just("value"), st.sampled_from(["now", "random", "uuid"])),
            st.tuples(st.just("repeat"), st.integers(1, 2), statements),
            st.tuples(st.just("branch"), statements, statements),
            st.tuples(st.just("wait"), st.sampled_from(["a", "b", "ab"]), st.booleans()),
            st.tuples(st.just("sleep"), st.integers(1, 9)),
        ),
        max_size=3,
    )
)


def run_program(run: RunContext, program: Program, trail: list[Any]) -> None:
    for kind, *parts in program:
        match kind, parts:
            case "step", [number]:
                trail.append(run.step(double, number + len(trail)))
            case "fails", [number]:
                try:
                    run.step(shaky, number)
                except StepFailed as failed:
                    trail.append(failed.step)
            case "value", [which]:
                trail.append(run.step(note, str(getattr(run, which)())))
            case "repeat", [times, inner]:
                for _ in range(times):
                    run_program(run, inner, trail)
            case "wait", [names, ends]:
                found = run.wait(*names, timeout=5 if ends else None)
                trail.append(None if found is None else found.to_dict())
            case "sleep", [seconds]:
                run.sleep(seconds)
            case "branch", [left, right]:
                run_program(run, left if len(trail) % 2 else right, trail)


def move(parking: list[Any], inbox: list[Any]) -> None:
    """Send the signals that come while a worker looks."""
    inbox += parking
    parking.clear()


@settings(max_examples=20, deadline=None)
@given(program=statements, again=st.integers(0, 2), data=st.data())
def test_a_run_that_dies_anywhere_ends_as_if_it_had_not(
    program: Program, again: int, data: Any
) -> None:
    @plan("p")
    def random_plan(run: RunContext) -> Any:
        trail: list[Any] = []
        run_program(run, program, trail)
        turns = run.input or 0
        return run.again(turns + 1) if turns < again else [turns, *trail]

    finished: list[str] = []

    def body(request: RunBody) -> Any:
        assert request.occurrence not in finished
        return call(request)

    journal = Journal(random_plan)
    sent = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), max_size=2)
    for claim in range(200):
        if journal.state.final:
            break
        faulty = claim < 40
        dies = data.draw(st.one_of(st.none(), st.integers(1, 12))) if faulty else None
        after = data.draw(st.booleans())
        journal.inbox += data.draw(sent) if faulty else [("a", None), ("b", None)]
        parking = data.draw(sent) if faulty else []
        journal.passed_s += data.draw(st.sampled_from([0, 3, 10])) if faulty else 10
        options = {"dies_after" if after else "dies_before": dies}
        work(journal, body, looks=partial(move, parking, journal.inbox), **options)
        finished[:] = [e.step for e in journal.events if e.type == "StepFinished"]
    assert journal.state is RunState.COMPLETED
    assert len(finished) == len(set(finished))
    ends = [e for e in journal.events if e.type == "WaitFinished"]
    assert len(ends) == len({event.step for event in ends})
    taken = [event.data["seq"] for event in ends if "seq" in event.data]
    assert len(taken) == len(set(taken))
    assert {journal.events[seq - 1].type for seq in taken} <= {"SignalReceived"}
    # By the journal alone the function gives the same result: nothing is asked for again.
    stored = outcome(journal)
    del journal.events[-1]
    journal.state = RunState.QUEUED
    before = len(journal.events)
    work(journal, body)
    assert outcome(journal) == stored
    assert len(journal.events) == before + 1
