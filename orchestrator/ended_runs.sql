-- Statements by which a relay counts the stored runs that have ended.

-- name: count_page
-- Count some of the runs by queue and state, in the order of their ids.
SELECT queue, state, count(*), max(run_id)
  FROM (SELECT run_id, queue, state FROM {schema}.runs WHERE run_id > %(after)s
         ORDER BY run_id LIMIT {page_runs}) r
 GROUP BY queue, state

-- name: newest_end
-- Read when the last run has ended.
SELECT max(ts) FROM (SELECT ts FROM {schema}.run_events WHERE type = 'RunFinished'
                      ORDER BY ts DESC LIMIT 1) e

-- name: store
-- Note how many runs of each queue have ended, in place of what was noted.
WITH counted AS (
  SELECT * FROM unnest(%(queues)s::text[], %(completed)s::bigint[], %(failed)s::bigint[],
                       %(cancelled)s::bigint[]) AS c(queue, completed, failed, cancelled)
), gone AS (
  DELETE FROM {schema}.ended_runs WHERE queue <> ALL(%(queues)s::text[])
)
INSERT INTO {schema}.ended_runs SELECT queue, completed, failed, cancelled FROM counted
ON CONFLICT (queue) DO UPDATE
   SET completed = excluded.completed, failed = excluded.failed, cancelled = excluded.cancelled
