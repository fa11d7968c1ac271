"""The plans of the general load, and the app by which worker processes find them.

Each body writes a line into a ledger outside of Postgres before it returns; its result names that
line, so that the checker knows which call of which body was committed.
"""

import asyncio
import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from beatless import (
    App,
    AsyncStepContext,
    ChildFailed,
    Goto,
    Limit,
    Plan,
    RunContext,
    Settings,
    Snooze,
    StepContext,
    StepFailed,
    Undone,
    plan,
    retry,
    sleep,
    step,
    wait,
)
from beatless.outbox import scan_floor

LEDGER = "CHAOS_LEDGER"

if LEDGER in os.environ:
    # A relay lives for seconds here, and sees no thousand rows.
    scan_floor.FLOOR_INTERVAL_ROWS = 5


def effect(ctx: StepContext, name: str | None = None) -> dict[str, str]:
    """Have an effect that no rollback takes back, and give the result that names it."""
    call = uuid.uuid4().hex
    line = {
        "kind": "effect",
        "run_id": ctx.run_id,
        "step": name or ctx.step,
        "attempt": ctx.attempt,
        "key": ctx.key,
        "call": call,
        "pid": os.getpid(),
    }
    ledger = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(ledger, json.dumps(line).encode() + b"\n")
    finally:
        os.close(ledger)
    return {"call": call}


def work(ctx: StepContext) -> None:
    """Take as long as the input says, so that faults meet a body that runs."""
    threading.Event().wait((ctx.input or {}).get("seconds", 0))


def plain(name: str, **options: Any) -> Any:
    """A step that works and has its effect."""

    def body(ctx: StepContext) -> dict[str, str]:
        work(ctx)
        return effect(ctx, name)

    return step(name=name, **options)(body)


@step(name="sync")
def sync(ctx: StepContext) -> dict[str, Any]:
    work(ctx)
    return effect(ctx, "sync") | {"number": ctx.input["number"]}


@step(name="traced")
def traced(ctx: StepContext) -> dict[str, str]:
    for number in range((ctx.input or {}).get("traces", 3)):
        ctx.trace("tick", number=number)
        threading.Event().wait((ctx.input or {}).get("pause", 0))
    return effect(ctx, "traced")


