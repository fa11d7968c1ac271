-- Statements of the screen of a fleet.

-- name: plans
-- Count the last runs that ended within a minute by plan, with their time from start to end.
-- Row by row, by LIMIT: the planner would join by reading all runs.
SELECT r.plan, count(*) FILTER (WHERE e.outcome = 'completed'),
       count(*) FILTER (WHERE e.outcome = 'failed'),
       count(*) FILTER (WHERE e.outcome = 'cancelled'),
       avg(extract(epoch FROM e.ts - coalesce(r.started_at, e.ts)))::float8,
       CASE WHEN sum(count(*)) OVER () < {recent_ends} THEN 60.0
            ELSE greatest(0.001, extract(epoch FROM clock_timestamp() - min(min(e.ts)) OVER ()))
       END::float8
  FROM (SELECT run_id, ts, data ->> 'outcome' AS outcome FROM {schema}.run_events
         WHERE type = 'RunFinished' AND ts > (SELECT clock_timestamp() - interval '1 minute')
         ORDER BY ts DESC LIMIT {recent_ends}) e
 CROSS JOIN LATERAL (SELECT plan, started_at FROM {schema}.runs r
                      WHERE r.run_id = e.run_id LIMIT 1) r
 GROUP BY r.plan ORDER BY count(*) DESC, r.plan

-- name: failures
-- List the runs that failed last.
SELECT r.run_id, r.plan, e.ts, r.error
  FROM (SELECT run_id, ts FROM {schema}.run_events
         WHERE type = 'RunFinished' AND data ->> 'outcome' = 'failed'
         ORDER BY ts DESC LIMIT {failures}) e
 CROSS JOIN LATERAL (SELECT run_id, plan, error FROM {schema}.runs r
                      WHERE r.run_id = e.run_id LIMIT 1) r
 ORDER BY e.ts DESC
