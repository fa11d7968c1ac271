-- The statements over a run's row that contradicts its journal, as only SQL can write it.

-- name: lock
-- Lock the row of a run under its lease: what is read afterwards sees what was before.
SELECT last_seq FROM {schema}.runs
 WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running' FOR NO KEY UPDATE

-- name: last_event
-- Read the last event of a run.
SELECT {event_json} FROM {schema}.run_events e WHERE e.run_id = %(run_id)s
 ORDER BY e.seq DESC LIMIT 1

-- name: mend
-- Set the last seq of a run to that of its last event.
UPDATE {schema}.runs SET last_seq = %(after)s::int WHERE run_id = %(run_id)s AND lease_token = %(token)s
