"""A checkout that waits for the signal of a payment, and asks a person about a large order.

beatless --app checkout:app dev     # then, in a second terminal in the same directory:
beatless start checkout --input '{"number": 7, "amount": 900}'     # prints the RUN
beatless signal RUN paid     # and once it asks: beatless approve RUN Ship --yes --by ann
"""

from dataclasses import dataclass
from typing import Any

from beatless import App, RunContext, Settings, StepContext, days, plan, retry, step

LARGE = 500


@dataclass
class Order:
    number: int
    amount: int


@step(retry=retry(max_attempts=5))
def ask_for_payment(ctx: StepContext, amount: int) -> str:
    """A payment service that is called again with the same key asks its customer once."""
    return f"https://pay.example/{amount}?key={ctx.key}"


@step(retry=retry(max_attempts=5))
def ship(_: StepContext, number: int) -> str:
    return f"order {number} is on its way"


@step(retry=retry(max_attempts=5))
def pay_back(_: StepContext, amount: int) -> int:
    return amount


@plan("checkout", input=Order)
def checkout(run: RunContext[Order]) -> dict[str, Any]:
    order = run.input
    run.step(ask_for_payment, order.amount)
    paid = run.wait("paid", "refused", timeout=days(3))  # no worker is held: the run is a row
    if paid is None or paid.name == "refused":
        return {"shipped": None, "why": "it was not paid"}
    if order.amount >= LARGE:
        decision = run.approve("Ship", timeout=days(1))
        if decision is None or not decision.data.approved:
            return {"shipped": None, "paid_back": run.step(pay_back, order.amount)}
    return {"shipped": run.step(ship, order.number)}


app = App(Settings.from_env(), [checkout])


def webhook(run_id: str, payment: str, *, paid: bool) -> None:
    """What the payment service calls, perhaps twice: the key makes one signal of it."""
    name = "paid" if paid else "refused"
    app.client.signal_run(run_id, name, {"payment": payment}, key=f"payment:{payment}")
