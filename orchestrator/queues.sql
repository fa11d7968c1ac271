-- Statements over queues, workers and the removal of runs.

-- name: claims_in_flight
-- List the transactions that hold the fence of the claims.
SELECT pid, virtualtransaction FROM pg_locks
 WHERE locktype = 'advisory' AND classid = {claim_fence} AND objid = 0 AND objsubid = 2 AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())

-- name: end_sessions
-- End these sessions.
SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
 WHERE pid = ANY(%(pids)s) AND usename = current_user

-- name: pause_poll
-- Wait between two looks at the claims.
SELECT pg_sleep({claims_poll_s})

-- name: pause
-- Note that a queue is paused, unless it is.
INSERT INTO {schema}.queues (name, paused_at) VALUES (%(name)s, clock_timestamp())
ON CONFLICT (name) DO UPDATE SET paused_at = excluded.paused_at WHERE queues.paused_at IS NULL

-- name: resume
-- Note that a queue is not paused. A trigger keeps its row if that says more.
DELETE FROM {schema}.queues WHERE name = %(name)s

-- name: set_age
-- Note after how many seconds a run of a queue comes before those of a higher priority.
INSERT INTO {schema}.queues (name, age_after_s) VALUES (%(name)s, %(age_after_s)s)
ON CONFLICT (name) DO UPDATE SET age_after_s = excluded.age_after_s

-- name: forget_age
-- Note that priority alone orders the runs of a queue.
UPDATE {schema}.queues SET age_after_s = NULL WHERE name = %(name)s

-- name: forget_default
-- Delete the row of a queue that says nothing.
DELETE FROM {schema}.queues WHERE name = %(name)s AND paused_at IS NULL AND age_after_s IS NULL

-- name: wake_relays
-- Wake the relays of all shards.
SELECT pg_notify(%(c)s, '')

-- name: is_known
-- Find out whether a queue is paused, is consumed, or has runs.
-- Reads in whole: dispatches, and runs for a name that nothing else knows.
SELECT EXISTS (SELECT FROM {schema}.queues WHERE name = %(name)s)
    OR EXISTS (SELECT FROM {schema}.workers WHERE %(name)s = ANY(queues))
    OR EXISTS (SELECT FROM {schema}.dispatches WHERE queue = %(name)s)
    OR EXISTS (SELECT FROM {schema}.runs WHERE queue = %(name)s)

-- fragment: due_since
-- The time since which the oldest due run of a group of dispatches waits for a worker.
-- A sent message is due again at its redispatch, and a run that was given back since it was
-- made: the run knows since when it waits. There are few of them, whatever the backlog.
least(min(d.due_at) FILTER (WHERE d.state IN ('waiting', 'delayed')
                          AND d.due_at <= clock_timestamp() AND d.reason NOT IN {of_its_worker}),
      min((SELECT CASE r.state WHEN 'queued' THEN coalesce(r.not_before, r.created_at)
                               ELSE r.lease_expires_at END
             FROM {schema}.runs r WHERE r.run_id = d.run_id))
        FILTER (WHERE d.state = 'sent'
                   OR d.state = 'waiting' AND d.reason IN {of_its_worker}))

-- name: oldest_due
-- Read how many seconds the oldest due run of each queue has waited, unless the queue is paused.
-- Reads in whole: dispatches.
SELECT d.queue,
       greatest(0, extract(epoch FROM clock_timestamp() - {due_since}))::float8
  FROM {schema}.dispatches d
 WHERE NOT EXISTS (SELECT FROM {schema}.queues q
                    WHERE q.name = d.queue AND q.paused_at IS NOT NULL)
 GROUP BY d.queue

