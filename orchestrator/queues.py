"""Statements over queues, for the whole fleet: pause, resume, and the removal of runs.

The truth is in Postgres: the relay skips a paused queue and a worker's claim looks again, so the
few messages that the broker already holds start nothing. Functions take a connection and never
commit; `Queues` in `jobs` puts them together.
"""

import itertools
import logging
from dataclasses import asdict, dataclass, field
from datetime import datetime

from beatless.orchestrator.state import RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import Caller, channel_of, execute
from beatless.outbox.statements import statements

logger = logging.getLogger(__name__)

CLAIMS_POLL_S = 0.02
"""Seconds between two looks for claims that are in flight."""

PRESENCE_INTERVAL_S = 10.0
"""Seconds between two announcements of a worker's queues."""

PRESENCE_EXPIRES_S = 3 * PRESENCE_INTERVAL_S
"""After this without a word from it a worker is not counted any more."""

FROZEN_CLAIM_S = 10.0
"""Seconds after which a claim that is still in flight has nobody who would end it: it waits for a
row a tenth of that, see `lease.LOCK_TIMEOUT_S`."""


PAGE_RUNS = 1000
"""Runs that one transaction takes away."""

PAGE_EVENTS = 100_000
"""Events from which on a transaction takes no further run away."""

RECENT_ENDS = 1000
"""Ends within the last minute that are read to tell how many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue as it is now."""

    name: str
    paused_at: datetime | None
    queued: int
    """Due, and taken by no worker."""
    delayed: int
    """Due later: a delay, a retry, a snooze."""
    waiting: int
    """Parked at a wait of their plan: for a signal, or for a time."""
    active: int
    """Had by a worker."""
    completed: int
    failed: int
    cancelled: int
    oldest: datetime | None
    """Since when the run that waits the longest could have started, dispatched already or not."""
    per_minute: int
    """Runs that ended within the last minute."""
    workers: int
    """Workers that consume it now, busy or not."""
    age_after: float | None = None
    """Seconds after which a run that waits comes before those of a higher priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """One worker, with all of its processes."""

    worker: str
    """Never that of another one, before or after."""
    hostname: str
    """As Celery calls it."""
    queues: list[str]
    processes: int
    version: str
    failing: list[str] = field(default_factory=list)
    """Which of its threads have failed, and not worked since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerState:
    """One worker that announces its queues now."""

    hostname: str
    """As Celery calls it."""
    version: str
    queues: list[str]
    processes: int
    started_at: datetime
    failing: list[str]
    """Which of its threads have failed, and not worked since."""


