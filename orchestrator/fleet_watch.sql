-- Statements by which processes notice that whole workers have died.

-- fragment: watch_key
-- First key of the session locks of workers' keepers; the second is the keeper's number.
'{schema}.workers'::regclass::oid::int4

-- name: members
-- List the keepers that hold a number, each with what names its worker, and the next transaction id.
-- If there is none: one row, without a number.
SELECT m.number, m.worker, pg_snapshot_xmax(pg_current_snapshot())::text::int8
  FROM (VALUES (1)) AS one LEFT JOIN (
    SELECT l.objid::int8, substring(a.application_name FROM %(keeper)s)
      FROM pg_locks l JOIN pg_stat_activity a USING (pid)
     WHERE l.locktype = 'advisory' AND l.granted
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND l.classid = ({watch_key})::oid AND l.objsubid = 2
       AND substring(a.application_name FROM %(keeper)s) IS NOT NULL) AS m(number, worker) ON true

-- name: sessions
-- List the workers of which any process has a session.
SELECT DISTINCT substring(application_name FROM %(any)s) FROM pg_stat_activity
 WHERE datname = current_database() AND substring(application_name FROM %(any)s) IS NOT NULL

-- name: take_number
-- Take the lock of a number, unless another session has it.
SELECT pg_try_advisory_lock({watch_key}, %(number)s)

-- name: give_number
-- Give back the lock of a number.
SELECT pg_advisory_unlock({watch_key}, %(number)s)

-- name: await_number
-- Wait until the session that has the lock of a number is gone.
SELECT pg_advisory_lock({watch_key}, %(number)s)

-- name: end_waits
-- Cancel the waits of all watches, where this role may: each has a snapshot.
SELECT count(pg_cancel_backend(l.pid))
  FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND NOT l.granted
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({watch_key})::oid AND l.objsubid = 2
   AND a.usename = current_user

-- name: announce
-- Tell the relays that a worker has come.
SELECT pg_notify(%(channel)s, %(message)s)

-- name: outlast
-- Let this session outlast a network that is cut: a lease ends sooner.
-- Else the server would end it after some seconds, and that is no proof of a death.
SELECT set_config('tcp_keepalives_idle', %(idle_s)s, false),
       set_config('tcp_user_timeout', '0', false)
