-- The commit of the boundaries of several runs.

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
