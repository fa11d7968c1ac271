"""Counts the stored runs that have ended, by queue, so that no reader has to.

A chore of the relay (`beatless.outbox.chores`). Few runs are counted by each reader instead, and
exactly: then nothing is noted.
"""

from collections import Counter
from typing import Any

import psycopg

from beatless.orchestrator.state import FINAL, RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements

FEW = 20_000
"""Ended runs up to which each reader counts them: some 10 ms."""

PAGE_RUNS = 20_000
"""Runs that one step counts."""

PAUSE_FACTOR = 9.0
"""A step is followed by a pause that is so many times as long."""

REST_FACTOR = 40.0
"""After all runs were counted, a rest that is so many times as long as their steps were."""

SHORTEST_REST_S = 60.0
"""Seconds of the shortest rest."""


class CountsEndedRuns:
    """Counts in steps of `PAGE_RUNS`, and begins anew when runs have ended since.

    The counts are those of a pass: at five million runs some minutes old.
    """

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, page_runs=PAGE_RUNS)
        self._newest_end: Any = None
        self._begin()

    def _begin(self) -> None:
        self._after = ""
        self._counts: Counter[tuple[str, str]] = Counter()
        self._took_s = 0.0

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Count a page, in one statement; seconds until the next step is worth while."""
        began = monotonic()
        if not self._after:
            ((newest_end,),) = execute(connection, self._sql["newest_end"], {})
            if newest_end == self._newest_end:
                return SHORTEST_REST_S
            self._newest_end = newest_end
        rows = execute(connection, self._sql["count_page"], {"after": self._after})
        for queue, state, count, _ in rows:
            self._counts[queue, state] += count
        full = sum(row[2] for row in rows) == PAGE_RUNS
        if not full:
            self._store(connection)
        took_s = monotonic() - began
        self._took_s += took_s
        if full:
            self._after = max(row[3] for row in rows)
            return PAUSE_FACTOR * took_s
        rest_s = max(SHORTEST_REST_S, REST_FACTOR * self._took_s)
        self._begin()
        return rest_s

    def _store(self, connection: psycopg.Connection[Any]) -> None:
        ended = {key: count for key, count in self._counts.items() if key[1] in FINAL}
        many = sum(ended.values()) > FEW
        queues = sorted({queue for queue, _ in ended}) if many else []
        counts = {
            state.value: [ended.get((queue, state.value), 0) for queue in queues]
            for state in (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)
        }
        execute(connection, self._sql["store"], {"queues": queues, **counts})
