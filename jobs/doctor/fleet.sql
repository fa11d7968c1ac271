-- Questions of the checks of relays and workers. They write nothing.

-- name: lost_bodies
-- Count, of pairs of a run and a pattern of its worker, those whose run that worker has lost: the
-- run's last event is older than so many seconds, and it is not running there.
SELECT count(*)
  FROM unnest(%(run_ids)s::text[], %(workers)s::text[]) AS held(run_id, worker)
  JOIN {schema}.runs r USING (run_id)
 WHERE NOT (r.state = 'running' AND r.worker LIKE held.worker)
   AND (SELECT max(ts) FROM {schema}.run_events e WHERE e.run_id = r.run_id)
       < clock_timestamp() - make_interval(secs => %(lost_after_s)s)

-- name: failing_relays
-- List the relays that show threads that fail: session, address, and those threads.
SELECT DISTINCT a.pid, coalesce(host(a.client_addr), 'a local socket'),
       split_part(a.application_name, {failing_mark}, 2)
  FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({leader_key})::oid AND strpos(a.application_name, {failing_mark}) > 0
 ORDER BY a.pid

-- name: failing_workers
-- List the workers that were there a moment ago and have threads that fail, with those threads.
SELECT hostname, failing FROM {schema}.workers
 WHERE failing <> '{}' AND seen_at > clock_timestamp() - make_interval(secs => %(expires_s)s)
 ORDER BY hostname
