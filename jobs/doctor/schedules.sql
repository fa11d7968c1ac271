-- Questions of the check of schedules. They write nothing.

-- name: stopped
-- List some of the schedules that are stopped.
SELECT name, reason FROM {schema}.schedules WHERE state = 'stopped' ORDER BY name LIMIT {names}

-- name: latest
-- Read for how many seconds the schedule that waits the longest has been due; below 0: it is not.
SELECT extract(epoch FROM clock_timestamp() - look_at)::float8, name FROM {schema}.schedules
 WHERE look_at IS NOT NULL ORDER BY look_at LIMIT 1
