"""Fires the ticks of schedules from within a relay; what fires them is given from outside."""

import logging
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.clock import monotonic
from beatless.outbox.observer import FiredTick, Observer, TicksFired

logger = logging.getLogger(__name__)

FIRST_SHARD = 0
"""The relay that leads it fires; the others stand by."""

STANDBY_S = 0.1
"""Seconds after which another relay fires a tick that the first one has not: it may be frozen."""

SCHEDULES_POLL_S = 1.0
"""Seconds between two looks of a relay that is never idle, and while a schedule is held."""

Fire = Callable[[psycopg.Connection[Any], datetime | None], Sequence[FiredTick]]
"""Fires some of the ticks that are due, as of a time or now."""


class DueSchedules:
    """Schedules whose ticks may be due.

    A relay that sleeps knows the time of the next tick from its last look ahead, and hears of
    changes. One that stays awake hears of none: it looks once in `SCHEDULES_POLL_S` as well.
    """

    def __init__(
        self, connection: psycopg.Connection[Any], fire: Fire | None, observer: Observer
    ) -> None:
        self._connection = connection
        self._fire = fire
        self._observer = observer
        self._next_at = 0.0 if fire else math.inf
        self.looked_at = 0.0
        """When it last learned of due ticks, by the monotonic clock."""
        self._fired_at = 0.0
        self._progressed = False

    @property
    def due(self) -> bool:
        """Whether it is time to `fire`, as far as it knows."""
        return monotonic() >= self._next_at

    def plan_next(self, seconds: float | None, shards: Sequence[int]) -> float | None:
        """Note in how many seconds the next tick is, and return when to look for it.

        None, of both, is for ever.
        """
        self.looked_at = now = monotonic()
        if self._fire is None or seconds is None:
            self._next_at = math.inf
            return None
        if FIRST_SHARD not in shards:
            seconds += STANDBY_S
        # What is still due after a look without success is held, or another relay is about it.
        pause_s = 0.0 if self._progressed else SCHEDULES_POLL_S
        self._next_at = max(now + seconds, self._fired_at + pause_s)
        return max(0.0, self._next_at - now)

    def fire(self, now: datetime | None = None) -> int:
        """Fire ticks that are due; how many schedules have moved, but for those that replace a run.

        Raises psycopg.Error only when the session is lost.
        """
        if self._fire is None:
            return 0
        self.looked_at = self._fired_at = monotonic()
        self._progressed = False
        self._next_at = self._fired_at + SCHEDULES_POLL_S
        try:
            fired = self._fire(self._connection, now)
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # Publishing must not wait for it.
            logger.warning(
                "ticks of schedules were not fired, will retry",
                extra={"action": "ticks_failed", "reason": str(error)},
            )
            return 0
        if fired:
            self._progressed = True
            self._next_at = 0.0
            self._observer(TicksFired(ticks=fired))
            logger.info(
                "ticks of schedules were fired",
                extra={"action": "ticks_fired", "ticks": len(fired)},
            )
        # One that waits for the end of that run would be due at a later `now` again and again.
        return sum(tick.outcome != "replacing" for tick in fired)
