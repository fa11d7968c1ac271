"""Ends runs that have reached their deadline while no worker has them: the relay's part of it.

A worker that has a run ends it itself, in the middle of a step if need be. But a run may wait for a
worker that never comes: its queue is paused or has no consumer, or no worker knows its plan.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.queries import execute
from beatless.outbox.statements import statements

BATCH = 100
"""Runs that one statement ends."""

ADOPTED = 1000
"""Dispatches that one step of `AdoptsDeadlines` looks at."""

REST_S = 3600.0
"""Until the next look for deadlines that processes of an older version have not noted."""

EASE_S = 0.2
"""Between two steps of a look."""


class Deadlines:
    """Ends overdue runs for a relay. One statement, which waits for no row."""

    def __init__(self, schema: str) -> None:
        self._sql = _statements(schema)

    def end(
        self, connection: psycopg.Connection[Any], shards: Sequence[int], now: datetime | None
    ) -> list[tuple[str, str, str]]:
        """End the runs of these shards that are overdue: of each its id, plan and queue.

        One that has begun a step that is to be undone is due for a worker instead.

        No more than `BATCH`; those that another transaction holds are for the next time.
        """
        parameters = {"shards": list(shards), "now": now}
        return execute(connection, self._sql["end"], parameters)


class AdoptsDeadlines:
    """A chore: notes the deadlines of runs that an older version has started."""

    def __init__(self, schema: str) -> None:
        self._after = ""
        self._sql = _statements(schema)

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Look at some of the unfinished runs; seconds until the next step."""
        found = [row[0] for row in execute(connection, self._sql["scan"], {"after": self._after})]
        if found:
            execute(connection, self._sql["adopt"], {"run_ids": found})
        self._after = found[-1] if len(found) == ADOPTED else ""
        return EASE_S if self._after else REST_S


def _statements(schema: str) -> dict[str, str]:
    return statements(__file__, schema, batch=BATCH, adopted=ADOPTED)
