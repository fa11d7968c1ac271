-- Facts about the database that several checks ask for.

-- name: is_replica
-- Tell whether this server replays another one's log, so that nothing can be written to it.
SELECT pg_is_in_recovery()

-- name: clock
-- Read the clock of Postgres, in seconds since the epoch.
SELECT extract(epoch FROM clock_timestamp())::float8

-- name: leads
-- List the advisory locks of relays: (shard, session); from the number of shards on they are the
-- memberships of the relays themselves.
SELECT l.objid::int8, l.pid FROM pg_locks l
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid = ({leader_key})::oid
