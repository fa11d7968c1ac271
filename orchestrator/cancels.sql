-- The statement that cancels runs.

-- fragment: ends_at_once
-- Whether a cancel ends the run in the same statement.
-- A run that waits ends at once; one that runs is told, and ends at its next boundary. One that has
-- begun and waits, of a plan with an `on_cancel` step or with a step to undo, is due now for that.
state = 'queued'
AND (attempt = 0 AND retry_of IS NULL
     OR %(undo)s::jsonb -> plan = 'null' AND NOT {has_undos})

-- name: cancel
-- Store a cancel of unfinished runs, and end those that wait.
-- A run that has no number left must not keep the others. One that waits begins no step with limits any
-- more, and waits for no slot of theirs.
WITH u AS (
  UPDATE {schema}.runs r
     SET cancel_requested_at = clock_timestamp(),
         last_seq = last_seq + CASE WHEN {ends_at_once} THEN 2 ELSE 1 END,
         state = CASE WHEN {ends_at_once} THEN 'cancelled' ELSE state END,
         not_before = NULL,
         limits = CASE WHEN state = 'queued' THEN {schema}.limits_of_plan(limits) ELSE limits END,
         error = CASE WHEN {ends_at_once} THEN %(error)s::jsonb ELSE error END,
         finished_at = CASE WHEN {ends_at_once} THEN clock_timestamp() END
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[]) AS w(id, shard)
   WHERE run_id = w.id AND namespace = coalesce(%(namespace)s, namespace)
     AND state IN ('queued', 'running') AND cancel_requested_at IS NULL
     AND last_seq < 2147483646
  RETURNING r.*, w.shard
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
  SELECT u.run_id, u.last_seq - (u.state = 'cancelled')::int, clock_timestamp(),
         'CancelRequested', %(source)s,
         jsonb_strip_nulls(jsonb_build_object('reason', %(reason)s::text, 'on_cancel',
           CASE WHEN u.state <> 'cancelled' THEN %(undo)s::jsonb ->> u.plan END))
    FROM u
  UNION ALL
  SELECT u.run_id, u.last_seq, clock_timestamp(), 'RunFinished', %(source)s,
         jsonb_build_object('outcome', 'cancelled', 'error', %(error)s::jsonb, 'plan', u.plan)
    FROM u WHERE u.state = 'cancelled'
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq - (CASE WHEN state = 'cancelled' THEN 2 ELSE 1 END) + 1,
         last_seq FROM u
), gone AS (
  DELETE FROM {schema}.dispatches d USING u WHERE d.run_id = u.run_id AND u.state = 'cancelled'
), now AS (
  UPDATE {schema}.dispatches d SET state = 'waiting', due_at = clock_timestamp(), reason = 'cancel'
    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'
)
SELECT {run_columns}, {each_doorbell} FROM u AS r
