"""An agent whose answer is streamed token by token, and paid out only after a person's word.

    beatless --app streaming_agent:app dev     # then, in a second terminal in the same directory:
    beatless start refunds --input '{"order": 7}'     # prints the RUN
    beatless approve RUN payment --by ann@example.com --yes; beatless events RUN --follow

Viewers see the text as it grows, in the terminal and on the run page, where people decide too.
The model is a stand-in. The run holds no worker while it waits, for days if need be; who decided is
in its journal.
"""

from collections.abc import Iterator
from typing import Any

from beatless import App, RunContext, Settings, StepContext, days, plan, retry, step

TURNS = 3
PROPOSAL = "The parcel came {} days late. I propose to pay {} euros back."


def model(order: int, turn: int) -> Iterator[str]:
    """The tokens of an answer."""
    for word in PROPOSAL.format(order + turn, 5 * (turn + 1)).split():
        yield f"{word} "


@step(timeout=120, retry=retry(max_attempts=3), terminate_on_cancel=True)
def propose(ctx: StepContext, turn: int) -> str:
    """A killed attempt's text stays in the journal; the next one begins anew, and so do viewers.

    A cancel ends it in mid-stream; otherwise it would wait until the model has said all.
    """
    answer = ""
    for token in model(ctx.input["order"], turn):
        ctx.emit(token)
        answer += token
    return answer.strip()


@step
def pay(ctx: StepContext, proposal: str, by: str) -> dict[str, Any]:
    return {"paid": proposal, "by": by, "key": ctx.key}


@plan("refunds")
def refunds(run: RunContext) -> dict[str, Any]:
    """Up to three proposals, until a person approves one."""
    for turn in range(TURNS):
        proposal: str = run.step(propose, turn)
        # With a name: the title has the proposal in it, and may be reworded while runs wait.
        decision = run.approve(f"Pay? {proposal}", name="payment", timeout=days(7))
        if decision is None:
            return {"paid": None, "reason": "nobody decided"}
        if decision.data.approved:
            paid: dict[str, Any] = run.step(pay, proposal, decision.by)
            return paid
    return {"paid": None, "reason": f"refused {TURNS} times"}


app = App(Settings.from_env(), [refunds])
