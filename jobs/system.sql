-- Statements about a fleet as it is now.

-- name: versions_and_lag
-- Read the version of Postgres, and how far publishing is behind.
-- Reads in whole: run_outbox, which is short, to count it.
SELECT current_setting('server_version'), {outbox_lag}

-- name: relays
-- List the sessions that hold leader locks, and which: each relay holds the one above all shards.
SELECT l.pid, l.objid::int8, a.application_name, host(a.client_addr), a.backend_start
  FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({leader_key})::oid
 ORDER BY a.backend_start, l.pid, l.objid
