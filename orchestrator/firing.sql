-- The statements by which a relay fires the ticks of schedules.

-- name: due
-- Read the schedules whose tick is due, those that wait the longest first.
-- Without those that another transaction holds: a person may have changed one and not committed yet.
SELECT s.namespace, s.name, s.version, s.cron, s.every, s.tz, s.catch_up, s.jitter, s.tick,
       extract(epoch FROM coalesce(%(now)s, clock_timestamp()) - s.due_at)::float8,
       s.look_at > s.due_at
  FROM {schema}.schedules s
 WHERE s.look_at <= (SELECT coalesce(%(now)s, clock_timestamp())) AND {firable}
 ORDER BY s.look_at LIMIT {batch} FOR NO KEY UPDATE SKIP LOCKED

-- name: fire
-- Start the runs of ticks and move their schedules to the next ones: both or neither, in one
-- statement, so that a relay that dies or freezes leaves nothing half done, and holds no lock. Only
-- for schedules that still are as they were read: of two relays one fires.
-- The session does not wait for the disk at its commits, but for this one, as the server has it. An
-- open transaction may have stored a run with the key of a tick: it is not waited for.
WITH durable AS MATERIALIZED (
  SELECT set_config('synchronous_commit', reset_val, true),
         set_config('lock_timeout', '{held_key_wait_ms}', true)
    FROM pg_settings WHERE name = 'synchronous_commit'
), held AS MATERIALIZED (
  SELECT g.*, s.id, s.run, s.overlap,
         g.fires AND s.overlap <> 'allow'
           AND (SELECT count(*) FROM (SELECT FROM {schema}.dispatches d
                                       WHERE d.schedule_id = s.id LIMIT 1) d) > 0 AS busy
    FROM durable CROSS JOIN jsonb_to_recordset(%(ticks)s::jsonb) AS g(
           namespace text, name text, version bigint, fires boolean, tick timestamptz,
           next_tick timestamptz, move_s float8, late_s float8, run_id text, shard smallint, key text)
   CROSS JOIN LATERAL (
     SELECT id, run, overlap FROM {schema}.schedules s
      WHERE s.namespace = g.namespace AND s.name = g.name AND s.version = g.version
        AND s.look_at IS NOT NULL
      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) s
), input AS (
  SELECT i.* FROM held h CROSS JOIN LATERAL jsonb_to_record(h.run || jsonb_build_object(
           'namespace', h.namespace, 'run_id', h.run_id, 'shard', h.shard, 'key', h.key,
           'schedule', h.name, 'schedule_id', h.id, 'tick', h.tick)) AS i({new_run_columns})
   WHERE h.fires AND NOT h.busy
), {created_runs}, fired AS MATERIALIZED (
  SELECT h.*, u.plan, u.queue,
         CASE WHEN NOT h.fires THEN 'missed'
              WHEN h.busy AND h.overlap = 'replace' THEN 'replacing'
              WHEN h.busy THEN 'skipped'
              WHEN u.run_id IS NOT NULL THEN 'started'
              WHEN EXISTS (SELECT FROM {schema}.runs r
                            WHERE r.namespace = h.namespace AND r.key = h.key
                              AND r.tick = h.tick AND r.schedule = h.name) THEN 'known'
              ELSE 'conflict' END AS outcome
    FROM held h LEFT JOIN u ON u.run_id = h.run_id
), moved AS (
  UPDATE {schema}.schedules s
     SET version = s.version + 1,
         tick = CASE WHEN f.outcome IN ('replacing', 'conflict') THEN s.tick ELSE f.next_tick END,
         due_at = CASE WHEN f.outcome IN ('replacing', 'conflict') THEN s.due_at
                       ELSE s.due_at + make_interval(secs => f.move_s) END,
         look_at = CASE f.outcome WHEN 'conflict' THEN NULL
                        WHEN 'replacing' THEN clock_timestamp() + make_interval(secs => {replacing_s})
                        ELSE s.due_at + make_interval(secs => f.move_s) END,
         state = CASE f.outcome WHEN 'conflict' THEN 'stopped' ELSE s.state END,
         reason = CASE f.outcome WHEN 'conflict'
                       THEN 'the key ' || f.key || ' is used by another run' END,
         failures = s.failures + (f.outcome = 'conflict')::int,
         last_tick = CASE f.outcome WHEN 'started' THEN f.tick ELSE s.last_tick END,
         last_run_id = CASE f.outcome WHEN 'started' THEN f.run_id ELSE s.last_run_id END,
         last_fired_at = CASE f.outcome WHEN 'started' THEN clock_timestamp()
                              ELSE s.last_fired_at END,
         last_late_s = CASE f.outcome WHEN 'started' THEN f.late_s ELSE s.last_late_s END
    FROM fired f WHERE s.id = f.id
)
SELECT f.id, f.namespace, f.name, f.outcome, f.late_s, f.run_id, f.plan, f.queue, f.key,
       CASE WHEN f.outcome = 'started' THEN {each_doorbell} END
  FROM fired f

-- name: stop
-- Stop one schedule whose tick cannot be written, with the reason.
UPDATE {schema}.schedules
   SET version = version + 1, state = 'stopped', reason = %(reason)s, look_at = NULL,
       failures = failures + 1
 WHERE id = (SELECT id FROM {schema}.schedules
              WHERE namespace = %(namespace)s AND name = %(name)s AND version = %(version)s
                AND look_at IS NOT NULL
                FOR NO KEY UPDATE SKIP LOCKED)
RETURNING id

-- name: lock_unfinished
-- Lock the unfinished runs of a schedule that are to be cancelled.
-- Those that another transaction holds are left for the next look.
SELECT r.run_id FROM {schema}.dispatches d
 CROSS JOIN LATERAL (
   SELECT run_id FROM {schema}.runs r
    WHERE r.run_id = d.run_id AND r.cancel_requested_at IS NULL
    LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
 WHERE d.schedule_id = %(id)s LIMIT {batch}
