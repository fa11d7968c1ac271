"""Takes away the journals of runs that ended long ago, and later those runs. Nothing unfinished.

A chore of the relay (`beatless.outbox.chores`): due runs are found by index, a step is one small
transaction, and between two steps the database rests.
"""

import logging
from typing import Any

import psycopg

from beatless.outbox.clock import monotonic
from beatless.outbox.faults import CrashPoints
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements

logger = logging.getLogger(__name__)

DAY_S = 86_400.0

REST_S = 3600.0
"""Seconds between two looks while nothing is due."""

SHORT_REST_S = 60.0
"""Seconds until the next look after one that found nothing to do, though something is due soon."""

PAUSE_FACTOR = 4.0
"""A step is followed by a pause that is so many times as long: a fifth of one session is used."""


class Retention:
    """Prunes in steps of at most `batch` rows. Two at once pass over each other's runs.

    1. lock the runs that ended longest ago, long enough ago, passing over locked ones
    2. delete their first events, and note on each run up to which seq; RunFinished goes last
    3. when no events are due, delete the runs whose events have gone long enough ago
    """

    def __init__(
        self,
        schema: str,
        *,
        events_days: float,
        runs_days: float,
        batch: int = 1000,
        faults: CrashPoints | None = None,
    ) -> None:
        """`events_days` counts from a run's end, `runs_days` from its pruning.

        0 keeps them for ever, and with its events a run.
        """
        self._faults = faults or CrashPoints()
        self._parameters = {
            "events": events_days * DAY_S,
            "runs": runs_days * DAY_S,
            "batch": batch,
        }
        self._keeps_runs = runs_days == 0
        self._since: Any = None
        self._events = self._runs = 0
        self._sql = statements(__file__, schema, rest_s=REST_S)

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Remove one batch, in one transaction; seconds until the next step is worth while."""
        if not self._parameters["events"]:
            return REST_S
        began = monotonic()
        with connection.transaction():
            events, since = self._prune_events(connection)
            runs = 0
            if not events and not self._keeps_runs:
                runs = len(execute(connection, self._sql["forget"], self._parameters))
        self._events, self._runs, self._since = self._events + events, self._runs + runs, since
        if events or runs:
            return PAUSE_FACTOR * (monotonic() - began)
        if self._events or self._runs:
            logger.info(
                "retention removed ended runs",
                extra={"action": "retention", "events": self._events, "runs": self._runs},
            )
        self._since, self._events, self._runs = None, 0, 0
        (due,) = execute(connection, self._sql["next_due"], self._parameters)[0]
        return REST_S if due is None else min(REST_S, max(SHORT_REST_S, due))

    def _prune_events(self, connection: psycopg.Connection[Any]) -> tuple[int, Any]:
        """The number removed, and the time from which to look next."""
        rows = execute(connection, self._sql["lock_due"], self._parameters | {"since": self._since})
        if not rows:
            return 0, self._since
        execute(
            connection,
            self._sql["prune"],
            {
                "run_ids": [row[0] for row in rows],
                "above": [row[1] for row in rows],
                "upto": [row[2] for row in rows],
            },
        )
        self._faults.reach("retention.pruned")
        return sum(row[2] - row[1] for row in rows), rows[-1][4]
