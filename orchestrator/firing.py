"""Fires the ticks of schedules, for a relay. Postgres tells the time."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable

from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.schedule import CatchUp, problem_with_jitter
from beatless.orchestrator.ticks import Ticks, jitter_s, problem_with_every, tick_key
from beatless.outbox.faults import CrashPoints
from beatless.outbox.message import shard_of
from beatless.outbox.observer import FiredTick
from beatless.outbox.quarantine import is_row_fault
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements

logger = logging.getLogger("beatless.schedules")

BATCH = 200
"""Schedules that one statement fires."""

GRACE_S = 60.0
"""Seconds after which a tick that nobody has fired counts as missed."""

REPLACING_S = 1.0
"""Seconds between two looks whether the run that is to be replaced has ended."""

HELD_KEY_WAIT_S = 0.05
"""Seconds for which a tick waits for a transaction that has stored a run with its key."""

REPLACED = "a later tick of its schedule replaces it"
"""The reason of the cancel of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """A schedule whose tick is due, as it was read."""

    namespace: str
    name: str
    version: int
    ticks: Ticks
    catch_up: CatchUp
    jitter: float
    tick: datetime
    late_s: float
    replacing: bool
    """The tick has come in time, and waits for the end of the run that it replaces."""

    def _jitter_s(self, tick: datetime | None) -> float:
        return jitter_s(self.name, tick, self.jitter) if tick else 0.0

    def _last_missed(self, until: datetime) -> datetime:
        """The last tick that was due by then. One that jitter puts off for longer is not missed."""
        surely = max(self.tick, until - timedelta(seconds=self.jitter))
        found = self.ticks.last(surely, since=self.tick)
        if self.jitter:
            least = timedelta(microseconds=1)
            for tick in self.ticks.between(found + least, until + least):
                if tick + timedelta(seconds=self._jitter_s(tick)) <= until:
                    found = tick
        return found

    def next(self, new_run_id: Callable[[str], str]) -> dict[str, Any]:
        """The tick to fire, if any, and the one after it.

        Times are counted from the tick that is stored, not from its due time: a test kit moves
        that one, and none of the names of ticks.
        """
        tick, fires = self.tick, True
        if self.late_s > GRACE_S and self.catch_up is not CatchUp.ALL:
            grace = timedelta(seconds=self.late_s + self._jitter_s(tick) - GRACE_S)
            tick = self._last_missed(self.tick + grace)
            fires = self.catch_up is CatchUp.ONE or self.replacing
        following = self.ticks.after(tick)
        move_s = None
        if following is not None:
            move_s = (
                (following - self.tick).total_seconds()
                + self._jitter_s(following)
                - self._jitter_s(self.tick)
            )
        run_id = new_run_id(self.namespace)
        return {
            "namespace": self.namespace,
            "name": self.name,
            "version": self.version,
            "fires": fires,
            "tick": tick.isoformat(),
            "next_tick": following.isoformat() if following else None,
            "move_s": move_s,
            "late_s": self.late_s - (tick - self.tick).total_seconds(),
            "run_id": run_id,
            "shard": shard_of(run_id),
            "key": tick_key(self.name, tick),
        }


