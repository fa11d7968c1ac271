-- Statements over the leader locks, of which each relay holds those of its shards.

-- name: leaders
-- List the sessions that hold leader locks, each with its shard, and what names this history.
SELECT objid::int8, pid, {origin} FROM pg_locks
 WHERE locktype = 'advisory' AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND classid = ({leader_key})::oid AND objsubid = 2

-- name: lead
-- Take the lock of a shard, unless another relay has it.
SELECT pg_try_advisory_lock({leader_key}, %(shard)s)

-- name: give_back
-- Give back the lock of a shard.
SELECT pg_advisory_unlock({leader_key}, %(shard)s)
