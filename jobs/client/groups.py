"""Calls about groups of runs, for the whole fleet."""

from beatless.client.base import BaseClient
from beatless.client.requests import check_texts
from beatless.errors import BadRequest
from beatless.orchestrator.groups import GroupState, GroupStatements, problem_with_weight
from beatless.orchestrator.options import problem_with_key

MAX_LISTED = 1000
"""Groups that one call lists."""


class GroupCalls(BaseClient):
    """The groups of a namespace, and their weights."""

    def groups(self, *, queue: str | None = None) -> list[GroupState]:
        """The groups with unfinished runs or a weight, one for each queue; 1,000 at most.

        >>> run = client.start_run("checkout", {"order": 1}, group="tenant-7")
        >>> [(each.group, each.running, each.waiting) for each in client.groups(queue="default")]
        [('tenant-7', 0, 1)]
        """
        check_texts(queue=queue)
        statements = GroupStatements(self._journal.schema)
        return self._in_transaction(
            None,
            lambda caller: statements.list(
                caller, prefix=self._group_prefix, queue=queue, limit=MAX_LISTED
            ),
        )

    def set_group_weight(self, group: str, weight: int) -> None:
        """Give a group so many turns for one of a group with the weight 1, in all queues.

        From the next turn on, until it gets another; each has 1 at first. Raises BadRequest.

        >>> client.set_group_weight("tenant-7", 3)
        """
        if problem := problem_with_key(group):
            raise BadRequest("group", problem)
        if problem := problem_with_weight(weight):
            raise BadRequest("weight", problem)
        statements = GroupStatements(self._journal.schema)
        self._in_transaction(
            None, lambda caller: statements.set_weight(caller, self._group_prefix + group, weight)
        )

    @property
    def _group_prefix(self) -> str:
        """Of the names of groups as dispatches have them."""
        return f"{self._namespace}/"
