-- Statements over groups of runs, for people.

-- name: list
-- List the groups of a namespace that have unfinished runs or a weight, by name and queue.
-- Reads in whole: dispatches, and the weights. For a person who asks.
WITH used AS (
  SELECT group_id, queue, count(*) FILTER (WHERE state = 'running') AS running,
         count(*) FILTER (WHERE state IN ('waiting', 'sent')) AS waiting,
         min(due_at) FILTER (WHERE state = 'waiting') AS oldest
    FROM {schema}.dispatches
   WHERE starts_with(group_id, %(prefix)s) AND (%(queue)s::text IS NULL OR queue = %(queue)s)
   GROUP BY group_id, queue
)
SELECT substr(group_id, length(%(prefix)s::text) + 1), u.queue, coalesce(w.weight, 1),
       coalesce(u.running, 0), coalesce(u.waiting, 0), u.oldest
  FROM used u FULL JOIN {schema}.group_weights w USING (group_id)
 WHERE starts_with(group_id, %(prefix)s)
   AND (%(queue)s::text IS NULL OR u.queue IS NOT NULL)
 ORDER BY 1, 2 LIMIT %(limit)s

-- name: set
-- Give a group a weight.
INSERT INTO {schema}.group_weights (group_id, weight) VALUES (%(group_id)s, %(weight)s)
ON CONFLICT (group_id) DO UPDATE
   SET weight = excluded.weight, changed_at = clock_timestamp()

-- name: forget
-- Give a group the weight that all have without one.
DELETE FROM {schema}.group_weights WHERE group_id = %(group_id)s