-- name: states
-- Read every queue that has runs, a row of its own or a worker; counts those that ended if asked.
-- Reads in whole: dispatches, and if asked runs, as long as no relay has counted those that ended.
WITH RECURSIVE stored(namespace, queue) AS (
  -- From one queue to the next by the index of each namespace: the history is not read.
  (SELECT namespace, queue FROM {schema}.runs ORDER BY namespace, queue LIMIT 1)
  UNION ALL
  SELECT n.namespace, n.queue FROM stored CROSS JOIN LATERAL (
    SELECT namespace, queue FROM {schema}.runs r
     WHERE (r.namespace, r.queue) > (stored.namespace, stored.queue)
     ORDER BY namespace, queue LIMIT 1) n
), unfinished AS (
  SELECT d.queue, count(*) FILTER (WHERE d.state <> 'running' AND d.due_at <= clock_timestamp()
                                      OR d.state = 'sent') AS queued,
         count(*) FILTER (WHERE d.state IN ('waiting', 'delayed') AND d.due_at > clock_timestamp()
                            AND d.reason NOT IN ('wait', 'limit')) AS delayed,
         count(*) FILTER (WHERE d.state = 'delayed' AND d.due_at > clock_timestamp()
                            AND d.reason IN ('wait', 'limit')) AS waiting,
         count(*) FILTER (WHERE d.state = 'running') AS active,
         {due_since} AS oldest,
         count(DISTINCT (SELECT worker FROM {schema}.runs r
                          WHERE r.run_id = d.run_id AND r.state = 'running'))
           FILTER (WHERE d.state = 'running') AS executing
    FROM {schema}.dispatches d GROUP BY d.queue
), consumed AS (
  SELECT name AS queue, count(*) AS workers FROM {schema}.workers CROSS JOIN unnest(queues) AS name
   WHERE seen_at > clock_timestamp() - make_interval(secs => {presence_expires_s}) GROUP BY name
), ended AS (
  SELECT queue, completed, failed, cancelled FROM {schema}.ended_runs WHERE %(ended)s
  UNION ALL
  SELECT queue, count(*) FILTER (WHERE state = 'completed'),
         count(*) FILTER (WHERE state = 'failed'), count(*) FILTER (WHERE state = 'cancelled')
    FROM {schema}.runs
   WHERE %(ended)s AND finished_at IS NOT NULL AND NOT EXISTS (SELECT FROM {schema}.ended_runs)
   GROUP BY queue
), recent AS (
  -- Row by row, by LIMIT: the planner would join by reading all runs.
  SELECT r.queue, e.ts FROM (
    SELECT run_id, ts FROM {schema}.run_events
     WHERE type = 'RunFinished' AND ts > (SELECT clock_timestamp() - interval '1 minute')
     ORDER BY ts DESC LIMIT {recent_ends}) e
   CROSS JOIN LATERAL (SELECT queue FROM {schema}.runs r WHERE r.run_id = e.run_id LIMIT 1) r
), rate AS (
  -- Of more than can be read in a moment, the last ones stand for the minute.
  SELECT queue, (count(*) * CASE WHEN (SELECT count(*) FROM recent) < {recent_ends} THEN 1 ELSE
           60 / greatest(0.001, extract(epoch FROM clock_timestamp() - (SELECT min(ts) FROM recent)))
         END)::bigint AS per_minute FROM recent GROUP BY queue
)
SELECT name, q.paused_at, coalesce(queued, 0), coalesce(delayed, 0), coalesce(waiting, 0),
       coalesce(active, 0),
       -- Those of older versions do not tell: then the processes that execute count.
       oldest, coalesce(workers, executing, 0),
       coalesce(completed, 0), coalesce(failed, 0), coalesce(cancelled, 0), coalesce(per_minute, 0),
       q.age_after_s
  FROM (SELECT name FROM {schema}.queues UNION SELECT queue FROM unfinished
        UNION SELECT queue FROM consumed UNION SELECT queue FROM stored) AS known(name)
  LEFT JOIN consumed c ON c.queue = name
  LEFT JOIN {schema}.queues q USING (name)
  LEFT JOIN unfinished u ON u.queue = name LEFT JOIN ended e ON e.queue = name
  LEFT JOIN rate ON rate.queue = name
 ORDER BY name

-- name: announce
-- Note what a worker consumes, and forget those that have not told for a day.
WITH gone AS (
  DELETE FROM {schema}.workers WHERE seen_at < clock_timestamp() - interval '1 day'
)
INSERT INTO {schema}.workers AS w (worker, hostname, queues, processes, version, failing)
VALUES (%(worker)s, %(hostname)s, %(queues)s, %(processes)s, %(version)s, %(failing)s)
ON CONFLICT (worker) DO UPDATE
   SET queues = excluded.queues, processes = excluded.processes, failing = excluded.failing,
       seen_at = clock_timestamp()

-- name: present_workers
-- List the workers that have told what they consume, not long ago.
SELECT hostname, version, queues, processes, started_at, failing FROM {schema}.workers
 WHERE seen_at > clock_timestamp() - make_interval(secs => {presence_expires_s})
 ORDER BY hostname, started_at

-- name: withdraw
-- Forget a worker.
DELETE FROM {schema}.workers WHERE worker = %(worker)s

-- fragment: out_or_waiting
-- The runs of a queue that have not ended, by the two indexes of their dispatches.
SELECT run_id FROM {schema}.dispatches WHERE state = 'waiting' AND queue = %(queue)s
UNION ALL
SELECT run_id FROM {schema}.dispatches WHERE state <> 'waiting' AND queue = %(queue)s

-- name: lock_waiting
-- Lock the runs of a queue that no worker has.
-- The runs' rows are locked first, as every writer does, so a claim comes before or finds nothing.
-- In a statement of its own, as all that lock runs for a removal: what the writers before us have
-- appended is not in the snapshot of the statement that waited for them. By their dispatches, as
-- unfinished runs are found: the history is not read.
SELECT run_id, state, 0 FROM {schema}.runs
 WHERE state = 'queued' AND run_id = ANY(ARRAY({out_or_waiting}))
 ORDER BY run_id FOR UPDATE

