-- The statement by which Flower's listener catches up.

-- name: newest
-- List the newest runs of all namespaces, newest first.
-- By the index of each namespace: no other is in the order of time.
WITH RECURSIVE known(namespace) AS (
  (SELECT namespace FROM {schema}.runs ORDER BY namespace LIMIT 1)
  UNION ALL
  SELECT n.namespace FROM known CROSS JOIN LATERAL (
    SELECT namespace FROM {schema}.runs WHERE namespace > known.namespace
     ORDER BY namespace LIMIT 1) n
)
SELECT r.run_id, r.last_seq FROM known CROSS JOIN LATERAL (
  SELECT run_id, last_seq, created_at FROM {schema}.runs WHERE namespace = known.namespace
   ORDER BY created_at DESC LIMIT %(limit)s) r
 ORDER BY r.created_at DESC LIMIT %(limit)s
