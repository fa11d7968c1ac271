-- Commits of several runs: of their boundaries, and of the output of their steps.

-- name: settle_many
-- Append a boundary each to several runs under their leases, as `settle` does to one.
-- Row by row, by LIMIT, and no row is waited for: one that another transaction holds is missing in
-- the result, as is one whose lease is gone. A run that is cancelled is left as it is.
WITH b AS MATERIALIZED (
  SELECT x.*, r.cancelled
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[], %(tokens)s::bigint[],
                %(afters)s::int[], %(ns)s::int[], %(states)s::text[], %(results)s::text[],
                %(errors)s::text[], %(delays)s::float8[], %(reasons)s::text[])
         WITH ORDINALITY AS x(run_id, shard, token, after, n, state, result, error, delay, reason, i)
   CROSS JOIN LATERAL (
     SELECT r.cancel_requested_at IS NOT NULL AS cancelled FROM {schema}.runs r
      WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'
        AND r.last_seq >= x.after
      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
), u AS (
  UPDATE {schema}.runs r
     SET last_seq = r.last_seq + b.n, state = b.state,
         result = b.result::jsonb, error = b.error::jsonb,
         lease_expires_at = CASE WHEN b.state = 'running' THEN r.lease_expires_at END,
         deadline_at = CASE WHEN b.reason <> 'undo' THEN r.deadline_at END,
         not_before = CASE WHEN b.state = 'queued'
                           THEN least(r.deadline_at,
                                      clock_timestamp() + make_interval(secs => b.delay)) END,
         finished_at = CASE WHEN b.state NOT IN ('running', 'queued') THEN clock_timestamp() END
    FROM b WHERE r.run_id = b.run_id AND NOT b.cancelled
  RETURNING b.i, b.shard, b.reason, r.run_id, r.last_seq, r.state, r.not_before, r.created_at,
            false AS cancelled, b.n
), {written_beside}
SELECT l.locked, u.last_seq, l.is_cancelled, u.state = 'running' AND {signalled}, {each_settled_doorbell}
  FROM (SELECT run_id, cancelled FROM b) AS l(locked, is_cancelled)
  LEFT JOIN u ON u.run_id = l.locked

-- name: append_many
-- Append output to several runs under their leases; they stay as they are.
-- No row is waited for, as in settle_many. The token tells which lease an answer is of: a process may
-- have two of one run.
WITH b AS MATERIALIZED (
  SELECT x.*
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[], %(tokens)s::bigint[],
                %(afters)s::int[], %(ns)s::int[])
         WITH ORDINALITY AS x(run_id, shard, token, after, n, i)
   CROSS JOIN LATERAL (
     SELECT FROM {schema}.runs r
      WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'
        AND r.last_seq >= x.after
      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
), u AS (
  UPDATE {schema}.runs r SET last_seq = r.last_seq + b.n
    FROM b WHERE r.run_id = b.run_id
  RETURNING r.run_id, b.token, b.shard, b.i, b.n, r.last_seq,
            r.cancel_requested_at IS NOT NULL AS cancelled
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT u.run_id, u.last_seq - u.n + row_number() OVER (PARTITION BY u.i ORDER BY x.k),
         clock_timestamp(), x.type, 'worker', x.step, x.attempt, x.data::jsonb
    FROM u JOIN unnest(%(places)s::int[], %(types)s::text[], %(steps)s::text[],
                       %(attempts)s::int[], %(datas)s::text[])
                WITH ORDINALITY AS x(i, type, step, attempt, data, k) USING (i)
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq - n + 1, last_seq FROM u
)
SELECT token, last_seq, cancelled, {each_events_doorbell} FROM u