-- name: lock_unfinished
-- Lock the runs of a queue that have not ended.
SELECT run_id, state, 0 FROM {schema}.runs
 WHERE state IN ('queued', 'running') AND run_id = ANY(ARRAY({out_or_waiting}))
 ORDER BY run_id FOR UPDATE

-- name: lock_rest
-- Lock some runs of a queue that nothing will happen to any more.
-- By the index of each namespace: no other finds the runs of a queue.
WITH RECURSIVE known(namespace) AS (
  (SELECT namespace FROM {schema}.runs ORDER BY namespace LIMIT 1)
  UNION ALL
  SELECT n.namespace FROM known CROSS JOIN LATERAL (
    SELECT namespace FROM {schema}.runs WHERE namespace > known.namespace
     ORDER BY namespace LIMIT 1) n
)
SELECT run_id, state, last_seq - pruned_seq FROM {schema}.runs WHERE run_id = ANY(ARRAY(
  SELECT r.run_id FROM known CROSS JOIN LATERAL (
    SELECT run_id FROM {schema}.runs r
     WHERE namespace = known.namespace AND queue = %(queue)s
       AND NOT EXISTS (SELECT FROM {schema}.dispatches d WHERE d.run_id = r.run_id)
     ORDER BY created_at LIMIT {page_runs}) r LIMIT {page_runs}))
 ORDER BY run_id FOR UPDATE

-- name: forget_count
-- Forget how many runs of a queue had ended.
DELETE FROM {schema}.ended_runs WHERE queue = %(queue)s

-- name: lock_run
-- Lock one run that no worker has.
SELECT run_id, state, 0 FROM {schema}.runs
 WHERE run_id = %(run_id)s AND namespace = %(namespace)s AND state <> 'running'
 ORDER BY run_id FOR UPDATE

-- fragment: ended
-- The runs of a namespace that ended in a state so long ago, oldest end first.
-- By their last event or, when it is pruned, by the time of that. The time is a subquery: compared
-- with a volatile function, all runs would be read. Row by row, by LIMIT, and by lists: right after
-- many runs have ended the planner knows nothing of them, and would join by reading all.
(SELECT r.run_id, r.last_seq - r.pruned_seq AS events FROM {schema}.runs r
  WHERE r.pruned_at IS NOT NULL
    AND r.finished_at < (SELECT clock_timestamp() - make_interval(secs => %(seconds)s))
    AND r.namespace = %(namespace)s AND r.state = %(state)s AND NOT ({needed})
  ORDER BY r.pruned_at LIMIT %(limit)s)
UNION ALL
(SELECT r.run_id, r.last_seq - r.pruned_seq FROM {schema}.run_events e CROSS JOIN LATERAL (
   SELECT * FROM {schema}.runs r
    WHERE r.run_id = e.run_id AND r.namespace = %(namespace)s AND r.state = %(state)s
      AND NOT ({needed}) LIMIT 1) r
  WHERE e.type = 'RunFinished' AND e.data ->> 'outcome' = %(state)s
    AND e.ts < (SELECT clock_timestamp() - make_interval(secs => %(seconds)s))
  ORDER BY e.ts LIMIT %(limit)s)

-- name: lock_ended
-- Lock runs that ended in a state so long ago, oldest end first.
-- Reads in whole: runs, those that have no events any more. For a person who asks.
SELECT run_id, state, last_seq - pruned_seq FROM {schema}.runs
 WHERE run_id = ANY(ARRAY(SELECT run_id FROM ({ended} LIMIT %(limit)s) AS ended))
 ORDER BY run_id FOR UPDATE

-- name: count_ended
-- Count the runs that lock_ended would lock without a limit, and their events.
-- Reads in whole: runs, as lock_ended does.
SELECT count(*), coalesce(sum(events), 0)::bigint FROM ({ended}) AS ended

-- name: running
-- Count the runs of a queue that run.
-- A run that runs is out, whatever its dispatch says: its takeover may be on its way.
SELECT count(*) FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
 WHERE d.queue = %(queue)s AND d.state <> 'waiting' AND r.state = 'running'

-- name: remove
-- Delete these runs with all that is stored of them.
-- Reads in whole: run_outbox, which is short.
WITH gone AS (
  DELETE FROM {schema}.runs WHERE run_id = ANY(%(run_ids)s) RETURNING run_id
), e AS (DELETE FROM {schema}.run_events WHERE run_id = ANY(%(run_ids)s)
), o AS (DELETE FROM {schema}.run_outbox WHERE run_id = ANY(%(run_ids)s)
), l AS (DELETE FROM {schema}.dead_letters WHERE run_id = ANY(%(run_ids)s)
), s AS (DELETE FROM {schema}.signals WHERE run_id = ANY(%(run_ids)s)
), a AS (DELETE FROM {schema}.decisions WHERE run_id = ANY(%(run_ids)s)
), k AS (DELETE FROM {schema}.approval_links WHERE run_id = ANY(%(run_ids)s)
), d AS (DELETE FROM {schema}.dispatches WHERE run_id = ANY(%(run_ids)s))
SELECT run_id FROM gone
