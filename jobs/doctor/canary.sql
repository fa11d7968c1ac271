-- Questions of the canary check. They write nothing.

-- name: paused_queues
-- List the queues that are paused.
SELECT name FROM {schema}.queues WHERE paused_at IS NOT NULL
