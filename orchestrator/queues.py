"""What is said about queues, for the whole fleet: pause, resume, and taking runs away.

The truth is in Postgres: the relay skips a paused queue and a worker's claim looks again, so the
few messages that the broker already holds start nothing. Functions take a connection and never
commit; `Queues` in `jobs` puts them together.
"""

import logging
from dataclasses import asdict, dataclass, field
from datetime import datetime

from beatless.orchestrator.state import RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import Caller, channel_of, execute

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.02
"""Seconds between two looks for claims that are in flight."""

PRESENCE_INTERVAL_S = 10.0
"""Between two times that a worker tells what it consumes."""

PRESENCE_EXPIRES_S = 3 * PRESENCE_INTERVAL_S
"""After this without a word from it a worker is not counted any more."""

FROZEN = 10.0
"""Seconds after which a claim that is still in flight has nobody who would end it: it waits for a
row a tenth of that, see `lease.PATIENCE`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue as it is now."""

    name: str
    paused_at: datetime | None
    waiting: int
    delayed: int
    """Waiting for a later time: a delay, a retry, a snooze."""
    active: int
    completed: int
    failed: int
    cancelled: int
    oldest: datetime | None
    """Since when the run that waits the longest could have started, dispatched already or not."""
    per_minute: int
    """Runs that ended within the last minute."""
    workers: int
    """Workers that consume it now, busy or not."""


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
    """One worker that tells now what it consumes."""

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
        s = schema
        self._channel = channel_of(schema)
        fence = f"'{s}.queues'::regclass::oid"
        self.claim_fence = f"pg_advisory_xact_lock_shared({fence}::int4, 0)"
        self._claims = f"""
SELECT pid, virtualtransaction FROM pg_locks
 WHERE locktype = 'advisory' AND classid = {fence} AND objid = 0 AND objsubid = 2 AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
        self._end = """
SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
 WHERE pid = ANY(%(pids)s) AND usename = current_user"""
        self._pause = f"""
INSERT INTO {s}.queues (name, paused_at) VALUES (%(name)s, clock_timestamp())
ON CONFLICT (name) DO UPDATE SET paused_at = excluded.paused_at WHERE queues.paused_at IS NULL"""
        self._resume = f"DELETE FROM {s}.queues WHERE name = %(name)s"
        self._states = f"""
WITH unfinished AS (
  SELECT d.queue, count(*) FILTER (WHERE d.state <> 'running' AND d.due_at <= clock_timestamp()
                                      OR d.state = 'sent') AS waiting,
         count(*) FILTER (WHERE d.state IN ('waiting', 'delayed') AND d.due_at > clock_timestamp())
           AS delayed,
         count(*) FILTER (WHERE d.state = 'running') AS active,
         -- What was sent is due again at its redispatch: its run knows since when it waits. There
         -- are few of them, whatever the backlog.
         least(min(d.due_at) FILTER (WHERE d.state IN ('waiting', 'delayed')
                                   AND d.due_at <= clock_timestamp()),
               min((SELECT CASE r.state WHEN 'queued' THEN coalesce(r.not_before, r.created_at)
                                        ELSE r.lease_expires_at END
                      FROM {s}.runs r WHERE r.run_id = d.run_id))
                 FILTER (WHERE d.state = 'sent')) AS oldest,
         count(DISTINCT (SELECT worker FROM {s}.runs r
                          WHERE r.run_id = d.run_id AND r.state = 'running'))
           FILTER (WHERE d.state = 'running') AS executing
    FROM {s}.dispatches d GROUP BY d.queue
), consumed AS (
  SELECT name AS queue, count(*) AS workers FROM {s}.workers CROSS JOIN unnest(queues) AS name
   WHERE seen_at > clock_timestamp() - make_interval(secs => {PRESENCE_EXPIRES_S}) GROUP BY name
), ended AS (
  SELECT queue, count(*) FILTER (WHERE state = 'completed') AS completed,
         count(*) FILTER (WHERE state = 'failed') AS failed,
         count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
         count(*) FILTER (WHERE finished_at > clock_timestamp() - interval '1 minute')
           AS per_minute
    FROM {s}.runs WHERE %(ended)s AND finished_at IS NOT NULL GROUP BY queue
)
SELECT name, q.paused_at, coalesce(waiting, 0), coalesce(delayed, 0), coalesce(active, 0),
       -- Those of older versions do not tell: then the processes that execute count.
       oldest, coalesce(workers, executing, 0),
       coalesce(completed, 0), coalesce(failed, 0), coalesce(cancelled, 0), coalesce(per_minute, 0)
  FROM (SELECT name FROM {s}.queues UNION SELECT queue FROM unfinished
        UNION SELECT queue FROM ended) AS known(name)
  LEFT JOIN consumed c ON c.queue = name
  LEFT JOIN {s}.queues q USING (name)
  LEFT JOIN unfinished u ON u.queue = name LEFT JOIN ended e ON e.queue = name
 ORDER BY name"""
        self._announce = f"""
