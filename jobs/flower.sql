-- The statement by which Flower's listener catches up.

-- name: newest
-- List the newest runs of all namespaces, newest first.
SELECT run_id, last_seq FROM {schema}.runs ORDER BY created_at DESC LIMIT %(limit)s
