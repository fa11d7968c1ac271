-- Questions of the checks of the database. They write nothing.

-- name: ping
-- Make the round trip that is timed.
SELECT 1

-- name: version
-- Read the version as a number: 180006 is 18.6.
SELECT current_setting('server_version_num')::int

-- name: is_read_only
-- Tell whether the transactions of this user or database are read-only by default.
SELECT current_setting('transaction_read_only') = 'on'

-- name: encoding
-- Read the database and its encoding.
SELECT current_database(), current_setting('server_encoding')

-- name: other_settings
-- List settings of this session, with their values, that are not as wanted.
SELECT name, current_setting(name, true)
  FROM unnest(%(names)s::text[], %(values)s::text[]) AS s(name, value)
 WHERE current_setting(name, true) <> value

-- name: server
-- Identify the server and the database, and tell whether it is a replica.
SELECT current_database(), system_identifier, pg_is_in_recovery() FROM pg_control_system()

-- name: notify
-- Send a notification.
SELECT pg_notify(%(channel)s, '')

-- name: notify_queue
-- Read how much of the queue of notifications is in use, from 0 to 1.
SELECT pg_notification_queue_usage()

-- name: not_durable
-- List the settings that are off and without which a power cut takes back commits.
SELECT name
  FROM unnest(ARRAY['fsync', 'synchronous_commit', 'full_page_writes']) WITH ORDINALITY s(name, place)
 WHERE current_setting(name) = 'off' ORDER BY place

-- name: old_transaction
-- Find the client whose transaction is the oldest, if it is older than so many seconds. A session of ours
-- that stands in line for a lock begins its wait anew about each minute: it may be older.
SELECT pid, coalesce(nullif(application_name, ''), backend_type), state,
       extract(epoch FROM clock_timestamp() - xact_start)::float8
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND xact_start < clock_timestamp() - make_interval(secs => %(old)s)
   AND backend_type = 'client backend'
   AND NOT (application_name LIKE 'beatless %%' AND wait_event_type = 'Lock' AND wait_event = 'advisory'
            AND xact_start > clock_timestamp() - make_interval(secs => %(in_line)s))
 ORDER BY xact_start LIMIT 1

-- name: prepared_transactions
-- Count the prepared transactions of the server.
SELECT count(*) FROM pg_prepared_xacts

-- name: connections
-- Count the connections of clients, and those that there may be.
SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
       current_setting('max_connections')::int
         - current_setting('superuser_reserved_connections')::int

-- name: transaction_id_age
-- Read how many transactions ago the oldest row of this database that is not frozen was written.
SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()

-- name: dead_rows
-- List the tables of the schema with their dead and living rows, and whether autovacuum is off.
SELECT s.relname, s.n_dead_tup, s.n_live_tup,
       coalesce('autovacuum_enabled=false' = ANY(c.reloptions), false)
         OR current_setting('autovacuum') = 'off'
  FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
 WHERE s.schemaname = %(schema)s ORDER BY s.n_dead_tup DESC
