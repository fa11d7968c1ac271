"""Calls functions of plans once more on the journals of their runs, and compares the results."""

import json

from beatless.app import App
from beatless.client import Client
from beatless.orchestrator.dry_replay import dry_replay
from beatless.orchestrator.function_call import Ended, Said
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Call, Mismatch, Several
from beatless.orchestrator.state import RunState
from beatless.places import difference, why_it_waits

REPEATABLE = (
    "Use run.now(), run.random() and run.uuid(), and put all else that differs from call to call "
    "into steps"
)


def check_replay(client: Client, plan: Plan, run_id: str, *, first: bool) -> None:
    """Raises AssertionError if a run would not do the same by its journal.

    It has completed, or waits after its `first` execution: the later ones call the function again.
    """
    if not isinstance(plan, FunctionPlan):
        return
    run = client.get_run(run_id)
    if run.state is RunState.COMPLETED:
        said = _replayed(client, plan, run)
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
        raise _differs(plan, run_id, found)
    if first and run.state is RunState.WAITING and run.cancel_requested_at is None:
        waiting = _replayed(client, plan, run)
        if isinstance(waiting, Mismatch):
            raise _differs(plan, run_id, difference(waiting))


def check_goes_on(app: App, plan: Plan, run_id: str) -> None:
    """Raises AssertionError if a run was released, since this very plan cannot go on with it.

    Only this plan, as an object, has executed it, so that it is no matter of a deploy.
    """
    with app.engine.connect() as connection:
        dispatch = app.journal.dispatch_status(connection, run_id).dispatch
    # Whether a list knows a step depends on nothing that differs from call to call.
    reasons = (CHANGED_CALL, UNKNOWN_STEP) if isinstance(plan, FunctionPlan) else (CHANGED_CALL,)
    if dispatch is None or (reason := dispatch[2]) not in reasons:
        return
    told = why_it_waits(app.engine, app.journal, {plan.name: plan}, run_id)
    found = "an input of a child, or a form, differs" if told is None else difference(told)
    raise _differs(plan, run_id, f"{found} ({reason})")


def described(app: App, run_id: str) -> list[str]:
    """Lines about what keeps a run from going on with the plans, if a worker has noted that."""
    told = why_it_waits(app.engine, app.journal, app.plans, run_id)
    return [] if told is None else [f"  {told.message}: {told.advice}"]


def _replayed(client: Client, plan: FunctionPlan, run: Run) -> Said:
    return dry_replay(
        plan,
        run,
        client.events(run.run_id),
        lambda first, last: client.ends_of_children(run.run_id, first, last),
    )


def _differs(plan: Plan, run_id: str, found: str) -> AssertionError:
    return AssertionError(
        f"plan {plan.name} does not do the same when it is called again on what run {run_id} has "
        f"stored: {found}. {REPEATABLE}"
    )
