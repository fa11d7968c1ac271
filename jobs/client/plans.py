"""Calls over the plans of an app."""

from beatless.client.base import BaseClient
from beatless.orchestrator.declared_plans import DeclaredPlans


class PlanCalls(BaseClient):
    """The plans as they are stored for starts from SQL."""

    def apply_plans(self) -> list[str]:
        """Register the plans of this app for `start_run` of SQL: a part of the deploy.

        The names of those that it declares no more: a start of these from SQL is refused.

        >>> client.apply_plans()
        []
        """
        declared = DeclaredPlans(
            self._journal.schema, max_event_bytes=self._journal.max_event_bytes
        )
        return self._in_transaction(
            None,
            lambda caller: declared.declare(caller, self._plans.values(), app=self._app_name),
        )
