"""An App whose plans branch, have children and are undone, for workers that are killed.

Each body writes the name of its step into a ledger, if the run's input names one, when it begins.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from beatless import (
    App,
    AsyncStepContext,
    Fatal,
    Plan,
    RunContext,
    Settings,
    StepContext,
    Undone,
    minutes,
    plan,
    retry,
    step,
    wait,
)

PATIENT = retry(max_attempts=1000, initial=0.01, cap=1.0, jitter=0, max_crashes=1000)
BRANCHES = 8


def note(ctx: StepContext | AsyncStepContext) -> None:
    """A body has begun."""
    ledger = (ctx.input or {}).get("ledger")
    if ledger is not None:
        line = json.dumps([ctx.run_id, ctx.step, ctx.attempt])
        with Path(ledger).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


@step(retry=PATIENT)
def pack(ctx: StepContext) -> int:
    note(ctx)
    return int(ctx.input["number"]) ** 2


@step(retry=PATIENT)
def total(ctx: StepContext, numbers: list[int]) -> int:
    note(ctx)
    return sum(numbers)


@step(retry=PATIENT)
async def ask(ctx: AsyncStepContext, number: int) -> int:
    note(ctx)
    await ctx.trace("asked", number=number)
    return number * 10


# Children

parcel = Plan("parcel", [pack])
never = Plan("never", [wait("never")])


def inputs_of(given: Any) -> list[dict[str, Any]]:
    numbers = range(given["first"], given["first"] + given["count"])
    return [{"number": number, "ledger": given.get("ledger")} for number in numbers]


@plan("maps")
def maps(run: RunContext[Any]) -> Any:
    packed = run.map(parcel, inputs_of(run.input), at_once=run.input["at_once"])
    return {"total": run.step(total, packed[:]), "last": packed[-1]}


@plan("nests")
def nests(run: RunContext[Any]) -> Any:
    count = run.input["count"]
    given = [run.input | {"first": run.input["first"] + count * each} for each in range(3)]
    found = run.map(maps, given, at_once=2)
    return run.step(total, [each["total"] for each in found])


@plan("races")
def races(run: RunContext[Any]) -> Any:
    """The only one of three children that can end is the first."""
    slow = [run.child(never, None), run.child(parcel, run.input | {"number": 3})]
    won = run.first([*slow, run.child(never, None)])
    return [won.run_id == slow[1].run_id, run.step(total, [won.result()])]


# Branches


@plan("gathers")
async def gathers(run: RunContext[Any]) -> int:
    numbers = await asyncio.gather(*(run.step(ask, number) for number in range(BRANCHES)))
    return int(await run.step(total, numbers))


@plan("waits")
async def waits(run: RunContext[Any]) -> list[int]:
    async def told() -> int:
        signal = await run.wait("go", timeout=minutes(600))
        return int(await run.step(ask, signal.data if signal else -1))

    async def works() -> int:
        return int(await run.step(total, [await run.step(ask, 1), await run.step(ask, 2)]))

    return list(await asyncio.gather(works(), told()))


@step(retry=PATIENT, timeout=0.2)
def hangs(ctx: StepContext) -> int:
    """Is ended by force as often as the input says, and then perhaps by a slow machine."""
    note(ctx)
    while ctx.attempt <= ctx.input["hangs"]:
        ctx.raise_if_cancelled()  # raises LeaseLost, once it was ended
    return 5


@step(retry=PATIENT, timeout=0.2)
async def hangs_async(ctx: AsyncStepContext) -> int:
    note(ctx)
    if ctx.attempt <= ctx.input["hangs"]:
        await asyncio.get_running_loop().create_future()
    return 6


@plan("late_thread")
def late_thread(run: RunContext[Any]) -> list[int]:
    def works() -> Any:
        return run.step(total, [run.step(ask, 1), run.step(ask, 2)])

    return run.parallel([lambda: run.step(hangs), works])


@plan("late_task")
async def late_task(run: RunContext[Any]) -> list[int]:
    async def works() -> int:
        return int(await run.step(total, [await run.step(ask, 1), await run.step(ask, 2)]))

    return list(await asyncio.gather(run.step(hangs_async), works()))


# Undo


@step(retry=PATIENT)
def refund(ctx: StepContext, undone: Undone) -> Any:
    note(ctx)
    return [undone.step, undone.finished]


@step(retry=PATIENT)
async def release(ctx: AsyncStepContext, undone: Undone) -> Any:
    note(ctx)
    return [undone.step, undone.finished]


@step(undo=release, retry=PATIENT)
def reserve(ctx: StepContext) -> int:
    note(ctx)
    return 1


@step(undo=refund, retry=PATIENT)
async def charge(ctx: AsyncStepContext, amount: int = 7) -> int:
    note(ctx)
    return amount


@step(undo=refund, retry=PATIENT, transactional=True)
def book(ctx: StepContext) -> int:
    note(ctx)
    return 3


@step
def deliver(ctx: StepContext) -> None:
    note(ctx)
    raise Fatal("nobody is at home")


@plan("undone_calls")
def undone_calls(run: RunContext[Any]) -> None:
    run.step(reserve)
    run.step(charge, 1)
    run.step(book)
    run.step(charge, 2)
    run.step(deliver)


@plan("undone_branches")
async def undone_branches(run: RunContext[Any]) -> None:
    await asyncio.gather(
        run.step(reserve), run.step(charge, 1), run.step(charge, 2), run.step(book)
    )
    await run.step(deliver)


CHILDREN = 1000
INPUTS: dict[str, dict[str, Any]] = {
    "maps": {"first": 1, "count": CHILDREN, "at_once": 20},
    "nests": {"first": 1, "count": 20, "at_once": 3},
    "late_thread": {"hangs": 1},
    "late_task": {"hangs": 1},
}
"""What a run is started with, but for its ledger."""

RESULTS: dict[str, Any] = {
    "maps": {"total": 333_833_500, "last": 1_000_000},
    "nests": 73_810,
    "races": [True, 9],
    "gathers": 280,
    "waits": [30, 70],
    "late_thread": [5, 30],
    "late_task": [6, 30],
}
"""Of the runs that complete."""

UNDONE: dict[str, list[str]] = {
    "undone_calls": ["reserve", "charge", "book", "charge#2"],
    "undone_branches": ["reserve", "charge", "charge#2", "book"],
}
"""By the plans whose runs fail."""

ALL = [
    parcel,
    never,
    maps,
    nests,
    races,
    gathers,
    waits,
    late_thread,
    late_task,
    undone_calls,
    undone_branches,
]

app = App(Settings.from_env(os.environ), plans=ALL)
