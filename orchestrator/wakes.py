"""Wakes runs that wait, for a relay. Senders of signals note which runs are to be woken."""

from collections.abc import Sequence
from typing import Any

import psycopg

from beatless.orchestrator.children import CancelsChildren
from beatless.orchestrator.state import WAITS
from beatless.orchestrator.successors import Successors
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.waking import Woken

BATCH = 200
"""Notes of one shard that one statement looks at."""


class Wakes:
    """Wakes the runs of a relay's shards. Its statements wait for no row."""

    def __init__(self, schema: str, children: CancelsChildren) -> None:
        self._children = children
        self._successors = Successors(schema)
        self._sql = statements(__file__, schema, batch=BATCH, reason=WAITS)

    def wake(self, connection: psycopg.Connection[Any], shards: Sequence[int]) -> Woken:
        """Make the runs due that wait and were to be woken, or whose predecessors have ended.

        And cancel children of those that ended, and let in runs that wait for a limit with room.
        """
        done = left = 0
        aside: list[str] = []
        while True:
            parameters = {"shards": list(shards), "aside": aside}
            ((found, gone, held, cancels, ends, limits),) = execute(
                connection, self._sql["wake"], parameters
            )
            done, left = done + gone, left + found - gone
            if not held or found < BATCH:
                break
            aside += held  # whose notes may have filled the batch: others stand behind them
        if cancels:
            cancelled = self._children.step(connection, shards)
            done, left = done + cancelled.done, left + cancelled.left
        if ends:
            begun = self._successors.begin(connection, shards)
            done, left = done + begun.done, left + begun.left
        if limits:
            parameters = {"shards": list(shards)}
            ((found, kept),) = execute(connection, self._sql["look_at_limits"], parameters)
            done, left = done + found - kept, left + kept
        return Woken(done=done, left=left)
