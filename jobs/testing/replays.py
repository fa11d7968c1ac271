"""Calls functions of plans once more on the journals of their runs, and compares the results."""

import json

from beatless.client import Client
from beatless.orchestrator.dry_replay import dry_replay
from beatless.orchestrator.function_call import Ended
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.replay import Call, Mismatch, Several
from beatless.orchestrator.state import RunState


def check_replay(client: Client, plan: Plan, run_id: str) -> None:
    """Raises AssertionError if a run that has completed would not do the same by its journal."""
    if not isinstance(plan, FunctionPlan):
        return
    run = client.get_run(run_id)
    if run.state is not RunState.COMPLETED:
        return
    said = dry_replay(
        plan,
        run,
        client.events(run_id),
        lambda first, last: client.ends_of_children(run_id, first, last),
    )
    match said:
        case Ended(value) if json.loads(json.dumps(value, default=repr)) == run.result:
            return
        case Ended(value):
            found = f"it returns {value!r:.500}, and returned {run.result!r:.500} before"
        case Call() | Several():
            found = f"it asks for step {said.occurrence}, which it did not before"
        case Mismatch():
            found = said.message
        case _:
            found = f"it raises {said.error!r:.500}"
    raise AssertionError(
        f"plan {plan.name} does not do the same when it is called again on what run {run_id} has "
        f"stored: {found}. Use run.now(), run.random() and run.uuid(), and put all else that "
        "differs from call to call into steps"
    )