class Firing:
    """Fires the due ticks of one schema. Its statements wait for no row.

    1. read the schedules that are due, by index
    2. for each, decide which tick is fired, and which comes next
    3. start their runs and move the schedules, in one statement
    4. if that fails, do each alone: one that cannot be written is stopped, one whose key another
       transaction may have waits for the next look, the others go on
    """

    def __init__(
        self,
        schema: str,
        cancels: Cancels,
        *,
        undo: Mapping[str, str | None],
        new_run_id: Callable[[str], str],
        faults: CrashPoints,
    ) -> None:
        """`undo` has each plan's `on_cancel` step; `new_run_id` makes an id for a namespace."""
        self._sql = statements(
            __file__,
            schema,
            batch=BATCH,
            replacing_s=REPLACING_S,
            held_key_wait_ms=round(HELD_KEY_WAIT_S * 1000),
            **{
                name: text
                for name, text in OPTION_SQL.items()
                if name not in ("option_parameters", "run_options")
            },
        )
        self._cancels = cancels
        self._undo = undo
        self._new_run_id = new_run_id
        self._faults = faults

    def fire(
        self, connection: psycopg.Connection[Any], now: datetime | None
    ) -> Sequence[FiredTick]:
        """Fire what is due, or was due at `now`: no more than `BATCH` schedules, a tick of each."""
        rows = execute(connection, self._sql["due"], {"now": now})
        ticks, failed = [], []
        for namespace, name, version, *members in rows:
            cron, every, tz, catch_up, jitter, tick, late_s, replacing = members
            try:
                _check_row(every, jitter)
                due = _Due(
                    namespace=namespace,
                    name=name,
                    version=version,
                    ticks=Ticks(cron=cron, every_s=every, tz=tz),
                    catch_up=CatchUp(catch_up),
                    jitter=jitter,
                    tick=tick.astimezone(UTC),
                    late_s=late_s,
                    replacing=replacing,
                )
                ticks.append(due.next(self._new_run_id))
            except Exception as error:
                # Any error: a time zone that this machine lacks must not stop the others.
                failed.append(self._stop(connection, namespace, name, version, error))
        if not ticks:
            return [each for each in failed if each]
        self._faults.reach("schedule.before")
        try:
            fired = self._fire(connection, ticks)
        except psycopg.Error as error:
            if connection.closed or not (
                is_row_fault(error) or isinstance(error, LockNotAvailable)
            ):
                raise
            fired = self._fire_each(connection, ticks)
        self._faults.reach("schedule.fired")
        return [*fired, *(each for each in failed if each)]

    def _fire_each(
        self, connection: psycopg.Connection[Any], ticks: Sequence[dict[str, Any]]
    ) -> list[FiredTick]:
        fired: list[FiredTick] = []
        for tick in ticks:
            try:
                fired += self._fire(connection, [tick])
            except LockNotAvailable:
                continue
            except psycopg.Error as error:
                if connection.closed or not is_row_fault(error):
                    raise
                stopped = self._stop(
                    connection, tick["namespace"], tick["name"], tick["version"], error
                )
                fired += [stopped] if stopped else []
        return fired

    def _fire(
        self, connection: psycopg.Connection[Any], ticks: Sequence[dict[str, Any]]
    ) -> list[FiredTick]:
        found = []
        for id, namespace, name, outcome, late_s, run_id, plan, queue, key, _ in execute(
            connection, self._sql["fire"], {"ticks": json.dumps(ticks)}
        ):
            if outcome == "replacing":
                self._cancel_runs(connection, id)
            if outcome == "conflict":
                _log_stopped(namespace, name, f"the key {key} is used by another run")
            found.append(
                FiredTick(
                    namespace=namespace,
                    schedule=name,
                    outcome="failed" if outcome == "conflict" else outcome,
                    late_s=late_s,
                    run_id=run_id if outcome == "started" else None,
                    plan=plan,
                    queue=queue,
                )
            )
        return found

    def _cancel_runs(self, connection: psycopg.Connection[Any], id: int) -> None:
        """Cancel what is to be replaced. Repeated with each look: a cancel is stored once."""
        with connection.transaction():
            rows = execute(connection, self._sql["lock_unfinished"], {"id": id})
            if rows:
                run_ids = [run_id for (run_id,) in rows]
                self._cancels.cancel(
                    connection, run_ids, reason=REPLACED, undo=self._undo, source="relay"
                )

    def _stop(
        self,
        connection: psycopg.Connection[Any],
        namespace: str,
        name: str,
        version: int,
        error: Exception,
    ) -> FiredTick | None:
        reason = f"{type(error).__name__}: {error}"[:1000].replace("\0", "")
        parameters = {"namespace": namespace, "name": name, "version": version, "reason": reason}
        if not execute(connection, self._sql["stop"], parameters):
            return None
        _log_stopped(namespace, name, reason)
        return FiredTick(
            namespace=namespace,
            schedule=name,
            outcome="failed",
            late_s=0.0,
            run_id=None,
            plan=None,
            queue=None,
        )


def _check_row(every: Any, jitter: Any) -> None:
    """Raises ValueError for numbers by which ticks would be counted without end.

    A cron expression or a zone that is none raises by itself.
    """
    problem = problem_with_every(every) if every is not None else ""
    if problem:
        raise ValueError(f"every {problem}")
    if jitter and (problem := problem_with_jitter(jitter, every)):
        raise ValueError(f"jitter {problem}")


def _log_stopped(namespace: str, name: str, reason: str) -> None:
    logger.error(
        "a tick could not be written: its schedule is stopped, others go on",
        extra={
            "action": "schedule_stopped",
            "schedule": name,
            "namespace": namespace,
            "reason": reason,
        },
    )
