"""Steps that are undone by the executor of `--pool async`: in the loop, in threads, in Postgres."""

from functools import partial
from typing import Any

import pytest

from beatless import AsyncStepContext, Fatal, Plan, RunContext, StepContext, Undone, plan, step
from beatless.testing import Kit
from tests.valkeys import until

CALLS: list[str] = []


@step
async def refund(ctx: AsyncStepContext, undone: Undone) -> None:
    await ctx.trace("refunds")
    CALLS.append(undone.step)


@step
def free(ctx: StepContext, undone: Undone) -> None:
    CALLS.append(undone.step)


@step(transactional=True)
def unbook(ctx: StepContext, undone: Undone) -> None:
    assert ctx.connection.exec_driver_sql("SELECT 1").scalar() == 1
    CALLS.append(undone.step)


@step(undo=refund)
async def charge(ctx: AsyncStepContext, *amounts: int) -> None: ...


@step(undo=free)
def reserve(ctx: StepContext) -> None: ...


@step(undo=unbook)
def book(ctx: StepContext) -> None: ...


@step
async def deliver(ctx: AsyncStepContext) -> None:
    raise Fatal("nobody is at home")


@plan("function")
async def function(run: RunContext[Any]) -> None:
    await run.step(reserve)
    await run.step(charge, 1)
    await run.step(book)
    await run.step(deliver)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    CALLS.clear()
    return [Plan("list", [reserve, charge, book, deliver]), function]


ENDS = {1: "UndoStarted", 2: "RunFinished"}
"""The last event after a claim."""


def all_end_with(kit: Kit, runs: list[str], last: str) -> bool:
    return all(kit.event_types(run_id)[-1] == last for run_id in runs)


@pytest.mark.parametrize("name", ["list", "function"])
def test_runs_are_undone_beside_each_other(beatless: Kit, name: str) -> None:
    executor = beatless.app.executors.begin_concurrent()
    executor.further_runs = 0  # the first would claim one whose message the test has yet to bring
    executor.start()
    runs = [beatless.start_run(name, {}).run_id for _ in range(3)]
    try:
        for claim in ENDS:
            for run_id in runs:
                known = beatless.app.plans[name]
                executor.spawn(partial(executor.execute, known, run_id, claim))
            until(partial(all_end_with, beatless, runs, ENDS[claim]))
    finally:
        executor.stop()

    assert sorted(CALLS) == sorted(["book", "charge", "reserve"] * len(runs))
    assert {beatless.client.get_run(run_id).error["type"] for run_id in runs} == {"Fatal"}
    beatless.verify()
