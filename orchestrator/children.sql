-- Statements over the children of runs. Their parent's row is locked, by another statement.

-- name: look
-- Read how many children of a call were started, and are unfinished; how many others are; and which
-- has failed first: those that were cancelled for its sake have failed later.
SELECT least(greatest(r.children_started - %(first)s + 1, 0), %(count)s),
       (SELECT count(*)::int FROM {schema}.dispatches d
         WHERE d.parent_id = r.run_id AND d.child_no BETWEEN %(first)s AND %(last)s),
       (SELECT count(*)::int FROM {schema}.dispatches d
         WHERE d.parent_id = r.run_id AND d.child_no NOT BETWEEN %(first)s AND %(last)s),
       (SELECT c.child_no FROM {schema}.runs c
         WHERE c.parent_id = r.run_id AND c.child_no BETWEEN %(first)s AND %(last)s
           AND c.error IS NOT NULL AND NOT %(collects)s
         ORDER BY c.finished_at, c.child_no LIMIT 1),
       r.cancel_requested_at IS NOT NULL
  FROM {schema}.runs r WHERE r.run_id = %(run_id)s

-- name: look_at_rivals
-- Read how many of these children are unfinished, how many others are, and which of these has ended
-- well first.
SELECT (SELECT count(*)::int FROM {schema}.dispatches d
         WHERE d.parent_id = r.run_id AND d.child_no = ANY(%(rivals)s::int[])),
       (SELECT count(*)::int FROM {schema}.dispatches d
         WHERE d.parent_id = r.run_id AND d.child_no <> ALL(%(rivals)s::int[])),
       (SELECT c.child_no FROM {schema}.runs c
         WHERE c.parent_id = r.run_id AND c.child_no = ANY(%(rivals)s::int[])
           AND c.state = 'completed'
         ORDER BY c.finished_at, c.child_no LIMIT 1),
       r.cancel_requested_at IS NOT NULL
  FROM {schema}.runs r WHERE r.run_id = %(run_id)s

-- name: look_at_all
-- Read how many children of a run are unfinished that end with it, and how many others.
SELECT count(*) FILTER (WHERE c.root_id IS NOT NULL)::int,
       count(*) FILTER (WHERE c.root_id IS NULL)::int
  FROM {schema}.dispatches d JOIN {schema}.runs c USING (run_id) WHERE d.parent_id = %(run_id)s

-- name: removed
-- Read which child of a call that were all started was removed.
SELECT n FROM generate_series(%(first)s::int, %(last)s::int) AS n
 WHERE NOT EXISTS (SELECT FROM {schema}.runs c
                    WHERE c.parent_id = %(run_id)s AND c.child_no = n)
 LIMIT 1

-- name: failures
-- Count the children of a call, which have all ended, that have no result: those that were removed
-- have none.
SELECT %(count)s - count(*)::int FROM {schema}.runs c
 WHERE c.parent_id = %(run_id)s AND c.child_no BETWEEN %(first)s AND %(last)s
   AND c.error IS NULL

-- name: count
-- Note on the parent which is the highest number that it has given.
UPDATE {schema}.runs SET children_started = %(last)s WHERE run_id = %(run_id)s

-- name: await
-- Note when the parent, which is parked, is to be woken.
UPDATE {schema}.dispatches
   SET children_left = %(left)s, wakes_on_failure = %(on_failure)s
 WHERE run_id = %(run_id)s

-- name: stop
-- Have a relay cancel the unfinished children of a call.
WITH noted AS (
  INSERT INTO {schema}.wakes (shard, run_id, reason, first_child, last_child)
  VALUES (%(shard)s, %(run_id)s, 'cancel', %(first)s, %(last)s) RETURNING shard
)
SELECT {each_doorbell} FROM noted

-- name: stop_rivals
-- Have a relay cancel those of these children that are unfinished.
WITH noted AS (
  INSERT INTO {schema}.wakes (shard, run_id, reason, first_child, last_child)
  SELECT %(shard)s, %(run_id)s, 'cancel', d.child_no, d.child_no FROM {schema}.dispatches d
   WHERE d.parent_id = %(run_id)s AND d.child_no = ANY(%(rivals)s::int[]) RETURNING shard
)
SELECT {each_doorbell} FROM noted LIMIT 1

-- name: ends
-- Read the children with these numbers that have ended.
SELECT child_no, run_id, result, error FROM {schema}.runs
 WHERE parent_id = %(run_id)s AND child_no BETWEEN %(first)s AND %(last)s
   AND finished_at IS NOT NULL
 ORDER BY child_no

-- name: lock_to_cancel
-- Lock some children that are to be cancelled by the notes of these shards, oldest note first.
-- Those that another transaction holds are left for the next look.
SELECT r.run_id, r.shard
  FROM (SELECT run_id, first_child, last_child FROM {schema}.wakes
         WHERE shard = ANY(%(shards)s) AND reason = 'cancel' ORDER BY id LIMIT {batch}) w
 CROSS JOIN LATERAL (
   SELECT c.run_id, d.shard FROM {schema}.dispatches d
    CROSS JOIN LATERAL (
      SELECT c.run_id FROM {schema}.runs c
       WHERE c.run_id = d.run_id AND c.cancel_requested_at IS NULL
         AND (w.first_child IS NOT NULL OR c.root_id IS NOT NULL)
       LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) c
    WHERE d.parent_id = w.run_id
      AND (w.first_child IS NULL OR d.child_no BETWEEN w.first_child AND w.last_child)
    LIMIT {batch}) r
 LIMIT {batch}

-- name: forget_cancels
-- Delete the notes of these shards behind which no child is left that is to be cancelled; how many
-- notes there were, and were deleted.
WITH found AS MATERIALIZED (
  SELECT w.ctid AS place, EXISTS (
      SELECT FROM {schema}.dispatches d JOIN {schema}.runs c USING (run_id)
       WHERE d.parent_id = w.run_id AND c.cancel_requested_at IS NULL
         AND (w.first_child IS NOT NULL OR c.root_id IS NOT NULL)
         AND (w.first_child IS NULL OR d.child_no BETWEEN w.first_child AND w.last_child)) AS pending
    FROM {schema}.wakes w
   WHERE w.shard = ANY(%(shards)s) AND w.reason = 'cancel' ORDER BY w.id LIMIT {batch}
), gone AS (
  DELETE FROM {schema}.wakes WHERE ctid = ANY(ARRAY(SELECT place FROM found WHERE NOT pending))
  RETURNING 1
)
SELECT (SELECT count(*) FROM found), (SELECT count(*) FROM gone)

-- name: page
-- List the children of a run in the order of their numbers.
SELECT {run_columns}, {retried_by}, {waiting} FROM {schema}.runs r
 WHERE r.parent_id = %(run_id)s AND r.child_no > %(after)s
   AND (%(state)s::text IS NULL OR r.state = %(state)s)
   AND (%(parked)s::bool IS NULL OR {waiting} = %(parked)s)
 ORDER BY r.child_no LIMIT %(limit)s
