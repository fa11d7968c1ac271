"""Registers the plans of an app for starts from SQL. Takes a connection and never commits.

The function `start_run` of the schema reads what is stored here; it is in the migrations.
"""

import json
from collections.abc import Iterable

from beatless.orchestrator.events import encode
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.limit import limits_of
from beatless.orchestrator.plan import INPUT_BYTES, Plan
from beatless.orchestrator.typed_input import Untyped
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements


def problem_with_sql(plan: Plan) -> str | None:
    """Why runs of this plan cannot be started from SQL; None if they can be."""
    if isinstance(plan, FunctionPlan) and not isinstance(plan.input, Untyped):
        return "its input has a type, which Python checks"
    for limit in plan.limits:
        if callable(limit.key):
            return f"the key of its limit {limit.name} is a function of Python"
    return None


class DeclaredPlans:
    """The statements of one schema over declared plans."""

    def __init__(self, schema: str, *, max_event_bytes: int) -> None:
        self._sql = statements(__file__, schema)
        self._max_event_bytes = max_event_bytes

    def declare(self, connection: Caller, plans: Iterable[Plan], *, app: str) -> list[str]:
        """Store the plans of an app; the names of those that it declares no more."""
        parameters = {
            "registered": f"[{','.join(map(_as_json, plans))}]",
            "app": app,
            "max_event_bytes": self._max_event_bytes,
        }
        return [name for (name,) in execute(connection, self._sql["declare"], parameters)]


def _as_json(plan: Plan) -> str:
    """The members of a plan as the statement reads them."""
    refused = problem_with_sql(plan)
    limits = [] if refused else limits_of(plan.limits, None, prefix="")
    members = {
        "name": plan.name,
        "version": plan.version,
        "queue": plan.queue,
        "limits": [each.to_dict() for each in limits] or None,
        "refused": refused,
    }
    default = encode(plan.default_input, where=plan.name, limit=INPUT_BYTES)
    return f'{json.dumps(members)[:-1]},"default_input":{default}}}'