WITH gone AS (
  DELETE FROM {s}.workers WHERE seen_at < clock_timestamp() - interval '1 day'
)
INSERT INTO {s}.workers AS w (worker, hostname, queues, processes, version, failing)
VALUES (%(worker)s, %(hostname)s, %(queues)s, %(processes)s, %(version)s, %(failing)s)
ON CONFLICT (worker) DO UPDATE
   SET queues = excluded.queues, processes = excluded.processes, failing = excluded.failing,
       seen_at = clock_timestamp()"""
        self._present = f"""
SELECT hostname, version, queues, processes, started_at, failing FROM {s}.workers
 WHERE seen_at > clock_timestamp() - make_interval(secs => {PRESENCE_EXPIRES_S})
 ORDER BY hostname, started_at"""
        self._withdraw = f"DELETE FROM {s}.workers WHERE worker = %(worker)s"
        # The runs' rows are locked first, as every writer does, so a claim comes before or finds
        # nothing. In a statement of its own: what the writers before us have appended is not in the
        # snapshot of the statement that waited for them.
        self._choose = (
            f"SELECT run_id, state FROM {s}.runs WHERE {{which}} ORDER BY run_id FOR UPDATE"
        )
        # By their dispatches, as unfinished runs are found: the history is not read.
        self._waiting = f"""state = 'queued' AND run_id = ANY(ARRAY(
  SELECT run_id FROM {s}.dispatches WHERE state = 'waiting' AND queue = %(queue)s
  UNION ALL
  SELECT run_id FROM {s}.dispatches WHERE state <> 'waiting' AND queue = %(queue)s))"""
        # A run that runs is out, whatever its dispatch says: its takeover may be on its way.
        self._running = f"""
SELECT count(*) FROM {s}.dispatches d JOIN {s}.runs r USING (run_id)
 WHERE d.queue = %(queue)s AND d.state <> 'waiting' AND r.state = 'running'"""
        # The runs of a namespace that ended in a state so long ago: by their last event or, when it
        # is pruned, by the time of that. The time is a subquery: compared with a volatile function,
        # all runs would be read. Row by row, by LIMIT, and by lists: right after many runs have
        # ended the planner knows nothing of them, and would join by reading all.
        ago = "(SELECT clock_timestamp() - make_interval(secs => %(seconds)s))"
        mine = "r.namespace = %(namespace)s AND r.state = %(state)s"
        self._ended = f"""
(SELECT r.run_id, r.last_seq - r.pruned_seq AS events FROM {s}.runs r
  WHERE r.pruned_at IS NOT NULL AND r.finished_at < {ago} AND {mine}
  ORDER BY r.pruned_at LIMIT %(limit)s)
UNION ALL
(SELECT r.run_id, r.last_seq - r.pruned_seq FROM {s}.run_events e CROSS JOIN LATERAL (
   SELECT * FROM {s}.runs r WHERE r.run_id = e.run_id AND {mine} LIMIT 1) r
  WHERE e.type = 'RunFinished' AND e.data ->> 'outcome' = %(state)s AND e.ts < {ago}
  ORDER BY e.ts LIMIT %(limit)s)"""
        self._remove = f"""
