"""Ends runs that have reached their deadline while no worker has them: the relay's part of it.

A worker that has a run ends it itself, in the middle of a step if need be. But a run may wait for a
worker that never comes: its queue is paused, nobody consumes it, or nobody knows its plan.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.queries import LAST_ATTEMPT, execute, outbox_row

BATCH = 100
"""Runs that one statement ends."""

ADOPTED = 1000
"""Dispatches that one step of `AdoptsDeadlines` looks at."""

REST_S = 3600.0
"""Until the next look for deadlines that processes of an older version have not noted."""

EASE_S = 0.2
"""Between two steps of a look."""


class Deadlines:
    """What a relay asks to end overdue runs. One statement, which waits for no row."""

    def __init__(self, schema: str) -> None:
        s = schema
        now = "(SELECT coalesce(%(now)s, clock_timestamp()))"
        # A cancelled run ends as cancelled, and its `on_cancel` step knows no deadline.
        self._end = f"""
WITH due AS (
  SELECT run_id FROM {s}.dispatches
   WHERE deadline_at <= {now} AND shard = ANY(%(shards)s)
     AND (state <> 'running' OR due_at <= {now})
   ORDER BY deadline_at LIMIT {BATCH}
), free AS (
  SELECT r.run_id, d.shard,
         jsonb_build_object('type', 'DeadlineExceeded', 'message',
           'run ' || r.run_id || ' did not end before its deadline') AS error
    FROM due JOIN {s}.runs r USING (run_id) JOIN {s}.dispatches d USING (run_id)
   WHERE r.deadline_at <= {now} AND r.cancel_requested_at IS NULL
     AND r.last_seq < {LAST_ATTEMPT}  -- one that has no number left must not keep the others
     AND (r.state = 'queued' OR r.state = 'running' AND r.lease_expires_at <= {now})
     FOR NO KEY UPDATE OF r SKIP LOCKED FOR UPDATE OF d SKIP LOCKED
), u AS (
  UPDATE {s}.runs r
     SET state = 'failed', error = free.error, last_seq = last_seq + 1, not_before = NULL,
         lease_expires_at = NULL, finished_at = clock_timestamp()
    FROM free WHERE r.run_id = free.run_id
  RETURNING r.run_id, r.last_seq, r.plan, r.queue, free.shard, free.error
), e AS (
  INSERT INTO {s}.run_events (run_id, seq, ts, type, source, data)
  SELECT run_id, last_seq, clock_timestamp(), 'RunFinished', 'relay',
         jsonb_build_object('outcome', 'failed', 'error', error)
    FROM u
), o AS ({outbox_row(s, "u", "shard", "1")}
), gone AS (
  DELETE FROM {s}.dispatches d USING u WHERE d.run_id = u.run_id
)
SELECT run_id, plan, queue FROM u"""

    def end(
        self, connection: psycopg.Connection[Any], shards: Sequence[int], now: datetime | None
    ) -> list[tuple[str, str, str]]:
        """End the runs of these shards that are overdue: of each its id, plan and queue.

        No more than `BATCH`; those that somebody's transaction holds are for the next time.
        """
        return execute(connection, self._end, {"shards": list(shards), "now": now})


class AdoptsDeadlines:
    """A chore: notes the deadlines of runs that an older version has started."""

    def __init__(self, schema: str) -> None:
        self._after = ""
        self._look = f"""
SELECT run_id FROM {schema}.dispatches WHERE run_id > %(after)s ORDER BY run_id LIMIT {ADOPTED}"""
        self._adopt = f"""
UPDATE {schema}.dispatches d SET deadline_at = r.deadline_at
  FROM {schema}.runs r
 WHERE d.run_id = ANY(ARRAY(
   SELECT d.run_id FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
    WHERE d.run_id = ANY(%(run_ids)s) AND d.deadline_at IS NULL AND r.deadline_at IS NOT NULL
      FOR NO KEY UPDATE OF d SKIP LOCKED))
   AND r.run_id = d.run_id"""

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Look at some of the unfinished runs; seconds until the next step."""
        found = [row[0] for row in execute(connection, self._look, {"after": self._after})]
        if found:
            execute(connection, self._adopt, {"run_ids": found})
        self._after = found[-1] if len(found) == ADOPTED else ""
        return EASE_S if self._after else REST_S
