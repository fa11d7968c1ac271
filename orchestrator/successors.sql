-- Statements over runs that wait for the end of another one with their dedupe key.

-- name: begin
-- Make the successors due whose predecessors have ended, by the notes of these shards: of the
-- dispatches with a key the first is then the successor.
-- No row is waited for: a successor that another transaction holds is looked at again. The end of a
-- run is noted in its commit, and a successor in the one that stores it: whichever commits last, its
-- note finds both.
WITH found AS MATERIALIZED (
  SELECT w.ctid AS place, w.run_id, w.plan, w.dedupe_key FROM {schema}.wakes w
   WHERE w.shard = ANY(%(shards)s) AND w.reason = 'next' AND w.run_id <> ALL(%(aside)s::text[])
   ORDER BY w.id LIMIT {batch}
), next AS MATERIALIZED (
  SELECT d.run_id, d.task, d.dedupe_key
    FROM (SELECT DISTINCT plan, dedupe_key FROM found) f
   CROSS JOIN LATERAL (
     SELECT d.run_id, d.task, d.dedupe_key, d.dedupe_next FROM {schema}.dispatches d
      WHERE d.task = f.plan AND d.dedupe_key = f.dedupe_key
      ORDER BY d.dedupe_next LIMIT 1) d
   WHERE d.dedupe_next
), free AS MATERIALIZED (
  SELECT r.run_id, r.not_before, r.created_at
    FROM next
   CROSS JOIN LATERAL (SELECT run_id, not_before, created_at FROM {schema}.runs r
                        WHERE r.run_id = next.run_id AND r.state = 'queued'
                        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
   CROSS JOIN LATERAL (SELECT FROM {schema}.dispatches d
                        WHERE d.run_id = next.run_id AND d.dedupe_next
                        LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) d
), due AS (
  UPDATE {schema}.dispatches d
     SET dedupe_next = false,
         (state, due_at, reason) = (
           SELECT CASE WHEN f.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
                  coalesce(f.not_before, f.created_at),
                  CASE WHEN f.not_before IS NULL THEN 'start' ELSE 'delay' END
             FROM free f WHERE f.run_id = d.run_id)
   WHERE run_id = ANY(ARRAY(SELECT run_id FROM free))
  RETURNING d.shard
), rung AS MATERIALIZED (
  SELECT {each_doorbell} FROM (SELECT DISTINCT shard FROM due) due
), held AS (
  SELECT f.place, f.run_id FROM found f WHERE EXISTS (
    SELECT FROM next n WHERE n.task = f.plan AND n.dedupe_key = f.dedupe_key
                         AND n.run_id NOT IN (SELECT run_id FROM free))
), gone AS (
  DELETE FROM {schema}.wakes WHERE ctid = ANY(ARRAY(
    SELECT place FROM found WHERE place NOT IN (SELECT place FROM held)))
  RETURNING 1
)
SELECT (SELECT count(*) FROM found), (SELECT count(*) FROM gone),
       ARRAY(SELECT DISTINCT run_id FROM held), (SELECT count(*) FROM rung)

-- name: note
-- Note the successors whose predecessors have ended, and that nothing would make due.
-- A relay of an older version takes away the notes that it does not know.
WITH left_behind AS (
  SELECT d.shard, d.run_id, d.task, d.dedupe_key FROM {schema}.dispatches d
   WHERE d.dedupe_next AND NOT EXISTS (
     SELECT FROM {schema}.dispatches p
      WHERE p.task = d.task AND p.dedupe_key = d.dedupe_key AND NOT p.dedupe_next)
   LIMIT {batch}
), noted AS (
  INSERT INTO {schema}.wakes (shard, run_id, reason, plan, dedupe_key)
  SELECT shard, run_id, 'next', task, dedupe_key FROM left_behind RETURNING shard
)
SELECT {each_doorbell} FROM noted
