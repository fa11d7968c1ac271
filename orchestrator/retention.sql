-- Statements by which retention removes what ended long ago.
--
-- The times are subqueries: compared with a volatile function, all that is not due would be read.

-- name: lock_due
-- Lock runs that ended long enough ago, oldest end first, up to so many events.
-- `since` passes over the index entries of what this session has deleted: VACUUM has not been there
-- yet, and every look would begin with all of them.
WITH due AS (
  SELECT e.run_id, e.ts FROM {schema}.run_events e
   CROSS JOIN LATERAL (SELECT FROM {schema}.runs r
                        WHERE r.run_id = e.run_id AND NOT ({needed}) LIMIT 1) r
   WHERE e.type = 'RunFinished'
     AND e.ts < (SELECT clock_timestamp() - make_interval(secs => %(events)s))
     AND e.ts >= coalesce(%(since)s::timestamptz, '-infinity')
   ORDER BY e.ts LIMIT 200
), locked AS (
  SELECT r.run_id, r.pruned_seq, r.last_seq, due.ts
    FROM {schema}.runs r JOIN due USING (run_id)
   WHERE r.state IN ('completed', 'failed', 'cancelled')
     FOR UPDATE OF r SKIP LOCKED
), measured AS (
  SELECT *, sum(last_seq - pruned_seq) OVER (ORDER BY ts, run_id) - (last_seq - pruned_seq)
            AS before FROM locked
)
SELECT run_id, pruned_seq, least(last_seq, pruned_seq + %(batch)s - before)::int, last_seq, ts
  FROM measured WHERE before < %(batch)s ORDER BY ts, run_id

-- name: prune
-- Delete the first events of these runs, and note up to which seq.
WITH part AS (
  SELECT * FROM unnest(%(run_ids)s::text[], %(above)s::int[], %(upto)s::int[])
                AS p(run_id, above, upto)
), gone AS (
  DELETE FROM {schema}.run_events e USING part p
   WHERE e.run_id = p.run_id AND e.seq > p.above AND e.seq <= p.upto
)
UPDATE {schema}.runs r
   SET pruned_seq = p.upto, pruned_at = CASE WHEN p.upto = r.last_seq THEN clock_timestamp() END
  FROM part p WHERE r.run_id = p.run_id

-- name: forget
-- Delete runs whose events have gone long enough ago.
-- Reads in whole: run_outbox, which is short.
WITH chosen AS (
  SELECT run_id FROM {schema}.runs
   WHERE pruned_at < (SELECT clock_timestamp() - make_interval(secs => %(runs)s))
   ORDER BY pruned_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
), letters AS (
  DELETE FROM {schema}.dead_letters l USING chosen WHERE l.run_id = chosen.run_id
), unheard AS (
  DELETE FROM {schema}.signals WHERE run_id = ANY(ARRAY(SELECT run_id FROM chosen))
), decided AS (
  DELETE FROM {schema}.decisions WHERE run_id = ANY(ARRAY(SELECT run_id FROM chosen))
), links AS (
  DELETE FROM {schema}.approval_links WHERE run_id = ANY(ARRAY(SELECT run_id FROM chosen))
), unpublished AS (
  DELETE FROM {schema}.run_outbox WHERE run_id = ANY(ARRAY(SELECT run_id FROM chosen))
)
DELETE FROM {schema}.runs r USING chosen WHERE r.run_id = chosen.run_id RETURNING r.run_id

-- name: next_due
-- Read in how many seconds the oldest events that are not needed, or the run that lost its events
-- first, are due. Events that are not due before the next look are not read: all may be needed.
SELECT extract(epoch FROM least(
  (SELECT e.ts FROM {schema}.run_events e
    CROSS JOIN LATERAL (SELECT FROM {schema}.runs r
                         WHERE r.run_id = e.run_id AND NOT ({needed}) LIMIT 1) r
    WHERE e.type = 'RunFinished'
      AND e.ts < (SELECT clock_timestamp() - make_interval(secs => %(events)s - {rest_s}))
    ORDER BY e.ts LIMIT 1)
    + make_interval(secs => %(events)s),
  (SELECT pruned_at FROM {schema}.runs WHERE pruned_at IS NOT NULL AND %(runs)s > 0
    ORDER BY pruned_at LIMIT 1) + make_interval(secs => %(runs)s)
) - clock_timestamp())::float8
