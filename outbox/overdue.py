"""Ends overdue runs from within a relay; the statement that does it is given from outside."""

import logging
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.clock import monotonic
from beatless.outbox.observer import DeadlinesExpired, Observer

logger = logging.getLogger(__name__)

OVERDUE_POLL_S = 1.0
"""Seconds between two looks for overdue runs: under load, and while one is held."""

EndOverdue = Callable[
    [psycopg.Connection[Any], Sequence[int], datetime | None], Sequence[tuple[str, str, str]]
]
"""Ends overdue runs of some shards, as of a time or now: of each its id, plan and queue."""


class OverdueRuns:
    """Runs that may reach their deadline while no worker has them."""

    def __init__(
        self, connection: psycopg.Connection[Any], end: EndOverdue | None, observer: Observer
    ) -> None:
        self.next_at = 0.0
        """When a run may be overdue, by the monotonic clock; infinity if none has a deadline."""
        self.looked_at = 0.0
        """When it was last looked for some, by the same clock."""
        self._connection = connection
        self._end = end
        self._observer = observer

    def schedule(self, seconds: float | None) -> float | None:
        """Note in how many seconds the next deadline is, and return when to look for it.

        None, of both, is for ever.
        """
        if self._end is None or seconds is None:
            self.next_at = math.inf
            return None
        # Runs still overdue are held, or their workers are ending them. Counted from the last look:
        # from now on, a relay that is woken more often would never look.
        now = monotonic()
        self.next_at = max(now + seconds, self.looked_at + OVERDUE_POLL_S)
        return max(0.0, self.next_at - now)

    def end(self, shards: Sequence[int], now: datetime | None = None) -> None:
        """End the runs that have reached their deadline and that no worker has.

        Raises psycopg.Error only when the session is lost.
        """
        if self._end is None:
            return
        self.looked_at = monotonic()
        try:
            ended = self._end(self._connection, shards, now)
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # Publishing must not wait for it.
            logger.warning(
                "overdue runs were not ended, will retry",
                extra={"action": "overdue_failed", "reason": str(error)},
            )
            return
        if ended:
            self._observer(DeadlinesExpired(runs=ended))
            logger.info(
                "runs without a worker ended at their deadline",
                extra={"action": "overdue", "runs": len(ended)},
            )
