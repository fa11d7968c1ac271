"""Plans of a shop, for the browser to watch: steps that wait for a file, retry, trace and fail."""

import threading
from pathlib import Path
from typing import Any

from beatless import Fatal, Limit, Plan, StepContext, hours, retry, step, wait


def wait_at(ctx: StepContext, gate: str) -> None:
    """Waits until the file of the input's folder exists, and looks for a cancel meanwhile."""
    if "gates" not in (ctx.input or {}):
        return
    while not (Path(ctx.input["gates"]) / gate).exists():
        ctx.raise_if_cancelled()
        threading.Event().wait(0.02)


@step
def reserve(ctx: StepContext) -> dict[str, Any]:
    ctx.trace("stock.checked", sku="BL-1138", left=12, warehouse="Ghent")
    return {"reserved": (ctx.input or {}).get("order", 1), "until": "2026-12-01T12:00:00Z"}


@step(retry=retry(max_attempts=3, initial=0.2, backoff=2, jitter=0))
def charge(ctx: StepContext) -> dict[str, Any]:
    """Declined as often as the input says."""
    ctx.trace("payment.sent", amount=4200, currency="EUR", key=ctx.key)
    wait_at(ctx, "charge")
    if ctx.attempt <= (ctx.input or {}).get("declined", 0):
        raise ConnectionError("the payment service closed the connection")
    return {"charged": 4200, "key": ctx.key}


@step
def pack(ctx: StepContext) -> dict[str, Any]:
    for number in range((ctx.input or {}).get("parcels", 3)):
        ctx.trace("parcel.packed", number=number, label=(ctx.input or {}).get("label", "fragile"))
    ctx.progress((ctx.input or {}).get("progress", 40), "labels are printed")
    wait_at(ctx, "pack")
    return {"parcels": (ctx.input or {}).get("parcels", 3)}


@step
def ship(ctx: StepContext) -> dict[str, Any]:
    if (ctx.input or {}).get("lost"):
        raise Fatal((ctx.input or {})["lost"])
    return {"tracking": "BE 1138 4711", "note": (ctx.input or {}).get("label", "fragile")}


checkout = Plan("checkout", [reserve, charge, pack, ship])


@step
def settle(ctx: StepContext) -> str:
    return "settled"


@step(retry=retry(max_attempts=2, initial=0))
def answer(ctx: StepContext) -> None:
    """Says half of it, waits, says the rest; fails at first."""
    for token in ("<b>Hel", "lo</b> ", {"tool": 12345678901234567890}):
        ctx.emit(token)
    wait_at(ctx, f"half {ctx.attempt}")
    ctx.emit("the end")
    if ctx.attempt == 1:
        raise ConnectionError("the model hung up")


answers = Plan("answers", [answer])

refund = Plan("refund", [settle], queue="payments")


billing = Plan(
    "billing",
    [charge],
    queue="payments",
    limits=[
        Limit("stripe", key=lambda order: order["account"], at_once=1),
        Limit("statements", rate="100/h"),
    ],
)


@step
def receipt(ctx: StepContext) -> Any:
    return ctx.results["paid"].data


payment = Plan("payment", [wait("paid", "refused", timeout=hours(1)), receipt])
