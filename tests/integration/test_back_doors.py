"""Bodies that leave by the back door: each is an attempt that has failed, with its reason."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from pydantic import BaseModel, field_validator

from beatless import (
    LeaseLost,
    Plan,
    RunCancelled,
    RunContext,
    RunState,
    WorkerStops,
    child,
    map_,
    plan,
    retry,
    step,
)
from beatless.cli.demo import without_handbacks
from beatless.doctor import Doctor, Status
from beatless.orchestrator.child_elements import ElementContext
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.outcomes import Finish
from beatless.orchestrator.progress import GIVEN_BACK
from beatless.testing import Kit
from tests.plans import exits, keeps_its_place, two_steps
from tests.valkeys import until

APP = "tests.plans:app"


@pytest.mark.parametrize("pool", ["threads", pytest.param("prefork", marks=pytest.mark.long)])
def test_a_worker_keeps_its_places_whatever_its_bodies_raise(beatless: Kit, pool: str) -> None:
    """Two places, and more runs that leave so than there are places."""
    beatless.relay.start()
    worker = beatless.worker_process(APP, concurrency=2, arguments=("--", "--pool", pool))
    exits = [beatless.start_run("exits") for _ in range(5)]
    for run in exits:
        assert beatless.wait_for_run_completion(run.run_id).error["type"] == "SystemExit"
    fine = beatless.start_run("two_steps")

    assert beatless.wait_for_run_completion(fine.run_id).result == "one two"

    assert worker.alive
    for run in exits:
        events = without_handbacks(beatless.client.events(run.run_id))
        types = [event.type for event in events]
        assert types == ["RunStarted", "StepStarted", "StepFailed", "RunFinished"]
    beatless.verify()


@pytest.mark.long
def test_doctor_sees_a_worker_whose_places_are_kept_by_bodies_that_go_on(
    beatless: Kit, tmp_path: Path
) -> None:
    """In the threads pool nothing can end them: their runs have failed, and no other one begins."""
    beatless.relay_process(APP)
    beatless.worker_process(APP, arguments=("--", "--pool", "threads"))
    stuck = beatless.start_run("keeps_its_place", {"go": str(tmp_path / "go")})
    assert beatless.wait_for_run_completion(stuck.run_id).error["type"] == "StepTimeout"
    beatless.advance(3)

    told = [*Doctor(beatless.app).examine(["places"])]
    # A worker that is late with its answer is not looked at.
    until(
        lambda: (
            told[-1].status is Status.PROBLEM
            or told.extend(Doctor(beatless.app).examine(["places"]))
        )
    )
    assert "has lost 1 of 1 places" in told[-1].text
    (tmp_path / "go").touch()


class PanicException(BaseException):
    """As a Rust extension raises it (pyo3_runtime.PanicException)."""


def leave_asyncio() -> None:
    async def main() -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        task.cancel()
        await task

    asyncio.run(main())


def raising(error: BaseException) -> Callable[[], None]:
    def leave() -> None:
        raise error

    return leave


DOORS: dict[str, tuple[Callable[[], None], str]] = {
    "exit": (raising(SystemExit("the configuration is missing")), "the configuration is missing"),
    "exit 0": (raising(SystemExit(0)), "0"),
    "exit without a code": (raising(SystemExit()), ""),
    "interrupt": (raising(KeyboardInterrupt()), ""),
    "generator exit": (raising(GeneratorExit("closed")), "closed"),
    "asyncio": (leave_asyncio, ""),
    "cancelled": (raising(asyncio.CancelledError("by nobody")), "by nobody"),
    "panic": (raising(PanicException("called unwrap on None")), "called unwrap on None"),
    "stop iteration": (raising(StopIteration("no more")), "no more"),
    "another's lease": (raising(LeaseLost("another", 7)), "the lease 7 on run another is gone"),
    "no stop": (
        raising(WorkerStops("another")),
        "worker is shutting down; run another was released",
    ),
    "no cancel": (raising(RunCancelled("another")), "run another was asked to stop"),
}
calls: list[str] = []


def leave(ctx: StepContext) -> Any:
    calls.append(ctx.step)
    if ctx.attempt <= ctx.input.get("failures", 1_000):
        DOORS[ctx.input["door"]][0]()
    return "stayed"


class Sly(dict[str, Any]):
    """Ends the process, if it can, when it is written as JSON for the n-th time."""

    def __init__(self, nth: int) -> None:
        super().__init__(a=1)
        self.nth = nth

    def items(self) -> Any:
        self.nth -= 1
        if self.nth == 0:
            raise SystemExit("in the encoder")
        return super().items()


@step
def sly(ctx: StepContext) -> Any:
    calls.append(ctx.step)
    return Sly(ctx.input["nth"])


@step
def sly_finish(ctx: StepContext) -> Any:
    calls.append(ctx.step)
    return Finish(Sly(ctx.input["nth"]))


def inputs(ctx: ElementContext) -> Any:
    DOORS[ctx.input["door"]][0]()


class Checked(BaseModel):
    """Its check leaves once it is called in a worker."""

    door: str

    @field_validator("door")
    @classmethod
    def leaves(cls, door: str) -> str:
        if in_worker:
            DOORS[door][0]()
        return door


in_worker: list[bool] = []


@plan("at_once")
def at_once(run: RunContext[Any]) -> None:
    DOORS[run.input["door"]][0]()


@plan("in_function")
def in_function(run: RunContext[Any]) -> None:
    run.step(fine)
    DOORS[run.input["door"]][0]()


@plan("in_async_function")
async def in_async_function(run: RunContext[Any]) -> None:
    await run.step(fine)
    DOORS[run.input["door"]][0]()


@plan("in_input", input=Checked)
def in_input(run: RunContext[Checked]) -> None: ...


@plan("in_value")
def in_value(run: RunContext[Any]) -> Any:
    return Sly(1)


@plan("in_cleanup")
def in_cleanup(run: RunContext[Any]) -> None:
    try:
        run.wait("go")
    finally:
        DOORS[run.input["door"]][0]()


plain = step(name="plain")(leave)
transactional = step(name="transactional", transactional=True)(leave)
again = step(name="again", retry=retry(max_attempts=2, initial=1))(leave)
undo = step(name="undo")(leave)


@step
def fine(ctx: StepContext) -> str:
    return "fine"


@pytest.fixture
def beatless_plans() -> list[Plan]:
    calls.clear()
    in_worker.clear()
    fine_plan = Plan("fine", [fine])
    return [
        Plan("plain", [plain]),
        Plan("transactional", [transactional]),
        Plan("again", [again]),
        Plan("undone", [fine, plain], on_cancel=undo),
        Plan("sly", [sly, fine]),
        Plan("sly_finish", [sly_finish]),
        Plan("committed", [step(name="committed", transactional=True)(lambda ctx: 1)]),
        fine_plan,
        Plan("in_child", [child("fines", fine_plan, input=inputs)]),
        Plan("in_map", [fine, map_("fines", fine_plan, inputs=inputs)]),
        at_once,
        in_function,
        in_async_function,
        in_input,
        in_value,
        in_cleanup,
        exits,
        two_steps,
        keeps_its_place,
    ]


@pytest.mark.parametrize("plan", ["plain", "transactional"])
def test_whatever_a_body_raises_is_a_failure_with_type_message_and_traceback(
    beatless: Kit, subtests: pytest.Subtests, plan: str
) -> None:
    runs = {door: beatless.start_run(plan, {"door": door}) for door in DOORS}

    assert beatless.work_until_idle() == len(runs)

    for door, run in runs.items():
        with subtests.test(door):
            types = ["RunStarted", "StepStarted", "StepFailed", "RunFinished"]
            assert beatless.event_types(run.run_id) == types
            error = beatless.client.get_run(run.run_id).error
            with pytest.raises(BaseException) as raised:
                DOORS[door][0]()
            assert error["type"] == type(raised.value).__name__
            assert error["message"].startswith(DOORS[door][1])
            assert error["step"] == plan
            assert "in leave" in error["traceback"]
    assert calls == [plan] * len(runs)
    beatless.verify()


CODE_OF_PLANS = ("in_child", "in_map", "at_once", "in_function", "in_async_function", "in_input")


@pytest.mark.parametrize("name", CODE_OF_PLANS)
def test_whatever_the_code_of_a_plan_raises_fails_its_run_with_type_message_and_traceback(
    beatless: Kit, subtests: pytest.Subtests, name: str
) -> None:
    """Of its function, of its input's type, and of what gives its children their inputs."""
    doors = [
        door
        for door in DOORS
        if door != "stop iteration"
        # `asyncio.run` is refused in a coroutine, and so in the function of an async plan.
        and (door, name) != ("asyncio", "in_async_function")
    ]
    runs = {door: beatless.start_run(name, {"door": door}) for door in doors}
    in_worker.append(True)

    beatless.work_until_idle()

    for door, run in runs.items():
        with subtests.test(door):
            ended = beatless.client.get_run(run.run_id)
            with pytest.raises(BaseException) as raised:
                DOORS[door][0]()
            assert ended.state is RunState.FAILED
            assert ended.error["type"] == type(raised.value).__name__
            assert ended.error["message"].startswith(DOORS[door][1])
            assert "in leave" in ended.error["traceback"]
    beatless.verify()


