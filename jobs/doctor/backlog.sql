-- Questions of the checks of runs and events that wait. They write nothing.

-- name: unknown_plans
-- Count the unfinished runs of plans that are not known, by plan and queue, most first.
-- Reads in whole: dispatches.
SELECT task, queue, count(*) FROM {schema}.dispatches
 WHERE NOT task = ANY(%(known)s) GROUP BY 1, 2 ORDER BY 3 DESC

-- name: long_histories
-- List the longest histories among the oldest unfinished runs, from so many events on.
SELECT r.run_id, r.plan, h.events
  FROM (SELECT run_id FROM {schema}.dispatches ORDER BY run_id LIMIT {oldest_runs}) d
 CROSS JOIN LATERAL (SELECT * FROM {schema}.runs r
                      WHERE r.run_id = d.run_id AND r.last_seq >= %(many)s LIMIT 1) r
 CROSS JOIN LATERAL (
   SELECT count(*) FILTER (WHERE e.type = ANY(%(types)s::text[]))
          - count(*) FILTER (WHERE e.data ->> 'name' = %(snoozed)s) AS events
     FROM {schema}.run_events e
    WHERE e.run_id = r.run_id AND e.seq > (
      SELECT coalesce(max(seq), 0) FROM {schema}.run_events b
       WHERE b.run_id = r.run_id AND b.type = 'RunRestarted')) h
 WHERE h.events >= %(many)s ORDER BY h.events DESC LIMIT 3

-- name: unpublished
-- Read how far publishing is behind, and how many messages were given up on.
-- Reads in whole: run_outbox, which is short, to count it.
SELECT {outbox_lag}

-- name: now
-- Read the clock of Postgres.
SELECT clock_timestamp()
