"""Steps that are `async def`, in a worker of any pool."""

import asyncio
import contextvars
import threading
from typing import Any

import pytest

from beatless import (
    AsyncStepContext,
    LeaseLost,
    Plan,
    RunCancelled,
    RunContext,
    RunState,
    plan,
    retry,
    step,
)
from beatless.testing import Kit

APP = "tests.plans:app"
SEEN: list[Any] = []
INSIDE, LET_GO = threading.Event(), threading.Event()
WHERE = contextvars.ContextVar("WHERE", default="nowhere")


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


@step
async def ask(ctx: AsyncStepContext) -> dict[str, Any]:
    SEEN.append(asyncio.get_running_loop())
    await asyncio.to_thread(threading.get_ident)
    return {"input": ctx.input, "where": WHERE.get(), "thread": threading.current_thread().name}


@step
def shout(ctx) -> str:
    return ctx.results["ask"]["input"].upper()


@step
async def tell(ctx: AsyncStepContext, word: str, *, times: int) -> str:
    return await asyncio.to_thread(lambda: word * times)


@plan("told")
def told(run: RunContext) -> str:
    return run.step(tell, "la", times=run.input)


@plan("told_async")
async def told_async(run: RunContext) -> str:
    return await run.step(tell, "lo", times=run.input)


@step
async def chatters(ctx: AsyncStepContext) -> None:
    await ctx.trace("first")
    for number in range(20):
        ctx.trace("tick", number=number)
    ctx.progress(50, "half")
    await asyncio.to_thread(ctx.trace, "from a thread")
    ctx.trace("last")


@step(retry=retry(max_attempts=2, initial=0.01))
async def fails_once(ctx: AsyncStepContext) -> str:
    if ctx.attempt == 1:
        raise ctx_error(ctx.input)
    return "well"


def ctx_error(name: str) -> BaseException:
    return {
        "cancelled": asyncio.CancelledError(),
        "exit": SystemExit(3),
        "value": ValueError("no"),
    }[name]


@step(timeout=0.2)
async def late(ctx: AsyncStepContext) -> None:
    try:
        await for_ever()
    finally:
        await asyncio.to_thread(threading.get_ident)
        SEEN.append("cleaned up")


@step(timeout=0.2)
async def swallows(ctx: AsyncStepContext) -> None:
    INSIDE.set()
    while not LET_GO.is_set():
        try:
            await asyncio.to_thread(LET_GO.wait, 0.01)
        except asyncio.CancelledError:
            continue
    try:
        await ctx.trace("too late")
    except LeaseLost as error:
        SEEN.append(error)


@step(terminate_on_cancel=True)
async def endless(ctx: AsyncStepContext) -> None:
    INSIDE.set()
    await for_ever()


@step
async def looks(ctx: AsyncStepContext) -> None:
    INSIDE.set()
    try:
        while True:
            ctx.raise_if_cancelled()
            await asyncio.to_thread(LET_GO.wait, 0.01)
    except RunCancelled:
        SEEN.append("noticed")
        raise


def decorated(function):
    def wrapper(ctx):
        return function(ctx)

    return wrapper


@pytest.fixture
def beatless_plans() -> list[Plan]:
    SEEN.clear(), INSIDE.clear(), LET_GO.clear()
    steps = [chatters, fails_once, late, swallows, endless, looks]
    hidden = step(name="hidden")(decorated(ask.function))
    return [
        Plan("asked", [ask, shout]),
        told,
        told_async,
        *(Plan(each.name, [each]) for each in [*steps, hidden]),
    ]


def finished(beatless: Kit, name: str, input: Any = None) -> Any:
    run = beatless.start_run(name, input)
    beatless.work_until_idle()
    return beatless.client.get_run(run.run_id)


