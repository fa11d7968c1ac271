-- Statements of the tail of a namespace.

-- name: clock
-- Read the time, and that of the oldest event that is not published yet.
SELECT clock_timestamp(), {oldest_unpublished}

-- name: look_up
-- Read of these runs whether a tail shows them, the last event, and the last that it does not show.
-- A run that was started since the tail began is shown from its first event.
SELECT r.run_id, r.plan, r.last_seq,
       r.namespace = %(namespace)s
       AND (%(plans)s::text[] IS NULL OR r.plan = ANY(%(plans)s::text[]))
       AND (%(queue)s::text IS NULL OR r.queue = %(queue)s::text)
       AND (%(tags)s::jsonb IS NULL OR r.tags @> %(tags)s::jsonb),
       greatest(r.pruned_seq, CASE WHEN r.created_at >= %(began)s::timestamptz THEN 0 ELSE (
         SELECT e.seq FROM {schema}.run_events e
          WHERE e.run_id = r.run_id AND e.ts < %(began)s::timestamptz
          ORDER BY e.seq DESC LIMIT 1) END)
  FROM {schema}.runs r WHERE r.run_id = ANY(%(run_ids)s)

-- name: started
-- List the runs of a namespace that were started after another, in the order of their starts.
SELECT created_at, run_id, true FROM {schema}.runs
 WHERE namespace = %(namespace)s
   AND (created_at, run_id) > (%(after_at)s::timestamptz, %(after_id)s::text)
 ORDER BY created_at, run_id LIMIT {page_runs}

-- name: ended
-- List the runs that ended after another, in the order of their ends; whether it was before a time that
-- each was started.
SELECT e.ts, e.run_id, (SELECT r.created_at < %(since)s::timestamptz FROM {schema}.runs r
                         WHERE r.run_id = e.run_id)
  FROM {schema}.run_events e
 WHERE type = 'RunFinished' AND ts >= %(after_at)s::timestamptz
   AND (ts, run_id) > (%(after_at)s::timestamptz, %(after_id)s::text)
 ORDER BY ts, run_id LIMIT {page_runs}

-- name: moved
-- List unfinished runs in the order of their ids, and whether each has had an event since a time, and was
-- started before another.
SELECT d.run_id,
       (SELECT e.ts >= %(moved)s::timestamptz AND r.created_at < %(since)s::timestamptz FROM {schema}.runs r
          JOIN {schema}.run_events e ON e.run_id = r.run_id AND e.seq = r.last_seq
         WHERE r.run_id = d.run_id)
  FROM {schema}.dispatches d WHERE d.run_id > %(after_id)s::text
 ORDER BY d.run_id LIMIT {page_runs}
