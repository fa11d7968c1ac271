-- The commit of the boundaries of several runs.

-- name: settle_many
-- Append a boundary each to several runs under their leases, as `settle` does to one.
-- Row by row, by LIMIT, and no row is waited for: one that another transaction holds is missing in
-- the result, as is one whose lease is gone.
WITH b AS MATERIALIZED (
  SELECT x.i, x.run_id, x.shard, x.reason, r.cancelled,
         CASE WHEN r.cancelled THEN x.n_cancelled ELSE x.n END AS n,
         CASE WHEN r.cancelled THEN x.state_cancelled ELSE x.state END AS state,
         CASE WHEN NOT r.cancelled THEN x.result END AS result,
         CASE WHEN r.cancelled THEN x.error_cancelled ELSE x.error END AS error,
         CASE WHEN r.cancelled THEN x.delay_cancelled ELSE x.delay END AS delay
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[], %(tokens)s::bigint[],
                %(afters)s::int[], %(ns)s::int[], %(ns_cancelled)s::int[], %(states)s::text[],
                %(states_cancelled)s::text[], %(results)s::text[], %(errors)s::text[],
                %(errors_cancelled)s::text[], %(delays)s::float8[], %(delays_cancelled)s::float8[],
                %(reasons)s::text[])
         WITH ORDINALITY AS x(run_id, shard, token, after, n, n_cancelled, state, state_cancelled,
                              result, error, error_cancelled, delay, delay_cancelled, reason, i)
   CROSS JOIN LATERAL (
     SELECT r.cancel_requested_at IS NOT NULL AS cancelled FROM {schema}.runs r
      WHERE r.run_id = x.run_id AND r.lease_token = x.token AND r.state = 'running'
        AND r.last_seq >= x.after
      LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) r
), u AS (
  UPDATE {schema}.runs r
     SET last_seq = r.last_seq + b.n, state = b.state, result = b.result::jsonb,
         error = b.error::jsonb,
         lease_expires_at = CASE WHEN b.state = 'running' THEN r.lease_expires_at END,
         not_before = CASE WHEN b.state = 'queued'
                           THEN least(CASE WHEN NOT b.cancelled THEN r.deadline_at END,
                                      clock_timestamp() + make_interval(secs => b.delay)) END,
         finished_at = CASE WHEN b.state NOT IN ('running', 'queued') THEN clock_timestamp() END
    FROM b WHERE r.run_id = b.run_id
  RETURNING b.i, b.shard, b.reason, b.cancelled, b.n, r.run_id, r.last_seq, r.state, r.not_before
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT u.run_id, u.last_seq - u.n + row_number() OVER (PARTITION BY u.i ORDER BY x.k),
         clock_timestamp(), x.type, 'worker', x.step, x.attempt,
         CASE WHEN x.type = 'StepFailed'
              THEN x.data::jsonb || jsonb_build_object(
                     'retry_at', (extract(epoch FROM u.not_before) * 1000)::bigint)
              ELSE x.data::jsonb END
    FROM u JOIN unnest(%(places)s::int[], %(branches)s::bool[], %(types)s::text[],
                       %(steps)s::text[], %(attempts)s::int[], %(datas)s::text[])
                WITH ORDINALITY AS x(i, branch, type, step, attempt, data, k)
           ON x.i = u.i AND x.branch = u.cancelled
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq - (n) + 1, last_seq FROM u WHERE n > 0
), gone AS (
  DELETE FROM {schema}.dispatches d USING u
   WHERE d.run_id = u.run_id AND u.state NOT IN ('queued', 'running')
), later AS (
  UPDATE {schema}.dispatches d
     SET state = CASE WHEN u.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
         due_at = u.not_before, reason = u.reason
    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'
)
SELECT run_id, last_seq, cancelled, {each_doorbell} FROM u
