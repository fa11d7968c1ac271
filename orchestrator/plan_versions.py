"""The order of the steps in each version of a plan, as a schema keeps it. Commits nothing.

A run's row names the version that it was started with, by a hash. Deploys and workers store what is
behind that name; it never changes. Of a plan that is a function there is nothing to store.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import Run
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements


class PlanVersions:
    """The statements of one schema over versions of plans."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema)
        self._known: dict[tuple[str, str], Sequence[str]] = {}

    def store(self, connection: Caller, plans: Iterable[Plan]) -> None:
        """Store the order of the steps of these plans, unless it is known."""
        orders = [
            {"plan": plan.name, "version": plan.version, "steps": plan.names}
            for plan in plans
            if not isinstance(plan, FunctionPlan)
        ]
        if orders:
            execute(connection, self._sql["store"], {"orders": json.dumps(orders)})

    def steps(self, connection: Caller, plan: Plan, version: str) -> Sequence[str] | None:
        """The names of the steps and waits of a version, in order; None if nobody has stored it."""
        if version == plan.version:
            return plan.names
        found = self._known.get((plan.name, version))
        if found is None:
            named = {"plan": plan.name, "plan_version": version}
            for (steps,) in execute(connection, self._sql["steps"], named):
                found = self._known[plan.name, version] = _names(steps)
        return found

    def reader(self, plan: Plan, run: Run) -> Callable[[Caller], Sequence[str] | None]:
        """Reads `steps` of the version that this run was started with."""
        return lambda connection: self.steps(connection, plan, run.plan_version)

    def known(self, connection: Caller) -> Mapping[str, Mapping[str, Sequence[str]]]:
        """All that is stored: the names of the steps by plan and version."""
        found: dict[str, dict[str, Sequence[str]]] = {}
        for plan, version, steps in execute(connection, self._sql["known"], {}):
            found.setdefault(plan, {})[version] = _names(steps)
        return found


def _names(stored: Any) -> Sequence[str]:
    """None, if somebody has written something else with SQL."""
    return [each for each in stored if isinstance(each, str)] if isinstance(stored, list) else []
