"""Calls over the plans of an app."""

from beatless.client.base import BaseClient
from beatless.orchestrator.declared_plans import DeclaredPlans
from beatless.orchestrator.plan_versions import PlanVersions
from beatless.outbox.queries import Caller


class PlanCalls(BaseClient):
    """The plans as they are stored for starts from SQL."""

    def apply_plans(self) -> list[str]:
        """Register the plans of this app for `start_run` of SQL: a part of the deploy.

        The order of their steps is stored too, for versions in which it is another one.

        The names of those that it declares no more: a start of these from SQL is refused.

        >>> client.apply_plans()
        []
        """
        declared = DeclaredPlans(
            self._journal.schema, max_event_bytes=self._journal.max_event_bytes
        )
        versions, plans = PlanVersions(self._journal.schema), self._plans.values()

        def apply(caller: Caller) -> list[str]:
            versions.store(caller, plans)
            return declared.declare(caller, plans, app=self._app_name)

        return self._in_transaction(None, apply)
