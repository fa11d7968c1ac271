"""Several steps of one run at the same time, without Postgres: see `test_execution`."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import beatless.verify as verify
from beatless import Fatal, RunContext, Snooze, StepFailed, plan, retry, step
from beatless.orchestrator.errors import StepTimeout
from beatless.orchestrator.execution import Execution
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.progress import BESIDE_OTHERS
from beatless.orchestrator.requests import (
    AwaitBody,
    BodyEnded,
    Cancelled,
    Commit,
    Raised,
    RunBody,
    Stopped,
)
from beatless.orchestrator.state import RunState
from tests.unit.test_execution import Journal, Worker, WorkerDied
from tests.unit.test_function_execution import call, double, note, outcome, shaky


@step
def first(ctx: Any, number: int) -> int:
    return number + 1


@step(transactional=True)
def stores(ctx: Any, number: int) -> int:
    return number


@step
def undo(ctx: Any) -> None: ...


@plan("p")
async def gathers(run: RunContext) -> Any:
    async def branch(number: int) -> int:
        one = await run.step(first, number)
        return int(await run.step(double, one))

    return await asyncio.gather(run.step(double, 50), *(branch(number) for number in range(3)))


@plan("p")
async def groups(run: RunContext) -> Any:
    async def branch(number: int) -> int:
        return int(await run.step(double, await run.step(first, number)))

    async with asyncio.TaskGroup() as group:
        alone = group.create_task(run.step(double, 50))
        tasks = [group.create_task(branch(number)) for number in range(3)]
    return [alone.result(), *(task.result() for task in tasks)]


@plan("p")
def parallel(run: RunContext) -> Any:
    def branch(number: int) -> int:
        return int(run.step(double, run.step(first, number)))

    return run.parallel(
        [
            lambda: run.step(double, 50),
            *(lambda number=number: branch(number) for number in range(3)),
        ]
    )


PLANS = {"gather": gathers, "TaskGroup": groups, "parallel": parallel}


@pytest.fixture(params=PLANS)
def together(request: pytest.FixtureRequest) -> FunctionPlan:
    return PLANS[request.param]


def work(journal: Journal, body: Callable[[RunBody], Any] = call, **options: Any) -> Worker:
    worker = Worker(journal, body, **options)
    with suppress(WorkerDied):
        worker.work()
    return worker


def finish(journal: Journal, body: Callable[[RunBody], Any] = call, **options: Any) -> Journal:
    for _ in range(50):
        if journal.state.final:
            return journal
        work(journal, body, **options)
    raise AssertionError(journal.calls)


def test_all_branches_are_in_flight_at_once(together: FunctionPlan) -> None:
    journal = Journal(together)
    most: list[int] = []
    worker = Worker(journal, call, picks=lambda names: most.append(len(names)) or names[-1])
    worker.work()

    assert max(most) == 4
    assert outcome(journal) == [100, 2, 4, 6]


def test_keys_do_not_hang_on_the_order_in_which_steps_end(together: FunctionPlan) -> None:
    keys: set[frozenset[str]] = set()
    for seed in range(20):
        journal = Journal(together)
        finish(journal, picks=random.Random(seed).choice)
        assert outcome(journal) == [100, 2, 4, 6]
        keys.add(frozenset(e.step for e in journal.events if e.type == "StepStarted"))
    assert len(keys) == 1


def test_a_death_at_any_request_begins_no_body_again_after_its_commit(
    together: FunctionPlan,
) -> None:
    for seed in range(3):
        dies = 1
        while True:
            journal, picks = Journal(together), random.Random(seed).choice
            worker = work(journal, dies_before=dies, picks=picks)
            if journal.state.final:
                assert len(worker.requests) < dies
                break
            finish(journal, picks=picks)
            assert outcome(journal) == [100, 2, 4, 6]
            check(journal)
            dies += 1
        assert dies > 20


def test_a_worker_that_dies_all_the_time_ends_the_run_all_the_same(
    together: FunctionPlan,
) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        journal = Journal(together)
        while not journal.state.final:
            work(journal, dies_after=chance.randint(3, 12), picks=chance.choice)
        assert outcome(journal) == [100, 2, 4, 6]
        check(journal)


@plan("p")
def tells_ends(run: RunContext) -> list[int]:
    ended: list[int] = []

    def branch(number: int) -> None:
        ended.append(run.step(first, number))

    run.parallel([lambda number=number: branch(number) for number in range(3)])
    return ended


@plan("p")
async def tells_ends_async(run: RunContext) -> list[int]:
    ended: list[int] = []

    async def branch(number: int) -> None:
        ended.append(await run.step(first, number))

    await asyncio.gather(*(branch(number) for number in range(3)))
    return ended


@pytest.mark.parametrize("made", [tells_ends, tells_ends_async])
def test_a_function_that_is_called_again_is_told_of_ends_in_the_order_of_the_journal(
    made: FunctionPlan,
) -> None:
    """Whoever is last in the list ends first: before a death, and after it."""
    dies = 1
    while True:
        journal = Journal(made)
        worker = work(journal, dies_before=dies, picks=max)
        finish(journal, picks=max)
        assert outcome(journal) == [3, 2, 1]
        if len(worker.requests) < dies:
            break
        dies += 1
    assert dies > 10


@plan("p")
def fails_twice(run: RunContext) -> Any:
    return run.parallel([lambda: run.step(fails), lambda: run.step(fails)])


def test_a_branch_that_failed_first_is_the_failure_of_the_run_after_a_death_too() -> None:
    for dies in range(2, 12):
        journal = Journal(fails_twice)
        work(journal, dies_before=dies, picks=max)
        finish(journal, picks=max)
        assert outcome(journal)["step"] == "fails#2:1"


def check(journal: Journal) -> None:
    """Each occurrence has one result, and is not begun after it."""
    finished: set[str | None] = set()
    for event in journal.events:
        if event.type in ("StepStarted", "StepFinished"):
            assert event.step not in finished
        if event.type == "StepFinished":
            finished.add(event.step)
    assert [event.seq for event in journal.events] == list(range(1, len(journal.events) + 1))


def test_an_end_is_committed_with_what_its_branch_begins_then() -> None:
    journal = Journal(gathers)
    work(journal)
    assert [[f"{e.type} {e.step or ''}" for e in each.events] for each in journal.boundaries][
        :3
    ] == [
        [
            "StepStarted double",
            "StepStarted first#2:1",
            "StepStarted first#3:1",
            "StepStarted first#4:1",
        ],
        ["StepFinished double"],
        ["StepFinished first#2:1", "StepStarted double#2:1"],
    ]


def test_an_older_process_takes_such_a_run_for_one_of_a_higher_version() -> None:
    journal = Journal(gathers)
    work(journal, dies_after=4)
    [started] = [e for e in journal.events if e.step == "double"]
    assert started.data["version"] == BESIDE_OTHERS + 1
    assert f"'{BESIDE_OTHERS}'" in Path(verify.__file__).with_name("verify.sql").read_text()


@plan("p")
async def fails_beside(run: RunContext) -> Any:
    return await asyncio.gather(run.step(double, 1), run.step(fails), run.step(note))


@step
def fails(ctx: Any) -> None:
    raise Fatal("no")


@plan("p")
def fails_in_parallel(run: RunContext) -> Any:
    return run.parallel(
        [lambda: run.step(double, 1), lambda: run.step(fails), lambda: run.step(note)]
    )


def fails_first(names: list[str]) -> str:
    return next((name for name in names if name.startswith("fails")), names[0])


@pytest.mark.parametrize("failing", [fails_beside, fails_in_parallel])
def test_a_run_that_fails_ends_when_its_other_steps_have_ended(failing: FunctionPlan) -> None:
    journal = Journal(failing)
    worker = Worker(journal, call, picks=fails_first)
    worker.work()

    assert outcome(journal)["type"] == "Fatal"
    assert [name.partition("#")[0] for name in worker.told_to_end] == ["double", "note"]
    ends = [kind.partition("#")[0] for kind in journal.calls if "StepStarted" not in kind]
    assert ends == ["StepFailed fails", "StepFinished double", "StepFinished note", "RunFinished"]


@pytest.mark.parametrize("failing", [fails_beside, fails_in_parallel])
def test_a_death_while_the_others_end_leaves_the_same_outcome(failing: FunctionPlan) -> None:
    for dies in range(2, 14):
        journal = Journal(failing)
        work(journal, dies_before=dies, picks=fails_first)
        finish(journal, picks=fails_first)
        assert outcome(journal)["type"] == "Fatal"
        check(journal)


def test_a_task_that_was_cancelled_is_told_nothing_and_its_step_is_closed() -> None:
    seen: list[str] = []

    @plan("p")
    async def group(run: RunContext) -> Any:
        async def other() -> None:
            try:
                await run.step(note, "slow")
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(other())
                tasks.create_task(run.step(fails))
        except ExceptionGroup:
            return await run.step(double, 4)

    def body(request: RunBody) -> Any:
        if request.occurrence.startswith("note"):
            return Raised(asyncio.CancelledError())
        return call(request)

    journal = Journal(group)
    worker = Worker(journal, body, picks=min)
    worker.work()

    assert outcome(journal) == 8
    assert seen == ["cancelled"]
    assert worker.told_to_end == ["note#1:1"]
    [failed] = [e for e in journal.events if e.type == "StepFailed" and e.step == "note#1:1"]
    assert failed.data["error"]["type"] == "StepAbandoned"
    assert failed.data["final"]


def test_a_back_off_stays_in_the_worker_while_another_step_is_in_flight() -> None:
    @step(retry=retry(max_attempts=3, initial=1e-6, jitter=0))
    def flaky(ctx: Any) -> str: ...

    @plan("p")
    async def two(run: RunContext) -> Any:
        return await asyncio.gather(run.step(flaky), run.step(note, 1))

    tries = Counter[str]()

    def body(request: RunBody) -> Any:
        tries[request.occurrence] += 1
        if request.occurrence == "flaky" and tries["flaky"] < 3:
            return Raised(ValueError("no"))
        return request.attempt

    journal = Journal(two)
    Worker(journal, body, picks=min).work()

    assert outcome(journal) == [3, 1]
    assert journal.claims == 1


def test_a_run_with_nothing_in_flight_leaves_until_the_earliest_back_off() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        return await asyncio.gather(run.step(shaky), run.step(note), return_exceptions=True)

    def body(request: RunBody) -> Any:
        if request.occurrence == "note" and request.attempt == 1 and not journal.passed_s:
            return Snooze(5)
        return call(request)

    journal = Journal(two)
    work(journal, body)
    assert (journal.state, journal.claims) == (RunState.QUEUED, 1)
    assert 4 < journal.boundaries[-1].delay_s <= 5
    journal.passed_s += 5.1
    work(journal, body)
    assert "StepFinished note" in journal.calls
    assert 4 < journal.boundaries[-1].delay_s < 5, "the other one is not tried before its time"
    journal.passed_s += 5
    work(journal, body)
    failed, noted = outcome(journal)["message"], None
    del noted
    assert failed


def test_a_wait_in_a_branch_parks_the_run_when_nothing_else_is_in_flight() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        async def waits() -> Any:
            signal = await run.wait("paid")
            return await run.step(double, signal.data)

        async def sleeps() -> Any:
            await run.sleep(60)
            return await run.step(double, 100)

        return await asyncio.gather(run.step(double, 1), waits(), sleeps())

    journal = Journal(two)
    work(journal)
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "wait")
    journal.inbox.append(("paid", 21))
    work(journal)
    assert "StepFinished double#2:1" in journal.calls
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "wait")
    journal.passed_s += 61
    work(journal)
    assert outcome(journal) == [2, 42, 200]
    check(journal)


def test_a_signal_is_heard_while_another_branch_is_in_its_step() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        async def waits() -> Any:
            signal = await run.wait("paid")
            return await run.step(first, signal.data)

        return await asyncio.gather(run.step(double, 1), waits())

    journal = Journal(two)

    class Hears(Worker):
        looks_left = 3

        def answer(self, request: Any) -> Any:
            if isinstance(request, AwaitBody) and self.looks_left:
                self.looks_left -= 1
                if self.looks_left == 1:
                    journal.inbox.append(("paid", 7))
                return None
            return super().answer(request)

    Hears(journal, call, picks=max).work()
    assert outcome(journal) == [2, 8]
    calls = journal.calls
    assert calls.index("StepFinished first#2:1") < calls.index("StepFinished double")


def test_a_cancel_lets_what_is_in_flight_end_and_begins_nothing(together: FunctionPlan) -> None:
    journal = Journal(together)

    def body(request: RunBody) -> Any:
        if not journal.cancelled:
            journal.cancel()
        return call(request)

    work(journal, body)
    assert journal.state is RunState.CANCELLED
    begun = [kind for kind in journal.calls if kind.startswith("StepStarted")]
    ended = [kind for kind in journal.calls if kind.startswith("StepFinished")]
    assert (len(begun), len(ended)) == (4, 4)


def test_a_body_that_notices_the_cancel_ends_the_run_once_the_others_have_ended() -> None:
    journal = Journal(gathers)

    def body(request: RunBody) -> Any:
        if request.occurrence == "double":
            journal.cancel()
            return Cancelled()
        return call(request)

    work(journal, body)
    assert journal.state is RunState.CANCELLED
    assert journal.calls[-1] == "RunFinished"
    assert journal.calls.count("StepFailed double") == 1


def test_a_cancelled_run_with_an_on_cancel_step_goes_on_with_it() -> None:
    async def function(run: RunContext) -> Any:
        return await asyncio.gather(run.step(double, 1), run.step(note))

    journal = Journal(plan("p", on_cancel=undo)(function))

    def body(request: RunBody) -> Any:
        if request.occurrence == "double":
            journal.cancel()
        return call(request)

    finish(journal, body)
    assert journal.state is RunState.CANCELLED
    assert journal.calls[-2:] == ["StepFinished undo", "RunFinished"]


def test_a_worker_that_stops_gives_back_each_attempt_uncounted(together: FunctionPlan) -> None:
    stopping: list[bool] = []

    def body(request: RunBody) -> Any:
        stopping.append(True)
        return Stopped()

    journal = Journal(together)
    work(journal, body, stopping=lambda: bool(stopping))
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "shutdown")
    assert journal.types.count("DebugTrace") == 4
    finish(journal)
    assert outcome(journal) == [100, 2, 4, 6]
    assert max(e.attempt or 0 for e in journal.events) == 1


@pytest.mark.parametrize("cancels", [False, True])
def test_a_process_that_is_to_end_has_the_run_until_its_bodies_have_ended(
    together: FunctionPlan, *, cancels: bool
) -> None:
    """Those that are tasks are cancelled, which is no failure of theirs; others return."""
    journal, states = Journal(together), []

    class Ends(Worker):
        told = False

        def answer(self, request: Any) -> Any:
            if isinstance(request, AwaitBody) and not self.told:
                self.told = True
                return BodyEnded(occurrence="", outcome=Stopped(SystemExit()))
            if self.in_flight:
                states.append(journal.state)
            return super().answer(request)

    def body(request: RunBody) -> Any:
        return Raised(asyncio.CancelledError()) if cancels else call(request)

    worker = Ends(journal, body)
    with pytest.raises(SystemExit):
        worker.work()
    assert worker.in_flight == {}
    assert set(states) == {RunState.RUNNING}
    assert len(worker.told_to_end) == 4
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "shutdown")
    assert journal.types.count("StepFinished") == (0 if cancels else 4)
    finish(journal)
    assert outcome(journal) == [100, 2, 4, 6]
    assert max(e.attempt or 0 for e in journal.events) == 1
    assert "StepFailed" not in journal.types


def test_a_process_that_is_told_twice_to_end_leaves_the_run_to_its_lease(
    together: FunctionPlan,
) -> None:
    journal = Journal(together)

    class Ends(Worker):
        def answer(self, request: Any) -> Any:
            if isinstance(request, AwaitBody):
                return BodyEnded(occurrence="", outcome=Stopped(SystemExit()))
            return super().answer(request)

    worker = Ends(journal, call)
    with pytest.raises(SystemExit):
        worker.work()
    assert len(worker.in_flight) == 4
    assert journal.state is RunState.RUNNING


def test_a_transactional_step_is_executed_while_no_other_is_in_flight() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        return await asyncio.gather(run.step(stores, 1), run.step(double, 1), run.step(stores, 2))

    journal = Journal(two)
    worker = work(journal)
    assert outcome(journal) == [1, 2, 2]
    assert journal.claims == 1
    alone = [each for each in worker.requests if isinstance(each, RunBody)]
    assert [each.occurrence for each in alone] == ["stores", "stores#2"]
    check(journal)


def test_deaths_of_several_at_once_are_no_crash_of_any_and_then_each_is_alone() -> None:
    journal = Journal(gathers)
    for _ in range(3):
        work(journal, dies_after=8)
    assert journal.state is RunState.RUNNING
    worker = work(journal)
    assert outcome(journal) == [100, 2, 4, 6]
    assert any(isinstance(each, RunBody) for each in worker.requests)
    assert "StepFailed" not in journal.types


def test_a_step_that_ends_its_process_fails_and_those_beside_it_do_not() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        return await asyncio.gather(
            run.step(double, 1), run.step(note, "kills"), return_exceptions=True
        )

    def body(request: RunBody) -> Any:
        if request.occurrence == "note":
            raise WorkerDied
        return call(request)

    journal = Journal(two)
    for _ in range(20):
        if not journal.state.final:
            work(journal, body, picks=lambda names: "note" if "note" in names else names[0])
    error = outcome(journal)
    failed = [e for e in journal.events if e.type == "StepFailed"]
    assert [(e.step, e.data["error"]["type"]) for e in failed] == [("note", "StepCrashed")]
    assert "StepFinished double" in journal.calls
    assert error


def test_a_result_that_cannot_be_stored_fails_its_step_and_no_other() -> None:
    journal = Journal(gathers)

    def body(request: RunBody) -> Any:
        return object() if request.occurrence == "double" else call(request)

    finish(journal, body)
    assert outcome(journal)["type"] == "BadPayload"
    check(journal)


def test_branches_that_are_left_raise_again_at_each_call() -> None:
    after: list[str] = []

    @plan("p")
    def two(run: RunContext) -> Any:
        def slow() -> Any:
            try:
                return run.step(note)
            finally:
                after.append("left")
                run.step(double, 1)
                after.append("never")

        try:
            run.parallel([slow, lambda: run.step(fails)])
        except StepFailed:
            return run.step(double, 3)

    journal = Journal(two)
    Worker(journal, call, picks=min).work()
    assert outcome(journal) == 6
    assert after == ["left"]


def test_branches_in_branches_have_names_of_their_own() -> None:
    @plan("p")
    def nested(run: RunContext) -> Any:
        def inner(number: int) -> Any:
            return run.parallel([lambda: run.step(double, number), lambda: run.step(first, number)])

        return [*run.parallel([lambda: inner(1), lambda: inner(2)]), run.step(double, 9)]

    for seed in range(5):
        journal = Journal(nested)
        finish(journal, picks=random.Random(seed).choice)
        assert outcome(journal) == [[2, 2], [4, 3], 18]
        assert {e.step for e in journal.events if e.step} == {
            *("double#1:1:1", "first#1:2:1", "double#2:1:1", "first#2:2:1", "double"),
        }


def test_a_list_of_no_branches_has_no_results() -> None:
    @plan("p")
    def none(run: RunContext) -> Any:
        return [run.parallel([]), run.parallel([lambda: 1])]

    assert outcome(finish(Journal(none))) == [[], [1]]


def test_run_parallel_in_an_async_plan_says_what_there_is_instead() -> None:
    @plan("p")
    async def wrong(run: RunContext) -> Any:
        return run.parallel([])

    assert "asyncio.gather" in outcome(finish(Journal(wrong)))["message"]


def test_a_retry_takes_over_the_results_of_branches_in_the_order_of_their_ends() -> None:
    from beatless.orchestrator.history import reusable_calls

    journal = Journal(fails_beside)
    Worker(journal, call, picks=max).work()
    reused = reusable_calls(fails_beside, journal.events, None)
    assert reused is not None
    assert [name for name, _ in reused["calls"]] == ["double", "note"]
    assert reused["ends"] == ["note", "double"]
    assert reused["errors"] == {}


def test_the_execution_of_a_list_asks_for_no_body_beside_others() -> None:
    assert not hasattr(Execution, "_take_several")


def test_a_run_is_given_back_after_so_many_steps_however_many_are_in_flight(
    together: FunctionPlan,
) -> None:
    journal = Journal(together)
    worker = work(journal, max_steps=1)
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "shutdown")
    assert journal.types.count("StepFinished") == 4, "those that were in flight"
    assert not worker.in_flight
    finish(journal, max_steps=1)
    assert outcome(journal) == [100, 2, 4, 6]
    check(journal)


def test_a_step_that_fails_after_the_last_one_of_its_worker_is_not_begun_again() -> None:
    journal = Journal(fails_beside)
    work(journal, max_steps=1, picks=min)
    finish(journal, picks=min)
    assert journal.calls.count("StepStarted fails") == 1


def test_others_go_on_while_a_step_that_was_executed_alone_is_in_its_back_off() -> None:
    @step(transactional=True, retry=retry(max_attempts=2, initial=600, jitter=0))
    def stores_later(ctx: Any) -> str: ...

    @plan("p")
    async def three(run: RunContext) -> Any:
        async def waits() -> Any:
            return await run.step(first, (await run.wait("paid")).data)

        return await asyncio.gather(run.step(stores_later), waits(), run.step(stores, 2))

    def body(request: RunBody) -> Any:
        if request.occurrence == "stores_later":
            return Raised(ValueError("no")) if request.attempt == 1 else "stored"
        return call(request)

    journal = Journal(three)
    work(journal, body)
    assert "StepFinished stores" in journal.calls
    assert (journal.state, journal.reasons[-1]) == (RunState.QUEUED, "wait")
    journal.inbox.append(("paid", 7))
    work(journal, body)
    assert "StepFinished first#2:1" in journal.calls
    assert journal.calls.count("StepStarted stores_later") == 1
    journal.passed_s += 601
    work(journal, body)
    assert outcome(journal) == ["stored", 8, 2]
    check(journal)


def test_a_failure_of_a_step_that_was_executed_alone_is_told_at_once() -> None:
    @plan("p")
    async def two(run: RunContext) -> Any:
        return await asyncio.gather(
            run.step(stores, 1), run.step(double, 2), return_exceptions=True
        )

    def body(request: RunBody) -> Any:
        return Raised(Fatal("no")) if request.occurrence == "stores" else call(request)

    journal = Journal(two)
    work(journal, body)
    assert journal.claims == 1
    assert journal.state.final
    check(journal)


def test_an_attempt_that_is_ended_by_force_beside_others_keeps_its_back_off() -> None:
    journal = Journal(plan("p")(two_flaky))
    worker = work(journal, dies_before=3)
    (begun,) = [each for each in worker.in_flight.values() if each.occurrence == "flaky_slow"]
    commit = begun.interrupted(StepTimeout("flaky_slow", 1.0))
    *notes, failed = commit.settlement.normal.events
    assert [json.loads(each.data or "")["name"] for each in notes] == ["beatless.given_back"]
    assert json.loads(failed.data or "")["retry_in"] == 60
    assert commit.settlement.normal.delay_s == 0


@step(retry=retry(max_attempts=3, initial=60, jitter=0))
def flaky_slow(ctx: Any) -> None: ...


async def two_flaky(run: RunContext) -> Any:
    return await asyncio.gather(run.step(flaky_slow), run.step(note))


@step(retry=retry(max_attempts=3, initial=1, jitter=0))
def timed(ctx: Any, number: int) -> int:
    return number


@plan("p")
async def all_timed(run: RunContext) -> Any:
    async def branch(number: int) -> int:
        return int(await run.step(timed, await run.step(timed, number)))

    return await asyncio.gather(*(branch(number) for number in range(3)))


def ended_by_force(after: int) -> Journal:
    """A run that leaves its worker as one of its attempts is ended, after so many bodies."""
    journal, worker = Journal(all_timed), None

    def pick(names: list[str]) -> str:
        if sum(event.type == "StepFinished" for event in journal.events) < after:
            return names[0]
        late = worker.in_flight[names[-1]]
        journal.write(late.interrupted(StepTimeout(late.occurrence, 1.0)).settlement)
        raise WorkerDied  # another worker has the run from now on

    worker = Worker(journal, call, picks=pick)
    with suppress(WorkerDied):
        worker.work()
    journal.passed_s += 2
    return journal


@pytest.mark.parametrize("after", range(5))
def test_an_attempt_that_is_ended_by_force_counts_and_those_beside_it_do_not(after: int) -> None:
    journal = ended_by_force(after)
    finish(journal)

    assert outcome(journal) == [0, 1, 2]
    check(journal)
    failed = [event.step for event in journal.events if event.type == "StepFailed"]
    starts = [event for event in journal.events if event.type == "StepStarted"]
    assert len(failed) == 1
    assert {event.step for event in starts if event.attempt != 1} == set(failed)


def test_an_attempt_that_begins_as_one_beside_it_is_ended_by_force_does_not_count() -> None:
    """Its start is committed, but the worker does not know it yet."""
    journal = Journal(all_timed)
    worker: Worker

    def commits(request: Commit) -> None:
        types = [event.type.value for event in request.settlement.normal.events]
        if types == ["StepFinished", "StepStarted"] and len(worker.in_flight) == 1:
            (late,) = worker.in_flight.values()
            journal.write(request.settlement)
            journal.write(late.interrupted(StepTimeout(late.occurrence, 1.0)).settlement)
            raise WorkerDied

    worker = Worker(journal, call, commit=commits, picks=short_first)
    with suppress(WorkerDied):
        worker.work()
    journal.passed_s += 2
    finish(journal)

    assert outcome(journal) == [0, 1, 2]
    again = {e.step for e in journal.events if e.type == "StepStarted" and e.attempt != 1}
    assert again == {"timed#3:1"}


def short_first(names: list[str]) -> str:
    """The third branch is the last one."""
    return min(names, key=lambda name: (name.startswith("timed#3"), name))


def test_a_step_that_the_plan_has_removed_is_left_out_before_others_begin() -> None:
    @plan("p")
    async def before(run: RunContext) -> Any:
        return await run.step(first, 1)

    @plan("p", removed=["first"])
    async def after(run: RunContext) -> Any:
        return await asyncio.gather(run.step(double, 1), run.step(note))

    journal = Journal(before)
    work(journal, dies_after=1)
    assert journal.calls == ["StepStarted first"]
    journal.plan = after
    finish(journal)
    assert journal.state is RunState.COMPLETED
    [left] = [e for e in journal.events if e.type == "DebugTrace" and e.step == "first"]
    assert left.data == {"name": "beatless.left_out"}


def test_a_step_in_its_back_off_after_it_was_executed_alone_is_closed_when_its_branch_ends() -> (
    None
):
    @step(transactional=True, retry=retry(max_attempts=2, initial=600, jitter=0))
    def stores_later(ctx: Any) -> str: ...

    @plan("p")
    async def two(run: RunContext) -> Any:
        async def raises() -> None:
            await run.step(stores, 1)
            raise LookupError

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(run.step(stores_later))
                group.create_task(raises())
        except ExceptionGroup:
            return "over"

    def body(request: RunBody) -> Any:
        failed = request.occurrence == "stores_later"
        return Raised(ValueError("no")) if failed else call(request)

    journal = Journal(two)
    work(journal, body)
    assert outcome(journal) == "over"
    ends = [e for e in journal.events if e.type == "StepFailed" and e.step == "stores_later"]
    assert [e.data.get("final", False) for e in ends] == [False, True]
