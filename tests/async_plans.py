"""Plans whose runs one process executes at once, and the app by which such workers find them."""

import asyncio
import os
import signal
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import sqlalchemy

from beatless import (
    App,
    AsyncStepContext,
    Plan,
    RunContext,
    Settings,
    StepContext,
    plan,
    retry,
    step,
)

INSIDE: defaultdict[str, set[str]] = defaultdict(set)
"""The runs whose bodies are inside of a gate, by its name."""


async def meet(gate: str, run_id: str, runs: int) -> None:
    """Return when so many runs are in this process at once."""
    INSIDE[gate].add(run_id)
    while len(INSIDE[gate]) < runs:
        await asyncio.to_thread(threading.get_ident)


@step
async def together(ctx: AsyncStepContext) -> int:
    await ctx.trace("inside")
    await meet(ctx.input["gate"], ctx.run_id, ctx.input["runs"])
    return len(INSIDE[ctx.input["gate"]])


@step
def in_thread(ctx: StepContext) -> str:
    ctx.trace("here")
    return threading.current_thread().name


@step(transactional=True)
def with_connection(ctx: StepContext) -> int:
    return int(ctx.connection.execute(sqlalchemy.text("SELECT 7")).scalar_one())


@step(transactional=True)
async def with_async_connection(ctx: AsyncStepContext) -> int:
    return int((await ctx.connection.execute(sqlalchemy.text("SELECT 7"))).scalar_one())


@step
async def adds(ctx: AsyncStepContext, one: int, other: int) -> int:
    return one + other


@plan("sums")
def sums(run: RunContext) -> int:
    total = 0
    for number in run.input:
        total = run.step(adds, total, number)
    return total


@step(retry=retry(max_attempts=1, max_crashes=1))
async def survives(ctx: AsyncStepContext) -> int:
    """Waits for a file that the test makes; its first crash would fail the run."""
    await ctx.trace("inside")
    while not await asyncio.to_thread(Path(ctx.input["go"]).exists):
        await asyncio.to_thread(threading.Event().wait, 0.02)
    return os.getpid()


@step(timeout=0.5)
async def late(ctx: AsyncStepContext) -> None:
    await asyncio.get_running_loop().create_future()


@step(terminate_on_cancel=True)
async def endless(ctx: AsyncStepContext) -> None:
    await ctx.trace("inside")
    await asyncio.get_running_loop().create_future()


@step
async def blocks(ctx: AsyncStepContext) -> None:
    threading.Event().wait(ctx.input["seconds"])


@step(retry=retry(max_attempts=1, max_crashes=1))
async def deadly(ctx: AsyncStepContext) -> str:
    """Ends its process, if the input says so, once as many runs are in it as can be."""
    if ctx.input["poison"]:
        await ctx.trace("deadly")
        os.kill(os.getpid(), signal.SIGKILL)
    return "well"


@step(retry=retry(max_attempts=1, max_crashes=1))
async def hungry(ctx: AsyncStepContext) -> str:
    """Takes 640 MB and goes on for ever, if the input says so; else it takes a moment."""
    held = []
    while ctx.input["poison"]:
        if len(held) < 160:
            held.append(bytearray(os.urandom(1)) * 2**22)
        await asyncio.to_thread(threading.Event().wait, 0.001)
    await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=0.2)
    return "well"


@step
async def quick(ctx: AsyncStepContext) -> Any:
    return ctx.input


ALL = [
    Plan("together", [together, in_thread, with_connection, with_async_connection]),
    sums,
    *(Plan(each.name, [each]) for each in (survives, late, endless, blocks, deadly, hungry, quick)),
]

app = App(Settings.from_env(os.environ), plans=ALL)
