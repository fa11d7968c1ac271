"""The whole work on a claimed run: that of its kind of plan, then that of undoing it."""

from collections.abc import Mapping
from typing import Any

from beatless.orchestrator.execution import Execution
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.list_execution import ListExecution, ReadSteps
from beatless.orchestrator.parallel_execution import ParallelExecution
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.requests import Requests
from beatless.orchestrator.undo_execution import UndoExecution


def requests_of(
    plan: Plan,
    lease: Lease,
    *,
    plans: Mapping[str, Plan],
    read_steps: ReadSteps,
    **options: Any,
) -> Requests:
    """All that is to be done. Children of the run are runs of `plans`; see `Execution`."""
    execution: Execution
    if isinstance(plan, FunctionPlan):
        execution = ParallelExecution(plan, lease, plans=plans, **options)
    else:
        execution = ListExecution(plan, lease, plans=plans, read_steps=read_steps, **options)
    yield from execution.requests()
    if execution.undoes:
        yield from UndoExecution(plan, lease, **options).requests()