def test_a_result_of_a_function_that_leaves_while_it_is_written_fails_its_run(
    beatless: Kit,
) -> None:
    run = beatless.start_run("in_value")
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).error["message"] == "in the encoder"


def test_a_function_that_leaves_so_while_it_is_left_at_a_wait_waits_on(beatless: Kit) -> None:
    runs = {door: beatless.start_run("in_cleanup", {"door": door}) for door in DOORS}
    beatless.work_until_idle()

    found = {door: beatless.client.get_run(run.run_id).state for door, run in runs.items()}
    assert found == dict.fromkeys(DOORS, RunState.WAITING)


@pytest.mark.parametrize("name", CODE_OF_PLANS)
def test_who_ends_the_process_in_the_code_of_a_plan_fails_no_run(beatless: Kit, name: str) -> None:
    run = beatless.start_run(name, {"door": "exit"})
    in_worker.append(True)
    beatless.drain_outbox_once()
    executor = beatless.app.executors.new()
    executor.leaving = lambda: True

    with pytest.raises(SystemExit):
        executor.execute(beatless.app.plans[name], run.run_id, 1)
    executor.disconnect()

    assert not beatless.client.get_run(run.run_id).state.final
    beatless.verify()


def test_retry_decides_about_it_as_about_any_failure(beatless: Kit) -> None:
    runs = {
        door: beatless.start_run("again", {"door": door, "failures": 1}).run_id
        for door in ("exit", "panic", "asyncio", "no cancel")
    }
    beatless.work_until_idle()
    found = {door: beatless.client.get_run(run_id).state for door, run_id in runs.items()}
    assert found == dict.fromkeys(runs, RunState.QUEUED)

    beatless.advance(10)
    beatless.work_until_idle()

    results = {door: beatless.client.get_run(run_id).result for door, run_id in runs.items()}
    assert results == dict.fromkeys(runs, "stayed")
    beatless.verify()


