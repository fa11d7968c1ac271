-- Statements by which the relay ends overdue runs.

-- name: end
-- End runs of these shards that have reached their deadline while no worker has them.
-- A cancelled run ends as cancelled, and its `on_cancel` step knows no deadline. A run that has no
-- number left, for an integer ends at 2147483647, must not keep the others.
WITH due AS (
  SELECT run_id FROM {schema}.dispatches
   WHERE deadline_at <= (SELECT coalesce(%(now)s, clock_timestamp())) AND shard = ANY(%(shards)s)
     AND (state <> 'running' OR due_at <= (SELECT coalesce(%(now)s, clock_timestamp())))
   ORDER BY deadline_at LIMIT {batch}
), free AS (
  SELECT r.run_id, d.shard,
         r.attempt > 0 AND {has_undos} AS undone,
         jsonb_build_object('type', 'DeadlineExceeded', 'message',
           'run ' || r.run_id || ' did not end before its deadline') AS error
    FROM due JOIN {schema}.runs r USING (run_id) JOIN {schema}.dispatches d USING (run_id)
   WHERE r.deadline_at <= (SELECT coalesce(%(now)s, clock_timestamp()))
     AND r.cancel_requested_at IS NULL
     AND r.last_seq < 2147483647
     AND (r.state = 'queued'
          OR r.state = 'running'
             AND r.lease_expires_at <= (SELECT coalesce(%(now)s, clock_timestamp())))
     FOR NO KEY UPDATE OF r SKIP LOCKED FOR UPDATE OF d SKIP LOCKED
), u AS (
  UPDATE {schema}.runs r
     SET state = 'failed', error = free.error, last_seq = last_seq + 1, not_before = NULL,
         lease_expires_at = NULL, finished_at = clock_timestamp()
    FROM free WHERE r.run_id = free.run_id AND NOT free.undone
  RETURNING r.run_id, r.last_seq, r.plan, r.queue, free.shard, free.error
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
  SELECT run_id, last_seq, clock_timestamp(), 'RunFinished', 'relay',
         jsonb_build_object('outcome', 'failed', 'error', error)
    FROM u
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq - (1) + 1, last_seq FROM u
), gone AS (
  DELETE FROM {schema}.dispatches d USING u WHERE d.run_id = u.run_id
), free_to_go AS (
  -- Neither does it wait for a slot of a step that is not begun any more.
  UPDATE {schema}.runs r
     SET not_before = NULL,
         limits = CASE WHEN state = 'queued' THEN {schema}.limits_of_plan(limits) ELSE limits END
    FROM free WHERE r.run_id = free.run_id AND free.undone
), due_to_undo AS (
  -- Once: the deadline of a dispatch is what this statement finds it by.
  UPDATE {schema}.dispatches d
     SET state = 'waiting', reason = 'deadline', due_at = clock_timestamp(), deadline_at = NULL,
         children_left = NULL
    FROM free WHERE d.run_id = free.run_id AND free.undone
)
SELECT run_id, plan, queue FROM u

-- name: scan
-- List dispatches of unfinished runs by id, from one on.
SELECT run_id FROM {schema}.dispatches WHERE run_id > %(after)s ORDER BY run_id LIMIT {adopted}

-- name: adopt
-- Note the deadlines of these runs in dispatches that an older version has written without.
UPDATE {schema}.dispatches d SET deadline_at = r.deadline_at
  FROM {schema}.runs r
 WHERE d.run_id = ANY(ARRAY(
   SELECT d.run_id FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
    WHERE d.run_id = ANY(%(run_ids)s) AND d.deadline_at IS NULL AND r.deadline_at IS NOT NULL
      FOR NO KEY UPDATE OF d SKIP LOCKED))
   AND r.run_id = d.run_id
