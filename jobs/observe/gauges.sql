-- Values that Postgres alone knows, for Prometheus.

-- name: snapshot
-- The time, the usage of the notification queue, the outbox's lag, and unfinished runs: counted by
-- queue and state, and by task those at an unknown step; the workers that consume each queue, and queues
-- of workers that have not told since Postgres has started; the runs
-- of each limit by its name, and since when they wait; the groups of each queue, and the largest; for how
-- long a tick of a schedule has been due, schedules that are stopped, and when some have last fired.
-- Reads in whole: dispatches, run_outbox, to count them.
WITH active AS MATERIALIZED (
          SELECT queue, group_id, CASE WHEN state = 'running' THEN state
                             WHEN state = 'delayed' AND reason = 'wait' THEN 'waiting'
                             WHEN state = 'delayed' AND reason = 'limit' THEN 'limited'
                             WHEN state <> 'sent' AND due_at > clock_timestamp() THEN 'delayed'
                             WHEN queue IN (SELECT name FROM {schema}.queues
                                             WHERE paused_at IS NOT NULL) THEN 'paused'
                             ELSE 'queued' END AS state, count(*) AS runs
            FROM {schema}.dispatches GROUP BY 1, 2, 3)
SELECT extract(epoch FROM clock_timestamp())::float8, pg_notification_queue_usage(),
       {outbox_lag},
       (SELECT jsonb_agg(jsonb_build_array(queue, state, runs)) FROM (
          SELECT queue, state, sum(runs) AS runs FROM active GROUP BY 1, 2) t),
       (SELECT jsonb_agg(jsonb_build_array(queue, groups, most)) FROM (
          SELECT queue, count(*) AS groups, max(runs) AS most FROM active
           WHERE state IN ('queued', 'paused') AND group_id <> '' GROUP BY 1) t),
       (SELECT jsonb_agg(jsonb_build_array(name, running, waiting, oldest_s)) FROM (
          SELECT substr(name, strpos(name, '~') + 1) AS name, count(*) - count(since) AS running,
                 count(since) AS waiting,
                 coalesce(extract(epoch FROM clock_timestamp() - min(since)), 0)::float8 AS oldest_s
            FROM (SELECT split_part(limit_id, ':', 1) AS name, NULL::timestamptz AS since
                    FROM {schema}.limit_slots
                  UNION ALL
                  SELECT split_part(limit_id, ':', 1), limit_since
                    FROM {schema}.dispatches WHERE state = 'delayed' AND reason = 'limit') l
           GROUP BY 1) t),
       (SELECT jsonb_object_agg(task, runs) FROM (
          SELECT task, count(*) AS runs FROM {schema}.dispatches
           WHERE reason = ANY(%(unknown)s::text[]) GROUP BY 1) t),
       (SELECT jsonb_object_agg(queue, workers) FROM (
          SELECT queue, count(*) AS workers
            FROM {schema}.workers CROSS JOIN unnest(queues) AS queue
           WHERE seen_at > clock_timestamp() - make_interval(secs => {presence_expires_s})
           GROUP BY 1) t),
       -- While Postgres was away no worker could tell that it is there.
       (SELECT jsonb_agg(DISTINCT queue)
          FROM {schema}.workers CROSS JOIN unnest(queues) AS queue
         WHERE seen_at < pg_postmaster_start_time()
           AND pg_postmaster_start_time()
               > clock_timestamp() - make_interval(secs => {unheard_s})),
       (SELECT extract(epoch FROM clock_timestamp() - look_at)::float8 FROM {schema}.schedules
         WHERE look_at IS NOT NULL ORDER BY look_at LIMIT 1),
       (SELECT count(*) FROM {schema}.schedules WHERE state = 'stopped'),
       (SELECT jsonb_object_agg(name, extract(epoch FROM last_fired_at)::float8)
          FROM {schema}.schedules
         WHERE namespace = 'default' AND name = ANY(%(schedules)s::text[])
           AND last_fired_at IS NOT NULL)
