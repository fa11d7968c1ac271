"""Fires the ticks of schedules from within a relay; what fires them is given from outside."""

import logging
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, LiteralString

import psycopg

from beatless.outbox.clock import monotonic
from beatless.outbox.observer import FiredTick, Observer, TicksFired

logger = logging.getLogger(__name__)

FIRST_SHARD = 0
"""The relay that leads it fires; the others stand by."""

STANDBY_S = 0.1
"""Seconds after which another relay fires a tick that the first one has not: it may be frozen."""

HELD_POLL_S = 1.0
"""Seconds between two looks while a schedule whose tick is due is held."""

Fire = Callable[[psycopg.Connection[Any], datetime | None], Sequence[FiredTick]]
"""Fires some of the ticks that are due, as of a time or now."""


class DueSchedules:
    """Schedules whose ticks may be due.

    A relay knows the time of the next tick from its last look ahead, and hears of changes, whether
    it sleeps or not: nothing polls.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        fire: Fire | None,
        next_tick_sql: LiteralString,
        observer: Observer,
    ) -> None:
        self._connection = connection
        self._fire = fire
        self._next_tick_sql = next_tick_sql
        self._observer = observer
        self._next_at = 0.0 if fire else math.inf
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
        if self._fire is None or seconds is None:
            self._next_at = math.inf
            return None
        now = monotonic()
        self._next_at = now + seconds
        # What was due before a look without success is held, or another relay is about it.
        if self._next_at <= self._fired_at and not self._progressed:
            self._next_at = self._fired_at + HELD_POLL_S
        if FIRST_SHARD not in shards:
            self._next_at += STANDBY_S
        return max(0.0, self._next_at - now)

    def look(self, shards: Sequence[int]) -> None:
        """Fire ticks that are due, and note when the next one is.

        Raises psycopg.Error only when the session is lost.
        """
        self.fire()
        try:
            row = self._connection.execute(self._next_tick_sql).fetchone()
        except psycopg.Error as error:
            self._put_off(error)
        else:
            self.plan_next(row[0] if row else None, shards)

    def expect_change(self) -> None:
        """One was stored or changed: its tick may come before the one that is known."""
        if self._fire is not None:
            self._next_at = 0.0

    def fire(self, now: datetime | None = None) -> int:
        """Fire ticks that are due; how many schedules have moved, but for those that replace a run.

        Raises psycopg.Error only when the session is lost.
        """
        if self._fire is None:
            return 0
        self._fired_at = monotonic()
        self._progressed = False
        self._next_at = self._fired_at + HELD_POLL_S
        try:
            fired = self._fire(self._connection, now)
        except psycopg.Error as error:
            self._put_off(error)
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

    def _put_off(self, error: psycopg.Error) -> None:
        """Publishing must not wait for it."""
        if self._connection.closed:
            raise error
        logger.warning(
            "ticks of schedules were not fired, will retry",
            extra={"action": "ticks_failed", "reason": str(error)},
        )
