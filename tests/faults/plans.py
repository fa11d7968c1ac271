"""The plans of the general load, and the app by which worker processes find them.

Each body writes a line into a ledger outside of Postgres before it returns; its result names that
line, so that the checker knows which call of which body was committed.
"""

import json
import os
import threading
import time
import uuid
from typing import Any

from beatless import App, Plan, Settings, Snooze, StepContext, retry, step
from beatless.outbox import scan_floor

LEDGER = "CHAOS_LEDGER"

if LEDGER in os.environ:
    # A relay lives for seconds here, and sees no thousand rows.
    scan_floor.FLOOR_INTERVAL_ROWS = 5


def effect(ctx: StepContext, name: str) -> dict[str, str]:
    """Have an effect that no rollback takes back, and give the result that names it."""
    call = uuid.uuid4().hex
    line = {
        "kind": "effect",
        "run_id": ctx.run_id,
        "step": name,
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


def plain(name: str) -> Any:
    """A step that works and has its effect."""

    def body(ctx: StepContext) -> dict[str, str]:
        work(ctx)
        return effect(ctx, name)

    return step(name=name)(body)


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


PLANS = [
    Plan("chain", [plain("one"), plain("two"), plain("three"), plain("four")]),
    Plan("brief", [brief("first"), try_briefly, brief("last")]),
    Plan("traced", [traced, plain("after")]),
    Plan("flaky", [plain("before"), flaky, plain("after")]),
    Plan("stored", [plain("before"), stored, plain("after")]),
    Plan("snoozed", [plain("before"), snooze, plain("after")]),
    Plan("cancelled", [plain("reserve"), plain("charge"), plain("ship")], on_cancel=refund),
]

app = App(Settings.from_env(), plans=PLANS) if "BEATLESS_DATABASE_URL" in os.environ else None
celery = app and app.celery
