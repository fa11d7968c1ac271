-- Statements over limits, for people and for a chore of the relay.

-- fragment: awaited
-- The limits that runs wait for: each is found by the index, so that many runs cost no more than one.
RECURSIVE awaited(limit_id) AS (
  (SELECT limit_id FROM {schema}.dispatches WHERE state = 'delayed' AND reason = 'limit'
    ORDER BY limit_id LIMIT 1)
  UNION ALL
  SELECT n.limit_id FROM awaited CROSS JOIN LATERAL (
    SELECT limit_id FROM {schema}.dispatches
     WHERE state = 'delayed' AND reason = 'limit' AND limit_id > awaited.limit_id
     ORDER BY limit_id LIMIT 1) n
)

-- fragment: first_waiting
-- The run that waits the longest for a limit `awaited`, with how many it lets run at once.
SELECT d.shard, l.at_once FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
 CROSS JOIN LATERAL {schema}.all_limits_of(r.limits) l
 WHERE d.limit_id = awaited.limit_id AND d.state = 'delayed' AND d.reason = 'limit'
   AND l.id = d.limit_id
 ORDER BY d.priority DESC, d.limit_since LIMIT 1

-- name: note_free
-- Have relays look at the limits that runs wait for and that may have room; how many there are.
-- A run that was let in and is not claimed has a turn that nobody else has: not for ever.
WITH {awaited}, noted AS (
  INSERT INTO {schema}.limit_notes (shard, limit_id)
  SELECT w.shard, awaited.limit_id FROM awaited CROSS JOIN LATERAL ({first_waiting}) w
   WHERE coalesce((SELECT count(*) FROM {schema}.limit_slots s
                    WHERE s.limit_id = awaited.limit_id) < w.at_once, true)
  RETURNING shard
), rung AS (
  SELECT {each_doorbell} FROM (SELECT DISTINCT shard FROM noted) n
)
SELECT (SELECT count(*) FROM awaited), (SELECT count(*) FROM rung)

-- name: forget_full
-- Delete buckets that have been full for a while, as one without a row is.
-- Reads in whole: limit_rates, of keys that were used in the last hour.
DELETE FROM {schema}.limit_rates WHERE limit_id = ANY(ARRAY(
  SELECT limit_id FROM {schema}.limit_rates
   WHERE full_at < (SELECT clock_timestamp() - interval '10 minutes')
   LIMIT {sweep} FOR UPDATE SKIP LOCKED))

-- name: note
-- Have relays look at the keys of a limit that runs wait for.
WITH {awaited}, noted AS (
  INSERT INTO {schema}.limit_notes (shard, limit_id)
  SELECT w.shard, awaited.limit_id FROM awaited CROSS JOIN LATERAL ({first_waiting}) w
   WHERE split_part(awaited.limit_id, ':', 1) = %(name)s
  RETURNING shard
)
SELECT {each_doorbell} FROM (SELECT DISTINCT shard FROM noted) n

-- name: kinds
-- Read of which kinds a limit is for runs that have slots of it or wait for it: whether it is a rate.
-- Reads in whole: limit_slots. For a person who changes a limit.
WITH {awaited}, one AS (
  SELECT limit_id, min(run_id) AS run_id FROM {schema}.limit_slots
   WHERE split_part(limit_id, ':', 1) = %(name)s GROUP BY limit_id
  UNION ALL
  SELECT awaited.limit_id, d.run_id FROM awaited CROSS JOIN LATERAL (
    SELECT run_id FROM {schema}.dispatches d
     WHERE d.limit_id = awaited.limit_id AND d.state = 'delayed' AND d.reason = 'limit'
     ORDER BY d.priority DESC, d.limit_since LIMIT 1) d
   WHERE split_part(awaited.limit_id, ':', 1) = %(name)s
)
SELECT DISTINCT l.at_once IS NULL
  FROM one CROSS JOIN LATERAL (
    SELECT r.limits FROM {schema}.runs r WHERE r.run_id = one.run_id LIMIT 1) r
 CROSS JOIN LATERAL {schema}.all_limits_of(r.limits) l
 WHERE l.id = one.limit_id

-- name: set
-- Note how many runs a limit lets run at once from now on.
INSERT INTO {schema}.limit_settings (name, at_once) VALUES (%(name)s, %(at_once)s)
ON CONFLICT (name) DO UPDATE SET at_once = excluded.at_once, changed_at = clock_timestamp()

-- name: set_rate
-- Note how many runs a limit lets begin in a time from now on.
INSERT INTO {schema}.rate_settings (name, starts, period_s)
VALUES (%(name)s, %(starts)s, %(period_s)s)
ON CONFLICT (name) DO UPDATE
   SET starts = excluded.starts, period_s = excluded.period_s, changed_at = clock_timestamp()

-- name: forget
-- Forget what was set: each run brings the number of its plan. Says whether anything was.
WITH a AS (DELETE FROM {schema}.limit_settings WHERE name = %(name)s RETURNING 1),
     b AS (DELETE FROM {schema}.rate_settings WHERE name = %(name)s RETURNING 1)
SELECT EXISTS (SELECT FROM a) OR EXISTS (SELECT FROM b)

-- name: list
-- List the limits of a namespace that are in use, waited for or set, by name and key.
-- Reads in whole: dispatches, those that wait for limits. For a person who asks.
WITH used AS (
  SELECT limit_id, count(*) AS running, min(run_id) AS one FROM {schema}.limit_slots GROUP BY 1
), waits AS (
  SELECT limit_id, count(*) AS waiting, min(limit_since) AS oldest, min(run_id) AS one
    FROM {schema}.dispatches WHERE state = 'delayed' AND reason = 'limit' GROUP BY 1
), known AS (
  SELECT limit_id, split_part(limit_id, ':', 1) AS name FROM used
  UNION SELECT limit_id, split_part(limit_id, ':', 1) FROM waits
  UNION SELECT NULL, name FROM {schema}.limit_settings
  UNION SELECT NULL, name FROM {schema}.rate_settings
)
SELECT substr(k.name, strpos(k.name, '~') + 1), substr(k.limit_id, length(k.name) + 2),
       CASE WHEN k.limit_id IS NULL THEN s.at_once ELSE l.at_once END,
       CASE WHEN k.limit_id IS NULL THEN t.starts ELSE l.starts END,
       CASE WHEN k.limit_id IS NULL THEN t.period_s ELSE l.period_s END,
       s.name IS NOT NULL OR t.name IS NOT NULL, coalesce(u.running, 0),
       coalesce(w.waiting, 0), w.oldest, l.hold
  FROM known k LEFT JOIN used u USING (limit_id) LEFT JOIN waits w USING (limit_id)
  LEFT JOIN {schema}.limit_settings s ON s.name = k.name
  LEFT JOIN {schema}.rate_settings t ON t.name = k.name
  LEFT JOIN LATERAL (
    SELECT l.*, CASE WHEN {schema}.keeps_slot(r.limits, l.id) THEN 'run' END AS hold
      FROM {schema}.runs r CROSS JOIN LATERAL {schema}.all_limits_of(r.limits) l
     WHERE r.run_id = coalesce(w.one, u.one) AND l.id = k.limit_id LIMIT 1) l ON true
 WHERE left(k.name, strpos(k.name, '~')) = %(prefix)s
   AND (k.limit_id IS NOT NULL OR NOT EXISTS (
     SELECT FROM known o WHERE o.name = k.name AND o.limit_id IS NOT NULL))
 ORDER BY 1, 2 LIMIT %(limit)s
