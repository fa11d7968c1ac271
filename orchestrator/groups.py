"""Groups of runs as they stand: those that wait and run, and the weights that a person has set."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements

WEIGHTS = range(1, 101)


def problem_with_weight(given: Any) -> str:
    """The problem with a weight."""
    if isinstance(given, int) and not isinstance(given, bool) and given in WEIGHTS:
        return ""
    return f"is {given!r:.200}: give a whole number, {WEIGHTS[0]} to {WEIGHTS[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """One group in one queue.

    >>> app.client.set_group_weight("tenant-7", 3)
    >>> run = app.client.start_run("checkout", {"order": 1}, group="tenant-7")
    >>> [(each.group, each.queue, each.weight, each.waiting) for each in app.client.groups()]
    [('tenant-7', 'default', 3, 1)]
    """

    group: str
    queue: str | None
    """None if the group has a weight, and no unfinished run."""
    weight: int
    """Turns that it has for one of a group with the weight 1."""
    running: int
    """Runs that a worker has."""
    waiting: int
    """Runs that wait for a worker, in the broker or for their turn; none that is due later."""
    oldest: datetime | None
    """Since when the one waits that has waited for its turn the longest."""


class GroupStatements:
    """The statements over groups of one schema."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema)

    def list(
        self, connection: Caller, *, prefix: str, queue: str | None, limit: int
    ) -> list[GroupState]:
        """Those with unfinished runs or a weight, of the namespace with this prefix of ids."""
        values = {"prefix": prefix, "queue": queue, "limit": limit}
        return [
            GroupState(
                group=group,
                queue=queue,
                weight=weight,
                running=running,
                waiting=waiting,
                oldest=oldest,
            )
            for group, queue, weight, running, waiting, oldest in execute(
                connection, self._sql["list"], values
            )
        ]

    def set_weight(self, connection: Caller, group_id: str, weight: int) -> None:
        """From the next turn on; a weight of 1 is not stored."""
        values = {"group_id": group_id, "weight": weight}
        execute(connection, self._sql["forget"] if weight == 1 else self._sql["set"], values)
