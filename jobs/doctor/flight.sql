-- Questions about one canary run. They write nothing.

-- name: event_times
-- List the events of a run with their times, in seconds since the epoch.
SELECT type, extract(epoch FROM ts)::float8 FROM {schema}.run_events
 WHERE run_id = %(run_id)s ORDER BY seq

-- name: dispatch_state
-- Read the state of a run's dispatch; none for one that has ended.
SELECT state FROM {schema}.dispatches WHERE run_id = %(run_id)s
