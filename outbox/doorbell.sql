-- Statements of the wake-up protocol over the sessions of relays.

-- name: end_silent
-- End the sessions of relays that have sent no statement for so many seconds.
-- A relay's sessions are its first one and those that are named after that one's pid.
WITH bound AS (
  SELECT DISTINCT pid FROM pg_locks
   WHERE locktype = 'advisory' AND objsubid = 2
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
     AND (classid = ({leader_key})::oid
          OR classid = ({bell_key})::oid AND mode = 'ExclusiveLock')
), kin AS (
  SELECT a.pid, a.state_change,
         coalesce(substring(a.application_name FROM %(sibling)s)::int, a.pid) AS relay
    FROM pg_stat_activity a JOIN bound USING (pid) WHERE a.usename = current_user
), silent AS (
  SELECT relay FROM kin WHERE relay <> pg_backend_pid() GROUP BY relay
  HAVING max(state_change) < clock_timestamp() - make_interval(secs => %(seconds)s)
)
SELECT relay, pg_terminate_backend(pid, 1000) FROM kin JOIN silent USING (relay)

-- name: show_failing
-- Append the threads that fail to this session's name in pg_stat_activity, in the place of others.
SELECT set_config('application_name', concat_ws({failing_mark},
  split_part(current_setting('application_name'), {failing_mark}, 1), nullif(%(threads)s, '')), false)