@pytest.mark.parametrize("door", ["exit", "panic", "interrupt", "asyncio"])
def test_a_step_that_undoes_a_run_and_leaves_so_is_told_in_the_error(
    beatless: Kit, door: str
) -> None:
    run = beatless.start_run("undone", {"door": door})
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)

    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.CANCELLED
    assert ended.error["on_cancel"]["message"] == DOORS[door][1]
    assert calls == ["undo"]
    beatless.verify()


@pytest.mark.parametrize("plan", ["sly", "sly_finish"])
def test_a_result_that_leaves_while_it_is_written_fails_or_is_stored(
    beatless: Kit, subtests: pytest.Subtests, plan: str
) -> None:
    """Never in between: its own code is called before the commit and not after it."""
    runs = {nth: beatless.start_run(plan, {"nth": nth}) for nth in (1, 2, 3, 4)}

    beatless.work_until_idle()

    for nth, run in runs.items():
        with subtests.test(nth=nth):
            ended = beatless.client.get_run(run.run_id)
            if ended.state is RunState.FAILED:
                told = (ended.error["type"], ended.error["message"])
                assert told == ("SystemExit", "in the encoder")
            else:
                assert ended.result in ("fine", {"a": 1})
            assert (nth == 1) <= (ended.state is RunState.FAILED)
    assert calls == [plan] * len(runs)
    beatless.verify()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_hung_on_a_commit_and_leaves_fails_the_attempt_or_changes_nothing(
    beatless: Kit, when: str
) -> None:
    engine = beatless.executor().transactions.engine
    run = beatless.start_run("committed")

    def hook(connection: sqlalchemy.Connection) -> None:
        sqlalchemy.event.remove(engine, "commit", hook)
        if when == "after":  # as a hook of the driver's would come after it
            connection.connection.driver_connection.commit()
        raise SystemExit("a hook")

    sqlalchemy.event.listen(engine, "commit", hook)
    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    if when == "after":
        assert (ended.state, ended.result) == (RunState.COMPLETED, 1)
    else:
        assert (ended.state, ended.error["message"]) == (RunState.FAILED, "a hook")
    beatless.verify()


def test_an_outcome_that_postgres_refuses_is_a_failure(beatless: Kit) -> None:
    run = beatless.start_run("fine")
    journal = beatless.app.journal
    settle = journal.settle

    def refused(*arguments: Any) -> Any:
        journal.settle = settle
        raise psycopg.errors.UntranslatableCharacter("character has no equivalent in LATIN1")

    journal.settle = refused
    beatless.work_until_idle()

    error = beatless.client.get_run(run.run_id).error
    assert error["type"] == "UntranslatableCharacter"
    assert "no equivalent" in error["message"]
    beatless.verify()


@pytest.mark.parametrize("door", ["exit", "interrupt"])
def test_who_ends_the_process_from_outside_fails_no_attempt(beatless: Kit, door: str) -> None:
    run = beatless.start_run("plain", {"door": door, "failures": 1})
    beatless.drain_outbox_once()
    executor = beatless.app.executors.new()
    executor.leaving = lambda: True

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        executor.execute(beatless.app.plans["plain"], run.run_id, 1)
    executor.disconnect()

    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
    last = beatless.client.events(run.run_id)[-1]
    assert last.data["name"] == GIVEN_BACK
    beatless.verify()
