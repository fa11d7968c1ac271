"""An app whose runs have limits, for workers in processes of their own."""

import json
import os
import threading
import time
from pathlib import Path

from beatless import App, Limit, Plan, Settings, StepContext, child, sleep, step

AT_ONCE = 10

KEPT = Limit("kept", at_once=3, hold="run")


@step
def hold(ctx: StepContext) -> None:
    """Takes a twentieth of a second, after the file `go` that the input may name is there.

    Writes into the file `ledger` when it has begun, and when it ends.
    """
    pause, given = threading.Event(), ctx.input or {}
    begin = time.time()
    while given and not Path(given["go"]).exists():
        ctx.raise_if_cancelled()  # also leaves the place to another when the lease is lost
        pause.wait(0.05)
    pause.wait(0.05)
    if "ledger" in given:
        line = {"run_id": ctx.run_id, "begin": begin, "end": time.time()}
        with Path(given["ledger"]).open("ab", buffering=0) as ledger:  # whole, or not at all
            os.write(ledger.fileno(), json.dumps(line).encode() + b"\n")


@step(limits=[Limit("narrow", at_once=2)])
def narrow(ctx: StepContext) -> None:
    """Takes a fiftieth of a second."""
    threading.Event().wait(0.02)


@step
def brief(ctx: StepContext) -> None:
    """Takes no time."""


brief_after = step(name="brief_after")(brief.function)


leaf = Plan("leaf", [hold], limits=[KEPT])

app = App(
    Settings.from_env(),
    plans=[
        Plan("limited", [hold], limits=[Limit("ten", at_once=AT_ONCE)]),
        Plan("unbound", [hold], limits=[Limit("many", at_once=1000)]),
        Plan("free", [hold]),
        Plan("kept", [hold, sleep(seconds=0.1), child("one", leaf)], limits=[KEPT]),
        leaf,
        Plan("narrow", [brief, narrow, brief_after]),
    ],
)
