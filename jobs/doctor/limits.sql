-- Questions of the check of limits. They write nothing.

-- name: set
-- List the limits that a person has set, of all namespaces, and whether that is a rate.
SELECT DISTINCT substr(name, strpos(name, '~') + 1), is_rate
  FROM (SELECT name, false AS is_rate FROM {schema}.limit_settings
        UNION ALL SELECT name, true FROM {schema}.rate_settings) s
 ORDER BY 1, 2

-- name: left
-- List some of the slots whose run has no lease, and does not keep them until its end.
SELECT s.run_id, s.limit_id FROM {schema}.limit_slots s LEFT JOIN {schema}.runs r USING (run_id)
 WHERE r.state IS DISTINCT FROM 'running'
   AND NOT coalesce(r.state = 'queued' AND {schema}.keeps_slot(r.limits, s.limit_id), false)
 ORDER BY s.taken_at LIMIT {names}

-- name: late
-- List the limits whose runs have waited the longest, if longer than that.
-- Reads in whole: dispatches, those that wait for limits. For a person who asks.
SELECT limit_id, count(*), extract(epoch FROM clock_timestamp() - min(limit_since))::float8
  FROM {schema}.dispatches WHERE state = 'delayed' AND reason = 'limit'
 GROUP BY limit_id
HAVING min(limit_since) < clock_timestamp() - make_interval(secs => %(max_wait_s)s)
 ORDER BY 3 DESC LIMIT {names}
