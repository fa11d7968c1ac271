"""The plans of the runs that are measured."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from beatless import AsyncStepContext, Plan, RunContext, StepContext, plan, step

TURNS_OF_A_GENERATION = 100

MARK = b"~"
"""Is in each token once, and in nothing else that a viewer reads."""

TOKEN = "~word "


@step
def begin(_: StepContext) -> float:
    """When the body began, by the clock that Postgres has too."""
    return time.time()


@step
def nothing(_: StepContext) -> None:
    pass


@step
def turn(_: StepContext, number: int) -> float:  # noqa: ARG001 - so that each call has another
    return time.time()


@step
def taken(_: StepContext, sent: float) -> float:
    """Seconds since the signal was sent."""
    return time.time() - sent


@step
async def ask(ctx: AsyncStepContext) -> list[float]:
    """Asks a server that answers after so many seconds; when this began and ended."""
    began = time.time()
    reader, writer = await asyncio.open_connection("127.0.0.1", ctx.input["port"])
    writer.write(f"{ctx.input['seconds']}\n".encode())
    await reader.readline()
    writer.close()
    return [began, time.time()]


async def moment(at: float) -> None:
    """Return at this time."""
    await asyncio.sleep(at - time.time())


def open_gate(gate: Path, **times: float) -> None:
    """Let the bodies go on that wait here, by these times."""
    written = gate.with_suffix(".new")
    written.write_text(json.dumps(times))
    written.replace(gate)


async def opened(gate: Path) -> dict[str, float]:
    """The times of a gate, once it is open."""
    while not await asyncio.to_thread(gate.exists):  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.05)
    times: dict[str, float] = json.loads(await asyncio.to_thread(gate.read_text))
    return times


@step
async def tell(ctx: AsyncStepContext) -> float:
    """Tells tokens at a rate and waits until a time; seconds that the last one was late."""
    given = ctx.input
    times = await opened(Path(given["gate"]))
    due = times["begin"]
    for number in range(given["count"]):
        due = times["begin"] + given["after"] + number / given["rate"]
        if due > time.time():
            await moment(due)
        if given["how"] == "emit":
            await ctx.emit(TOKEN)
        else:
            await ctx.trace("token", text=TOKEN)
    late = time.time() - due
    await moment(times["end"])
    return late


@plan("later")
def later(run: RunContext) -> Any:
    run.sleep(run.input["seconds"])
    return run.step(begin)


@plan("until")
def until(run: RunContext) -> Any:
    run.sleep(max(0.001, run.input["due"] - run.now().timestamp()))
    return run.step(begin)


@plan("signalled")
def signalled(run: RunContext) -> Any:
    run.wait("go")
    return run.step(begin)


@plan("loop")
def loop(run: RunContext) -> None:
    for number in range(run.input):
        run.step(turn, number)


@plan("signalled_loop")
def signalled_loop(run: RunContext) -> Any:
    """A signal and a step in each turn."""
    begins, turns = run.input["turn"], run.input["turns"]
    ends = min(begins + TURNS_OF_A_GENERATION, turns)
    for _ in range(begins, ends):
        run.step(taken, run.wait("go").data)
    return run.again({"turn": ends, "turns": turns}) if ends < turns else ends


plain = Plan("plain", [begin])
noop = Plan("noop", [nothing])


@plan("fan")
def fan(run: RunContext) -> Any:
    run.map(noop, range(run.input))
    return run.step(begin)


PLANS = [
    plain,
    noop,
    later,
    until,
    signalled,
    fan,
    loop,
    signalled_loop,
    Plan("asking", [ask]),
    Plan("telling", [tell]),
]
