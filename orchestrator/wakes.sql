-- The statements by which a relay wakes runs that wait.

-- name: wake
-- Look at the runs of these shards that were to be woken, and make those due that wait.
-- Before those that have not begun: see `of_its_worker`, which says too why `not_before` is now.
-- A run that its worker is just parking is locked: it is looked at again, when that has been
-- committed. One that a worker has is left to it: before it leaves, it looks. Not by their states
-- in the snapshot: locked, they are as they are now. One that waits for children is due when few
-- enough are unfinished: the end of each is noted, and only that of the last changes something.
WITH found AS MATERIALIZED (
  SELECT w.*, d.run_id IS NULL AS ended FROM unnest(%(shards)s::int[]) AS own(shard)
   CROSS JOIN LATERAL (SELECT ctid AS place, run_id, reason, failed FROM {schema}.wakes w
                        WHERE w.shard = own.shard AND coalesce(w.reason, '') NOT IN ('cancel', 'next')
                          AND w.run_id <> ALL(%(aside)s::text[])
                        ORDER BY w.id LIMIT {batch}) w
    LEFT JOIN LATERAL (SELECT run_id FROM {schema}.dispatches d WHERE d.run_id = w.run_id
                        LIMIT 1) d ON true
), free AS MATERIALIZED (
  SELECT r.run_id, r.state = 'queued' AND d.state = 'delayed' AND d.reason = '{reason}'
                     AND (f.signalled OR f.failed AND d.wakes_on_failure
                          OR (SELECT count(*) FROM (
                                SELECT FROM {schema}.dispatches c WHERE c.parent_id = f.run_id
                                 LIMIT d.children_left + 1) c) <= d.children_left) AS waits
    FROM (SELECT run_id, bool_or(reason IS NULL) AS signalled, coalesce(bool_or(failed), false)
                   AS failed FROM found WHERE NOT ended GROUP BY run_id) f
   CROSS JOIN LATERAL (SELECT run_id, state FROM {schema}.runs r WHERE r.run_id = f.run_id
                        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
   CROSS JOIN LATERAL (SELECT state, reason, children_left, wakes_on_failure
                          FROM {schema}.dispatches d WHERE d.run_id = f.run_id
                        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) d
), u AS (
  UPDATE {schema}.runs SET not_before = clock_timestamp()
   WHERE run_id = ANY(ARRAY(SELECT run_id FROM free WHERE waits))
), due AS (
  UPDATE {schema}.dispatches d
     SET state = 'waiting', reason = 'signal', children_left = NULL,
         due_at = (SELECT created_at FROM {schema}.runs r WHERE r.run_id = d.run_id)
   WHERE run_id = ANY(ARRAY(SELECT run_id FROM free WHERE waits))
), gone AS (
  DELETE FROM {schema}.wakes WHERE ctid = ANY(ARRAY(
    SELECT place FROM found WHERE ended OR run_id IN (SELECT run_id FROM free)))
  RETURNING 1
)
SELECT (SELECT count(*) FROM found), (SELECT count(*) FROM gone),
       ARRAY(SELECT DISTINCT run_id FROM found
              WHERE NOT ended AND run_id NOT IN (SELECT run_id FROM free)),
       EXISTS (SELECT FROM {schema}.wakes WHERE shard = ANY(%(shards)s) AND reason = 'cancel'),
       EXISTS (SELECT FROM {schema}.wakes WHERE shard = ANY(%(shards)s) AND reason = 'next'),
       EXISTS (SELECT FROM {schema}.limit_notes
                WHERE shard = ANY(%(shards)s) AND coalesce(due_at <= clock_timestamp(), true))

-- name: look_at_limits
-- Look at the limits that were noted for these shards, and let in as many runs as have room.
SELECT looked_at, kept FROM {schema}.look_at_limits(%(shards)s::int[], {batch})
