-- Commits of several runs: of their boundaries, and of the output of their steps.

-- name: settle_many
-- Append a boundary each to several runs under their leases, as `settle` does to one.
-- Row by row, by LIMIT, and no row is waited for: one that another transaction holds is missing in
-- the result, as is one whose lease is gone.
WITH b AS MATERIALIZED (
  SELECT x.*
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[], %(tokens)s::bigint[],
                %(afters)s::int[], %(ns)s::int[], %(ns_cancelled)s::int[], %(states)s::text[],
                %(states_cancelled)s::text[], %(results)s::text[], %(errors)s::text[],
                %(errors_cancelled)s::text[], %(delays)s::float8[], %(delays_cancelled)s::float8[],
                %(reasons)s::text[])
         WITH ORDINALITY AS x(run_id, shard, token, after, n, n_cancelled, state, state_cancelled,
                              result, error, error_cancelled, delay, delay_cancelled, reason, i)
   CROSS JOIN LATERAL (
     SELECT FROM {schema}.runs r
      WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'
        AND r.last_seq >= x.after
      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
), u AS (
  UPDATE {schema}.runs r
     SET {settled}
    FROM b WHERE r.run_id = b.run_id
  RETURNING {settled_columns}
), {written_beside}
SELECT run_id, last_seq, cancelled, u.state = 'running' AND {signalled}, {each_settled_doorbell} FROM u

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
