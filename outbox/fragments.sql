-- Text that statements of several files share.

-- fragment: event_json
-- One event as the JSON text that every reader gets, built by Postgres (2.4 x json.dumps).
-- `date_part` is a float, `extract` a numeric: the event would take a tenth longer. An infinite time
-- is the largest integer of any reader's JSON.
'{"run_id":"' || e.run_id || '","seq":' || e.seq
 || ',"ts":' || least(greatest(date_part('epoch', e.ts) * 1000, -9007199254740991),
                         9007199254740991)::bigint
 || ',"type":"' || e.type || '","v":' || e.v || ',"source":"' || e.source || '"'
 || CASE WHEN e.step IS NULL THEN '' ELSE ',"step":' || to_json(e.step)::text END
 || CASE WHEN e.attempt IS NULL THEN '' ELSE ',"attempt":' || e.attempt END
 || CASE WHEN e.data IS NULL THEN '' ELSE ',"data":' || e.data::text END || '}'

-- fragment: bell_key
-- First key of the advisory locks by which a relay sleeps; the second is the shard.
'{schema}.run_outbox'::regclass::oid::int4

-- fragment: leader_key
-- First key of the advisory locks by which a relay leads; the second is the shard.
'{schema}.dispatches'::regclass::oid::int4

-- fragment: chore_key
-- First key of the advisory locks by which a relay does a chore; the second is the chore's place.
'{schema}.run_events'::regclass::oid::int4

-- fragment: asleep
-- Whether the relay of %(shard)s sleeps. Holds its probe until the commit.
-- The shared advisory lock is released after the rows are visible, so the exclusive lock that the
-- relay needs to fall asleep comes later and its last look sees them.
NOT pg_try_advisory_xact_lock_shared({bell_key}, %(shard)s)

-- fragment: each_asleep
-- `asleep`, for rows with a column `shard`.
NOT pg_try_advisory_xact_lock_shared({bell_key}, shard)

-- fragment: doorbell
-- Ring the relay of %(shard)s, but only if it sleeps.
CASE WHEN {asleep} THEN pg_notify('beatless_{schema}', (%(shard)s)::text) END

-- fragment: each_doorbell
-- `doorbell`, for rows with a column `shard`.
CASE WHEN {each_asleep} THEN pg_notify('beatless_{schema}', (shard)::text) END

-- fragment: events_doorbell
-- `doorbell`, where there is nothing to look for but events.
CASE WHEN {asleep} THEN pg_notify('beatless_{schema}', (%(shard)s)::text || ' events') END

-- fragment: each_events_doorbell
-- `events_doorbell`, for rows with a column `shard`.
CASE WHEN {each_asleep} THEN pg_notify('beatless_{schema}', shard::text || ' events') END

-- fragment: claim_doorbell
-- `doorbell`, where a run was claimed: its dispatch has another due time, and none is due.
CASE WHEN {asleep} THEN pg_notify('beatless_{schema}', (%(shard)s)::text || ' claim') END

-- fragment: each_claim_doorbell
-- `claim_doorbell`, for rows with a column `shard`.
CASE WHEN {each_asleep} THEN pg_notify('beatless_{schema}', shard::text || ' claim') END

-- fragment: origin
-- The history of this schema, told from every other: 16 hexadecimal digits at most.
-- Of the cluster, the database, the table and the row. A dump that is restored makes another table,
-- or at least another row (its xmin), be it into the same cluster. A copy of the whole cluster, as
-- a snapshot of its disk, is the same until it is renewed.
(SELECT to_hex(hashtextextended(concat_ws('/', system_identifier,
  (SELECT oid FROM pg_database WHERE datname = current_database()),
  '{schema}.history'::regclass::oid,
  (SELECT concat_ws('/', xmin, token) FROM {schema}.history LIMIT 1)), 0))
  FROM pg_control_system())

-- fragment: firable
-- Whether relays look at a schedule, and this version knows how to fire it.
-- One with a rule of a newer version waits for a relay of that version.
look_at IS NOT NULL AND state = 'active' AND (cron IS NULL) <> (every IS NULL)
  AND catch_up IN ('one', 'all', 'none') AND overlap IN ('allow', 'skip', 'replace')

-- fragment: oldest_unpublished
-- The time of the oldest event that is not published yet.
(SELECT min(e.ts) FROM generate_series(0, {last_shard}) AS own(shard) CROSS JOIN LATERAL (
     SELECT run_id, from_seq FROM {schema}.run_outbox o WHERE o.shard = own.shard
      ORDER BY id LIMIT 1) o
   JOIN {schema}.run_events e ON e.run_id = o.run_id AND e.seq = o.from_seq)

-- fragment: outbox_lag
-- Three columns: appends that are not published, the oldest's age in seconds, dead letters.
(SELECT count(*) FROM {schema}.run_outbox),
extract(epoch FROM clock_timestamp() - {oldest_unpublished})::float8,
(SELECT count(*) FROM {schema}.dead_letters)

-- fragment: failing_mark
-- Separates the name of a relay's session from those of its threads that fail.
'; failing: '
