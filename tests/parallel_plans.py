"""An App whose plans execute several steps of one run at the same time, for worker processes."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import sqlalchemy

from beatless import (
    App,
    AsyncStepContext,
    Fatal,
    Plan,
    RunContext,
    Settings,
    StepContext,
    minutes,
    plan,
    retry,
    step,
)

WIDTH = 8


def note(ledger: str | None, *facts: Any) -> None:
    """Append a line to the ledger of a test: a body has begun."""
    if ledger is not None:
        with Path(ledger).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


@step(retry=retry(max_attempts=20, initial=0.01, max_crashes=20))
async def fetch(ctx: AsyncStepContext, number: int) -> int:
    note(ctx.input.get("ledger"), ctx.run_id, ctx.step, ctx.attempt, ctx.worker)
    await ctx.trace("inside", number=number)
    if number == ctx.input.get("fails"):
        raise Fatal("no")
    return number * 10


@step(retry=retry(max_attempts=20, initial=0.01, max_crashes=20))
def store(ctx: StepContext, number: int) -> int:
    note(ctx.input.get("ledger"), ctx.run_id, ctx.step, ctx.attempt, ctx.worker)
    ctx.trace("inside", number=number)
    ctx.emit(f"piece {number}")
    if number == ctx.input.get("fails"):
        raise Fatal("no")
    return number + 1


@plan("fans_out")
async def fans_out(run: RunContext) -> int:
    numbers = await asyncio.gather(*(run.step(fetch, number) for number in range(WIDTH)))
    return sum(numbers) + int(await run.step(store, 0))


@plan("in_branches")
async def in_branches(run: RunContext) -> list[int]:
    async def branch(number: int) -> int:
        fetched = await run.step(fetch, number)
        return int(await run.step(store, fetched))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(branch(number)) for number in range(3)]
    return [task.result() for task in tasks]


@plan("threads")
def threads(run: RunContext) -> list[int]:
    return run.parallel([lambda number=number: run.step(store, number) for number in range(WIDTH)])


@plan("waits_in_a_branch")
def waits_in_a_branch(run: RunContext) -> list[Any]:
    def approved() -> Any:
        signal = run.wait("go", timeout=minutes(10))
        return run.step(store, signal.data)

    def slept() -> Any:
        run.sleep(0.2)
        return run.step(store, 1)

    return run.parallel([lambda: run.step(fetch, 1), approved, slept])


square = Plan("square", [step(name="square")(lambda ctx: ctx.input**2)])


@plan("children_in_branches")
async def children_in_branches(run: RunContext) -> Any:
    async def branch(number: int) -> Any:
        child = await run.child(square, number)
        await run.step(fetch, number)
        return await child.result()

    async def many() -> Any:
        return list(await run.map(square, [1, 2, 3, 4, 5], at_once=2))

    return await asyncio.gather(branch(2), many(), branch(3), run.step(store, 1))


@plan("child_of_a_value")
async def child_of_a_value(run: RunContext) -> Any:
    async def branch() -> Any:
        child = await run.child(square, run.random())
        return await child.result()

    return await asyncio.gather(branch(), run.step(store, 1))


@step(transactional=True, retry=retry(max_attempts=3, initial=5, jitter=0))
def books(ctx: StepContext, number: int) -> int:
    if number == ctx.input.get("fails_first") and ctx.attempt == 1:
        raise ValueError("not yet")
    return number


@plan("in_turn")
async def in_turn(run: RunContext) -> list[int]:
    return list(await asyncio.gather(*(run.step(books, number) for number in range(3))))


@step(transactional=True)
async def books_async(ctx: AsyncStepContext, number: int) -> int:
    found = await ctx.connection.execute(sqlalchemy.text("SELECT :n"), {"n": number})
    return int(found.scalar_one())


@plan("in_turn_async")
async def in_turn_async(run: RunContext) -> list[int]:
    return list(await asyncio.gather(*(run.step(books_async, number) for number in range(3))))


ALL = [
    in_turn,
    in_turn_async,
    fans_out,
    in_branches,
    threads,
    waits_in_a_branch,
    square,
    children_in_branches,
    child_of_a_value,
]

app = App(Settings.from_env(os.environ), plans=ALL)
