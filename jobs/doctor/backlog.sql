-- Questions of the checks of runs and events that wait. They write nothing.

-- name: unknown_plans
-- Count the unfinished runs of plans that are not known, by plan and queue, most first.
-- Reads in whole: dispatches.
SELECT task, queue, count(*) FROM {schema}.dispatches
 WHERE NOT task = ANY(%(known)s) GROUP BY 1, 2 ORDER BY 3 DESC

-- name: unpublished
-- Read how far publishing is behind, and how many messages were given up on.
-- Reads in whole: run_outbox, which is short, to count it.
SELECT {outbox_lag}

-- name: now
-- Read the clock of Postgres.
SELECT clock_timestamp()