class QueueStatements:
    """The statements of one schema over queues and the removal of runs."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(
            __file__,
            schema,
            claims_poll_s=CLAIMS_POLL_S,
            presence_expires_s=PRESENCE_EXPIRES_S,
            recent_ends=RECENT_ENDS,
            page_runs=PAGE_RUNS,
        )
        self._channel = channel_of(schema)

    def announce(self, connection: Caller, presence: Presence) -> None:
        """Announce that a worker consumes these queues, for the next `PRESENCE_EXPIRES_S`."""
        execute(connection, self._sql["announce"], asdict(presence))

    def withdraw(self, connection: Caller, presence: Presence) -> None:
        """Withdraw its announcement."""
        execute(connection, self._sql["withdraw"], {"worker": presence.worker})

    def pause(self, connection: Caller, name: str) -> None:
        """Claims whose snapshot starts after this commit skip the queue."""
        execute(connection, self._sql["pause"], {"name": name})

    def await_claims(self, connection: Caller, *, patience: float = FROZEN_CLAIM_S) -> None:
        """Wait for the claims that may have looked before: they hold the fence.

        Those that come meanwhile look afterwards, and are not held up: asking for the fence in
        exclusive mode, behind a worker that was frozen with it, would hold up the whole fleet. The
        session of such a one is ended after `patience` seconds; it can have written nothing.
        """
        deadline = monotonic() + patience
        before = self._in_flight(connection)
        while before:
            if monotonic() >= deadline:
                pids = [pid for pid, _ in before]
                ended = execute(connection, self._sql["end_sessions"], {"pids": pids})
                logger.warning(
                    "workers are frozen in the middle of a claim, their sessions are ended",
                    extra={"action": "claims_ended", "frozen": len(pids), "ended": len(ended)},
                )
                deadline = monotonic() + patience
            execute(connection, self._sql["pause_poll"], {})
            before &= self._in_flight(connection)

    def _in_flight(self, connection: Caller) -> set[tuple[int, str]]:
        """The transactions that hold the fence."""
        return {
            (pid, transaction)
            for pid, transaction in execute(connection, self._sql["claims_in_flight"], {})
        }

    def resume(self, connection: Caller, name: str) -> None:
        """Let the queue's runs be dispatched again, and wake the relays."""
        execute(connection, self._sql["resume"], {"name": name})
        execute(connection, self._sql["wake_relays"], {"c": self._channel})

    def set_age(self, connection: Caller, name: str, age_after_s: float | None) -> None:
        """From the next look of the relays on; None: priority alone orders its runs."""
        if age_after_s is None:
            execute(connection, self._sql["forget_age"], {"name": name})
            execute(connection, self._sql["forget_default"], {"name": name})
        else:
            values = {"name": name, "age_after_s": age_after_s}
            execute(connection, self._sql["set_age"], values)

    def is_known(self, connection: Caller, name: str) -> bool:
        """Whether the queue is paused, is consumed, or has runs, be it such that ended."""
        return bool(execute(connection, self._sql["is_known"], {"name": name})[0][0])

    def workers(self, connection: Caller) -> list[WorkerState]:
        """The workers that consume queues now; older versions do not announce theirs."""
        names = ("hostname", "version", "queues", "processes", "started_at", "failing")
        rows = execute(connection, self._sql["present_workers"], {})
        return [WorkerState(**dict(zip(names, row, strict=True))) for row in rows]

    def oldest_due(self, connection: Caller) -> list[tuple[str, float]]:
        """The seconds that the oldest due run of each queue has waited for a worker; 0 for none.

        A paused queue is left out: its runs wait because somebody wants it.
        """
        rows = execute(connection, self._sql["oldest_due"], {})
        return [(queue, seconds or 0.0) for queue, seconds in rows]

    def states(self, connection: Caller, *, ended: bool = True) -> list[QueueState]:
        """Every queue that has runs, ended ones too, that was paused or set, or that is consumed.

        Without `ended` those that have ended are not counted. Many of these are counted by a relay
        beforehand: see `beatless.orchestrator.ended_runs`.
        """
        names = (
            "name",
            "paused_at",
            "queued",
            "delayed",
            "waiting",
            "active",
            "oldest",
            "workers",
            "completed",
            "failed",
            "cancelled",
            "per_minute",
            "age_after",
        )
        return [
            QueueState(**dict(zip(names, row, strict=True)))
            for row in execute(connection, self._sql["states"], {"ended": ended})
        ]

    def remove_waiting(self, connection: Caller, queue: str) -> list[str]:
        """Take away the queue's runs that no worker has."""
        return self._removed(connection, self._sql["lock_waiting"], {"queue": queue})

    def remove_unfinished(
        self, connection: Caller, queue: str, *, force: bool
    ) -> tuple[list[str], int]:
        """Take away the runs of the queue that have not ended: (those removed, those running).

        Without `force` nothing is removed while a run of it is running, even if its worker is lost.
        """
        if not force:
            # Refused without a lock where possible: heartbeats would wait for ours.
            running = execute(connection, self._sql["running"], {"queue": queue})[0][0]
            if running:
                return [], running
        chosen = execute(connection, self._sql["lock_unfinished"], {"queue": queue})
        running = sum(state == RunState.RUNNING for _, state, _ in chosen)
        if running and not force:
            return [], running
        return self._remove_runs(connection, [run_id for run_id, *_ in chosen]), running

    def remove_rest(self, connection: Caller, queue: str) -> list[str]:
        """Take away some runs of the queue that have ended; none when there are none."""
        return self._removed(connection, self._sql["lock_rest"], {"queue": queue})

    def forget(self, connection: Caller, queue: str) -> None:
        """Take away the queue itself; a run of it that was started meanwhile is dispatched."""
        execute(connection, self._sql["forget_count"], {"queue": queue})
        execute(connection, self._sql["forget_age"], {"name": queue})
        self.resume(connection, queue)

    def remove_finished(
        self, connection: Caller, *, state: str, seconds: float, limit: int, namespace: str
    ) -> list[str]:
        """Take away some runs that ended in this state so many seconds ago, oldest end first.

        No more than `limit`; fewer if they have many events. None when there are none.
        """
        return self._removed(
            connection,
            self._sql["lock_ended"],
            {"state": state, "seconds": seconds, "limit": limit, "namespace": namespace},
        )

    def count_finished(
        self, connection: Caller, *, state: str, seconds: float, namespace: str
    ) -> tuple[int, int]:
        """(runs, events) that `remove_finished` would take away without a limit."""
        rows = execute(
            connection,
            self._sql["count_ended"],
            {"state": state, "seconds": seconds, "namespace": namespace, "limit": None},
        )
        return rows[0][0], rows[0][1]

    def remove_run(self, connection: Caller, run_id: str, *, namespace: str) -> bool:
        """Take away one run that no worker has; False if there is none or it is running."""
        return bool(
            self._removed(
                connection,
                self._sql["lock_run"],
                {"run_id": run_id, "namespace": namespace},
            )
        )

    def _removed(
        self, connection: Caller, choose: str, parameters: dict[str, str | float | int]
    ) -> list[str]:
        chosen = execute(connection, choose, parameters)
        before = itertools.accumulate((events for *_, events in chosen), initial=0)
        some = [row[0] for row, events in zip(chosen, before, strict=False) if events < PAGE_EVENTS]
        return self._remove_runs(connection, some)

    def _remove_runs(self, connection: Caller, run_ids: list[str]) -> list[str]:
        return [row[0] for row in execute(connection, self._sql["remove"], {"run_ids": run_ids})]