WITH gone AS (
  DELETE FROM {s}.runs WHERE run_id = ANY(%(run_ids)s) RETURNING run_id
), e AS (DELETE FROM {s}.run_events WHERE run_id = ANY(%(run_ids)s)
), o AS (DELETE FROM {s}.run_outbox WHERE run_id = ANY(%(run_ids)s)
), l AS (DELETE FROM {s}.dead_letters WHERE run_id = ANY(%(run_ids)s)
), d AS (DELETE FROM {s}.dispatches WHERE run_id = ANY(%(run_ids)s))
SELECT run_id FROM gone"""

    def announce(self, connection: Caller, presence: Presence) -> None:
        """Tell that a worker consumes these queues, for the next `PRESENCE_EXPIRES_S`."""
        execute(connection, self._announce, asdict(presence))

    def withdraw(self, connection: Caller, presence: Presence) -> None:
        """Tell that it consumes none any more."""
        execute(connection, self._withdraw, {"worker": presence.worker})

    def pause(self, connection: Caller, name: str) -> None:
        """No run of the queue is claimed by whoever looks after this is committed."""
        execute(connection, self._pause, {"name": name})

    def await_claims(self, connection: Caller, *, patience: float = FROZEN) -> None:
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
                ended = execute(connection, self._end, {"pids": pids})
                logger.warning(
                    "workers are frozen in the middle of a claim, their sessions are ended",
                    extra={"action": "claims_ended", "frozen": len(pids), "ended": len(ended)},
                )
                deadline = monotonic() + patience
            execute(connection, f"SELECT pg_sleep({LOOK_EVERY})", {})
            before &= self._in_flight(connection)

    def _in_flight(self, connection: Caller) -> set[tuple[int, str]]:
        """The transactions that hold the fence."""
        return {(pid, transaction) for pid, transaction in execute(connection, self._claims, {})}

    def resume(self, connection: Caller, name: str) -> None:
        """Let the queue's runs be dispatched again, and wake the relays."""
        execute(connection, self._resume, {"name": name})
        execute(connection, "SELECT pg_notify(%(c)s, '')", {"c": self._channel})

    def workers(self, connection: Caller) -> list[WorkerState]:
        """Those that consume queues now; of older versions none tells."""
        names = ("hostname", "version", "queues", "processes", "started_at", "failing")
        rows = execute(connection, self._present, {})
        return [WorkerState(**dict(zip(names, row, strict=True))) for row in rows]

    def states(self, connection: Caller, *, ended: bool = True) -> list[QueueState]:
        """Every queue that has runs or was paused; without those that ended, all but them."""
        names = (
            "name",
            "paused_at",
            "waiting",
            "delayed",
            "active",
            "oldest",
            "workers",
            "completed",
            "failed",
            "cancelled",
            "per_minute",
        )
        return [
            QueueState(**dict(zip(names, row, strict=True)))
            for row in execute(connection, self._states, {"ended": ended})
        ]

    def remove_waiting(self, connection: Caller, queue: str) -> list[str]:
        """Take away the queue's runs that no worker has."""
        return self._removed(connection, self._waiting, {"queue": queue})

    def remove_queue(self, connection: Caller, queue: str, *, force: bool) -> tuple[list[str], int]:
        """Take away every run of the queue and the queue itself: (those removed, those running).

        Without `force` nothing is removed while a run of it is running, even if its worker is lost.
        """
        if not force:
            # A refusal is told without a lock if it can be: heartbeats would wait for ours.
            running = execute(connection, self._running, {"queue": queue})[0][0]
            if running:
                return [], running
        chosen = self._chosen(connection, "queue = %(queue)s", {"queue": queue})
        running = sum(state == RunState.RUNNING for _, state in chosen)
        if running and not force:
            return [], running
        removed = self._remove_runs(connection, [run_id for run_id, _ in chosen])
        self.resume(
            connection, queue
        )  # a run that is started meanwhile has rung for a paused queue
        return removed, running

    def remove_finished(
        self, connection: Caller, *, state: str, seconds: float, limit: int, namespace: str
    ) -> list[str]:
        """Take away runs that ended in this state so many seconds ago, oldest end first."""
        return self._removed(
            connection,
            f"run_id = ANY(ARRAY(SELECT run_id FROM ({self._ended} LIMIT %(limit)s) AS ended))",
            {"state": state, "seconds": seconds, "limit": limit, "namespace": namespace},
        )

    def count_finished(
        self, connection: Caller, *, state: str, seconds: float, namespace: str
    ) -> tuple[int, int]:
        """(runs, events) that `remove_finished` would take away without a limit."""
        rows = execute(
            connection,
            f"SELECT count(*), coalesce(sum(events), 0)::bigint FROM ({self._ended}) AS ended",
            {"state": state, "seconds": seconds, "namespace": namespace, "limit": None},
        )
        return rows[0][0], rows[0][1]

    def remove_run(self, connection: Caller, run_id: str, *, namespace: str) -> bool:
        """Take away one run that no worker has; False if there is none or it is running."""
        return bool(
            self._removed(
                connection,
                "run_id = %(run_id)s AND namespace = %(namespace)s AND state <> 'running'",
                {"run_id": run_id, "namespace": namespace},
            )
        )

    def _removed(
        self, connection: Caller, which: str, parameters: dict[str, str | float | int]
    ) -> list[str]:
        chosen = self._chosen(connection, which, parameters)
        return self._remove_runs(connection, [run_id for run_id, _ in chosen])

    def _chosen(
        self, connection: Caller, which: str, parameters: dict[str, str | float | int]
    ) -> list[tuple[str, str]]:
        return execute(connection, self._choose.replace("{which}", which), parameters)

    def _remove_runs(self, connection: Caller, run_ids: list[str]) -> list[str]:
        return [row[0] for row in execute(connection, self._remove, {"run_ids": run_ids})]
