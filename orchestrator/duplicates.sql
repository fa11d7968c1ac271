-- Statements by which runs with a dedupe key are started.

-- name: lock
-- Have the starts with these keys happen one after another, until the end of this transaction.
-- In a statement of its own: the next one sees what was committed while this waited.
SELECT pg_advisory_xact_lock(hashtextextended('{schema}/' || key, 0))
  FROM unnest(%(keys)s::text[]) AS key

-- name: used
-- Read which of these ids and keys runs have.
SELECT run_id, key FROM {schema}.runs
 WHERE run_id = ANY(%(run_ids)s::text[])
    OR namespace = %(namespace)s AND key = ANY(%(keys)s::text[])

-- name: unfinished
-- Read the unfinished runs of a plan with this dedupe key, the successor first.
SELECT {run_columns}, {retried_by}, {waiting}
  FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
 WHERE d.task = %(plan)s AND d.dedupe_key = %(dispatch_key)s
 ORDER BY d.dedupe_next DESC

-- fragment: moves
-- Whether a dispatch `d` gets another time with the input of its run `u`: not that of a successor, for
-- its time comes with the end of another run; nor if it is due already, for it may be sent.
NOT d.dedupe_next AND (d.state = 'delayed' OR u.not_before > clock_timestamp())

-- name: replace_input
-- Give the last unfinished run with this dedupe key another input, and another time; nothing if it
-- has begun, or if there is none.
-- Decided on the locked row: a claim has the one input or the other, and its events say so.
WITH u AS (
  UPDATE {schema}.runs r
     SET input = %(input)s::jsonb, default_input = %(default_input)s,
         limits = %(limits)s::jsonb, last_seq = last_seq + 1,
         not_before = clock_timestamp() + make_interval(secs => least(%(debounce)s,
           %(max_wait)s - extract(epoch FROM clock_timestamp() - created_at)::float8))
   WHERE run_id = (SELECT d.run_id FROM {schema}.dispatches d
                    WHERE d.task = %(plan)s AND d.dedupe_key = %(dispatch_key)s
                    ORDER BY d.dedupe_next DESC LIMIT 1)
     AND state = 'queued' AND attempt = 0 AND retry_of IS NULL
     AND cancel_requested_at IS NULL AND last_seq < 2147483646
  RETURNING r.*
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
  SELECT run_id, last_seq, clock_timestamp(), 'InputReplaced', 'api',
         jsonb_build_object('not_before', (extract(epoch FROM not_before) * 1000)::bigint)
    FROM u
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT d.shard, run_id, last_seq, last_seq FROM u JOIN {schema}.dispatches d USING (run_id)
), d AS (
  UPDATE {schema}.dispatches d
     SET state = CASE WHEN NOT ({moves}) THEN d.state
                      WHEN u.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
         due_at = CASE WHEN {moves} THEN u.not_before ELSE d.due_at END,
         reason = CASE WHEN {moves} THEN 'delay' ELSE d.reason END,
         limit_id = u.limits -> 0 ->> 'id'
    FROM u WHERE d.run_id = u.run_id
  RETURNING d.shard
)
SELECT {run_columns}, {each_doorbell} FROM u AS r CROSS JOIN d

-- name: note
-- Have a relay look at a successor: its predecessor may have ended meanwhile.
INSERT INTO {schema}.wakes (shard, run_id, reason, plan, dedupe_key)
VALUES (%(shard)s, %(run_id)s, 'next', %(plan)s, %(dispatch_key)s)