@step(name="flaky", retry=retry(max_attempts=4, initial=0.2, backoff=1.5, jitter=0))
def flaky(ctx: StepContext) -> dict[str, str]:
    """Fails as often as the input says."""
    found = effect(ctx, "flaky")
    if ctx.attempt <= (ctx.input or {}).get("failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found


@step(name="stored", transactional=True)
def stored(ctx: StepContext) -> None:
    """One row that commits together with StepFinished."""
    ctx.connection.exec_driver_sql(
        "INSERT INTO beatless.chaos_rows (run_id, step) VALUES (%(run)s, 'stored')",
        {"run": ctx.run_id},
    )
    work(ctx)


@step(name="stored_async", transactional=True)
async def stored_async(ctx: AsyncStepContext) -> None:
    """The same, in a loop that other steps have meanwhile."""
    await ctx.connection.exec_driver_sql(
        "INSERT INTO beatless.chaos_rows (run_id, step) VALUES (%(run)s, 'stored_async')",
        {"run": ctx.run_id},
    )
    await asyncio.to_thread(work, ctx)


@step(name="snooze")
def snooze(ctx: StepContext) -> Any:
    """Gives the worker back until the time that the input says."""
    if time.time() < (ctx.input or {}).get("until", 0):
        return Snooze(0.3)
    return effect(ctx, "snooze")


def brief(name: str) -> Any:
    """A step that hardly takes time, so that its runs are executed in groups."""

    def body(ctx: StepContext) -> dict[str, str]:
        if name == "last":
            work(ctx)
        return effect(ctx, name)

    return step(name=name)(body)


@step(name="try", retry=retry(max_attempts=3, initial=0.2, backoff=1.5, jitter=0))
def try_briefly(ctx: StepContext) -> dict[str, str]:
    """Fails at once, as often as the input says."""
    found = effect(ctx, "try")
    if ctx.attempt <= (ctx.input or {}).get("failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found


@step(name="refund")
def refund(ctx: StepContext) -> dict[str, str]:
    return effect(ctx, "refund")


@step(name="unpay")
def unpay(ctx: StepContext, undone: Undone) -> dict[str, str]:
    work(ctx)
    return effect(ctx) | {"undoes": undone.key}


@step(name="unbook", retry=retry(max_attempts=3, initial=0.1, backoff=1, jitter=0))
def unbook(ctx: StepContext, undone: Undone) -> dict[str, str]:
    """Fails now and then, and at last for good."""
    found = effect(ctx)
    if ctx.attempt <= (ctx.input or {}).get("undo_failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found | {"undoes": undone.key}


@step(name="pay", undo=unpay)
def pay(ctx: StepContext) -> dict[str, str]:
    work(ctx)
    return effect(ctx)


@step(name="book", undo=unbook, retry=retry(max_attempts=2, initial=0.2, backoff=1, jitter=0))
def book(ctx: StepContext) -> dict[str, str]:
    """Fails as often as the input says, when it may have booked."""
    work(ctx)
    found = effect(ctx)
    if ctx.attempt <= (ctx.input or {}).get("failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found


# Plans that wait. Their routes are told to the checker.

races = wait("paid", timeout=0.5, on_timeout=Goto("release"))
reserve, ship, release, thank = (plain(name) for name in ("reserve", "ship", "release", "thank"))


@step(name="tick")
def tick(ctx: StepContext, turn: int) -> dict[str, str]:
    """One turn of a loop."""
    work(ctx)
    return effect(ctx) | {"turn": str(turn)}


@step(name="risk", retry=retry(max_attempts=2, initial=0.1, backoff=1, jitter=0))
def risk(ctx: StepContext) -> dict[str, str]:
    """Fails as often as the input says, then for good."""
    found = effect(ctx)
    if ctx.attempt <= (ctx.input or {}).get("failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found


@plan("order", on_cancel=refund)
def order(run: RunContext[Any]) -> dict[str, Any]:
    """Waits for one of two signals, and gives all that it was told."""
    seen = [run.step(reserve)["call"]]
    paid = run.wait("paid", "refused", timeout=run.input.get("timeout"))
    seen.append(paid and paid.seq)
    seen.append(run.step(ship if paid else release)["call"])
    seen.append(run.sleep(run.input.get("sleep", 0.2)))
    seen.append(run.step(thank)["call"])
    return {"seen": seen}


@plan("turns")
async def turns(run: RunContext[Any]) -> Any:
    """Loops, and begins again and again."""
    seen: list[Any] = []
    for turn in range(2):
        seen.append((await run.step(tick, turn))["call"])
        poke = await run.wait("poke", timeout=run.input.get("timeout"))
        seen.append(poke and poke.seq)
        try:
            seen.append((await run.step(risk))["call"])
        except StepFailed:
            run.uuid()
    if run.input["turns"]:
        return run.again(run.input | {"turns": run.input["turns"] - 1})
    return {"seen": seen}


# Plans whose runs have children, and steps that emit.


@step(name="talk", retry=retry(max_attempts=2, initial=0.1, backoff=1, jitter=0))
async def talk(ctx: AsyncStepContext) -> dict[str, Any]:
    """Emits numbers, with pauses in which others have the loop; fails once if the input says so."""
    given = ctx.input or {}
    for number in range(given.get("pieces", 0)):
        await ctx.emit(number)
        await asyncio.to_thread(threading.Event().wait, given.get("pause", 0))
    found = effect(ctx)
    if ctx.attempt <= given.get("failures", 0):
        raise ValueError(f"attempt {ctx.attempt} fails")
    return found | {"pieces": given.get("pieces", 0)}


@step(name="deadly", retry=retry(max_attempts=1, max_crashes=30))
async def deadly(ctx: AsyncStepContext) -> dict[str, Any]:
    """Ends its process as often as the input says, as one does that has taken all of its memory."""
    found = effect(ctx)
    if die_again(Path(f"{os.environ[LEDGER]}-{ctx.run_id}"), (ctx.input or {}).get("deaths", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def die_again(deaths: Path, most: int) -> bool:
    """Whether the body is to end its process once more, which is noted."""
    again = not deaths.exists() or len(deaths.read_text()) < most
    if again:
        with deaths.open("a") as file:
            file.write("x")
    return again and most > 0


@step(name="total")
def total(ctx: StepContext, ends: list[Any]) -> dict[str, Any]:
    """The step behind the children."""
    return effect(ctx) | {"ends": ends}


piece = Plan("piece", [talk])
"""A child."""

UNSENT = "never"
"""A signal that nobody sends."""

lasting = Plan("lasting", [wait(UNSENT)])
"""A child that ends with its parent alone."""


@plan("family")
def family(run: RunContext[Any]) -> dict[str, Any]:
    """Has children of several kinds, and gives their results in the order of their inputs."""
    given = run.input
    one = run.child(piece, given["first"])
    if given["detached"]:
        run.child(piece, given["first"], detach=True)
    if given["lasting"]:
        run.child(lasting, None)
    ends = run.map(piece, given["children"], at_once=given["at_once"], failure="collect")
    below = run.map(family, given["families"], failure="collect")
    seen = [None if isinstance(end, Exception) else end["call"] for end in ends]
    counted = run.step(total, seen)
    try:
        alone = one.result()["call"]
    except ChildFailed:
        alone = None
    return {"ends": seen, "counted": counted["ends"], "alone": alone, "below": len(below)}


# Plans whose steps are in flight at the same time.


@step(name="part")
def part(ctx: StepContext) -> dict[str, str]:
    work(ctx)
    return effect(ctx)


@step(name="ask")
async def ask(ctx: AsyncStepContext) -> dict[str, str]:
    await asyncio.to_thread(work, ctx)
    return effect(ctx)


@plan("split")
def split(run: RunContext[Any]) -> int:
    return len(run.parallel([lambda: run.step(part) for _ in range(3)]))


@plan("gathered")
async def gathered(run: RunContext[Any]) -> int:
    async def branch() -> None:
        await run.step(ask)
        await run.step(part)

    return len(await asyncio.gather(*(branch() for _ in range(3))))


WAITED: dict[str, tuple[str, ...]] = {
    "paid": ("paid", "refused"),
    "race": ("paid",),
    "rest": ("go",),
    "order": ("paid", "refused"),
    "turns": ("poke",),
}
"""By plan: the signals that its runs wait for."""

ROUTES: dict[str, dict[str, list[str]]] = {
    "paid": {
        "": ["reserve"],
        "reserve": ["paid"],
        "paid/received": ["ship"],
        "ship": ["END"],
    },
    "race": {
        "": ["reserve"],
        "reserve": ["paid"],
        "paid/received": ["ship"],
        "paid/timed_out": ["release"],
        "ship": ["release"],
        "release": ["END"],
    },
    "rest": {
        "": ["go"],
        "go/received": ["one"],
        "go/timed_out": ["one"],
        "one": ["sleep"],
        "sleep/slept": ["two"],
        "two": ["END"],
    },
    "order": {
        "": ["reserve"],
        "reserve": ["paid"],
        "paid/received": ["ship"],
        "paid/timed_out": ["release"],
        "ship": ["sleep"],
        "release": ["sleep"],
        "sleep/slept": ["thank"],
        "thank": ["END"],
    },
    "turns": {
        "": ["tick"],
        "tick": ["poke"],
        "poke/received": ["risk"],
        "poke/timed_out": ["risk"],
        "risk": ["tick", "END"],
    },
    "lasting": {"": [UNSENT]},
    "split": {"": ["part"], "part": ["part", "END"]},
    "gathered": {"": ["ask"], "ask": ["ask", "part"], "part": ["ask", "part", "END"]},
    "family": {"": ["total"], "total": ["END"]},
}

PLANS = [
    Plan("chain", [plain("one"), plain("two"), plain("three"), plain("four")]),
    Plan("brief", [brief("first"), try_briefly, brief("last")]),
    Plan("traced", [traced, plain("after")]),
    Plan("flaky", [plain("before"), flaky, plain("after")]),
    Plan("stored", [plain("before"), stored, plain("after")]),
    Plan("stored_async", [plain("before"), stored_async, plain("after")]),
    Plan("snoozed", [plain("before"), snooze, plain("after")]),
    Plan("paid", [reserve, wait("paid", "refused"), ship]),
    Plan("race", [reserve, races, ship, release]),
    Plan("rest", [wait("go", timeout=3), plain("one"), sleep(seconds=0.3), plain("two")]),
    order,
    turns,
    piece,
    lasting,
    family,
    split,
    gathered,
    Plan("deadly", [deadly]),
    Plan("synced", [sync]),
    Plan("limited", [plain("hold")], limits=[Limit("hold", at_once=2)]),
    Plan(
        "choked",
        [plain("one"), plain("choke", limits=[Limit("choke", at_once=2)]), plain("two")],
    ),
    Plan(
        "kept",
        [plain("one"), sleep(seconds=0.3), plain("two")],
        limits=[Limit("kept", at_once=3, hold="run")],
    ),
    Plan("bought", [pay, book, plain("ship")]),
    Plan("cancelled", [plain("reserve"), plain("charge"), plain("ship")], on_cancel=refund),
]

app = App(Settings.from_env(), plans=PLANS) if "BEATLESS_DATABASE_URL" in os.environ else None
celery = app and app.celery