def test_an_async_step_is_executed_in_the_loop_of_its_process(beatless: Kit) -> None:
    for _ in range(2):
        run = finished(beatless, "asked", "hello")
        assert (run.state, run.result) == (RunState.COMPLETED, "HELLO")

    one, other = SEEN
    assert one is other  # so that a client of a step is of use to the next
    asked = beatless.client.events(run.run_id)[2].data["result"]
    assert asked["thread"] == "beatless-loop"
    beatless.verify()


def test_an_async_step_has_the_context_of_its_caller(beatless: Kit) -> None:
    token = WHERE.set("here")
    try:
        run = finished(beatless, "asked", "hello")
    finally:
        WHERE.reset(token)

    assert beatless.client.events(run.run_id)[2].data["result"]["where"] == "here"


@pytest.mark.parametrize(("name", "result"), [("told", "lalala"), ("told_async", "lololo")])
def test_plans_of_functions_give_arguments_to_async_steps(
    beatless: Kit, name: str, result: str
) -> None:
    assert finished(beatless, name, 3).result == result
    beatless.verify()


def test_traces_that_nobody_awaits_are_written_in_order_before_the_step_ends(
    beatless: Kit,
) -> None:
    run = finished(beatless, "chatters")

    events = beatless.client.events(run.run_id)
    traces = [event for event in events if event.type == "DebugTrace"]
    assert [event.data["name"] for event in traces] == [
        "first",
        *["tick"] * 20,
        "progress",
        "from a thread",
        "last",
    ]
    ticks = [event.data["number"] for event in traces if event.data["name"] == "tick"]
    assert ticks == list(range(20))
    assert [event.type for event in events[-2:]] == ["StepFinished", "RunFinished"]
    beatless.verify()


@pytest.mark.parametrize(
    ("how", "kind"),
    [("cancelled", "CancelledError"), ("exit", "SystemExit"), ("value", "ValueError")],
)
def test_what_an_async_body_raises_is_the_failure_of_its_attempt(
    beatless: Kit, how: str, kind: str
) -> None:
    run = beatless.start_run("fails_once", how)
    beatless.work_until_idle()
    beatless.advance(1)
    beatless.work_until_idle()

    (failed,) = [
        event for event in beatless.client.events(run.run_id) if event.type == "StepFailed"
    ]
    assert failed.data["error"]["type"] == kind
    assert beatless.client.get_run(run.run_id).result == "well"
    beatless.verify()


def test_a_time_out_cancels_the_task_which_may_clean_up(beatless: Kit) -> None:
    run = finished(beatless, "late")

    assert (run.state, run.error["type"]) == (RunState.FAILED, "StepTimeout")
    assert SEEN == ["cleaned up"]
    beatless.verify()


def test_a_task_that_swallows_its_cancel_is_fenced(beatless: Kit) -> None:
    run = beatless.start_run("swallows")
    worker = threading.Thread(target=beatless.work_until_idle)
    worker.start()
    failed = beatless.wait_for_run_completion(run.run_id)
    LET_GO.set()
    worker.join()

    assert (failed.state, failed.error["type"]) == (RunState.FAILED, "StepTimeout")
    assert "in swallows" in failed.error["traceback"]
    assert [type(each) for each in SEEN] == [LeaseLost]
    beatless.verify()


@pytest.mark.parametrize(("name", "seen"), [("endless", []), ("looks", ["noticed"])])
def test_a_cancel_ends_an_async_step(beatless: Kit, name: str, seen: list[str]) -> None:
    run = beatless.start_run(name)
    worker = threading.Thread(target=beatless.work_until_idle)
    worker.start()
    assert INSIDE.wait(60)
    beatless.client.cancel_run(run.run_id)
    worker.join()

    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    assert seen == SEEN
    beatless.verify()


def test_a_step_that_hides_that_it_is_async_fails_with_what_to_do(beatless: Kit) -> None:
    run = finished(beatless, "hidden")

    assert run.state is RunState.FAILED
    assert "returns a coroutine: perhaps a decorator hides" in run.error["message"]
