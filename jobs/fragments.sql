-- Text that statements of several files of this package share.

-- fragment: any_token
-- Whether there is a token that is not for a single stream, so that everybody needs one.
EXISTS (SELECT FROM {schema}.api_tokens WHERE run_id IS NULL)

-- fragment: maker_is_good
-- Whether the token that has made `t` has neither expired nor been revoked. Also if none has.
-- The maker '' is whoever made one while there was none.
CASE WHEN t.maker IS NULL THEN true
     WHEN t.maker = '' THEN NOT {any_token}
     ELSE EXISTS (SELECT FROM {schema}.api_tokens m WHERE m.id = t.maker
                     AND (m.expires_at IS NULL OR m.expires_at > clock_timestamp())) END

-- fragment: unfit
-- Rows of unfinished runs, and of the outbox, that the columns can hold and the product never
-- writes: no relay can act on them.
SELECT 'I7', run_id, format('its dispatch is in shard %%s, which no relay leads', shard)
  FROM {schema}.dispatches WHERE shard NOT BETWEEN 0 AND {last_shard}
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch is due at %%s: nothing will look at it', due_at)
  FROM {schema}.dispatches WHERE due_at >= '10000-01-01Z'
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch counts %%s messages', attempts)
  FROM {schema}.dispatches WHERE (attempts < 0 OR attempts >= 2147483646)
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch names plan %%s, the run is of plan %%s', d.task, r.plan)
  FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id) WHERE d.task <> r.plan
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, 'one of its counters has reached its end: no worker can take it'
  FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
 WHERE (r.attempt = 2147483647 OR r.last_seq >= 2147483646
        OR r.lease_token = 9223372036854775807)
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I8', run_id, format('outbox row %%s is in shard %%s, which no relay leads', id, shard)
  FROM {schema}.run_outbox WHERE shard NOT BETWEEN 0 AND {last_shard}
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
