"""An app whose runs have limits, for workers in processes of their own."""

import threading
from pathlib import Path

from beatless import App, Limit, Plan, Settings, StepContext, child, sleep, step

AT_ONCE = 10

KEPT = Limit("kept", at_once=3, hold="run")


@step
def hold(ctx: StepContext) -> None:
    """Takes a twentieth of a second, after the file that the input may name is there."""
    pause = threading.Event()
    while ctx.input is not None and not Path(ctx.input["go"]).exists():
        ctx.raise_if_cancelled()  # also leaves the place to another when the lease is lost
        pause.wait(0.05)
    pause.wait(0.05)


leaf = Plan("leaf", [hold], limits=[KEPT])

app = App(
    Settings.from_env(),
    plans=[
        Plan("limited", [hold], limits=[Limit("ten", at_once=AT_ONCE)]),
        Plan("unbound", [hold], limits=[Limit("many", at_once=1000)]),
        Plan("free", [hold]),
        Plan("kept", [hold, sleep(seconds=0.1), child("one", leaf)], limits=[KEPT]),
        leaf,
    ],
)
