-- Text that statements of several files of this package share.

-- fragment: run_columns
-- The columns of a run `r`, in the order in which a `Run` is made of them.
r.run_id, r.namespace, r.plan, r.plan_version, r.queue, r.state, r.input, r.result, r.error, r.key,
r.last_seq, r.attempt, r.worker, r.cancel_requested_at, r.not_before, r.deadline_at, r.retry_of,
r.parent_id, r.child_no, r.created_at, r.started_at, r.finished_at, r.pruned_seq, {run_options}

-- fragment: retried_by
-- The id of the newest retry of a run `r`.
(SELECT n.run_id FROM {schema}.runs n WHERE n.retry_of = r.run_id
  ORDER BY n.created_at DESC LIMIT 1) AS retried_by

-- fragment: needed
-- Whether a run `r` is a child whose parent, or the root of whose tree, has not ended: its result may
-- be asked for.
r.parent_id IS NOT NULL
AND EXISTS (SELECT FROM {schema}.dispatches d WHERE d.run_id IN (r.parent_id, r.root_id))

-- fragment: parked
-- Whether the run of a dispatch `d` waits for a signal or a time, as `WAITS` says.
(d.state = 'delayed' AND d.reason = 'wait')

-- fragment: waiting
-- Whether a run `r` is in the state that people see as `waiting`: stored as queued, for older versions.
(r.state = 'queued' AND EXISTS (SELECT FROM {schema}.dispatches d
                                 WHERE d.run_id = r.run_id AND {parked}))

-- fragment: wait_started
-- The data of a WaitStarted `x`, with its end by the clock of Postgres.
x.data::jsonb || jsonb_strip_nulls(jsonb_build_object('until',
  ((extract(epoch FROM clock_timestamp()) + (x.data::jsonb ->> 'seconds')::float8) * 1000)::bigint))

-- fragment: signalled
-- Whether signals of a run `u` wait to be taken into its journal.
EXISTS (SELECT FROM {schema}.signals s WHERE s.run_id = u.run_id)

-- fragment: claim_fence
-- First key of the advisory lock that each claim holds in shared mode; the second is 0.
'{schema}.queues'::regclass::oid

-- fragment: settled_state
-- The state after a boundary: one if nobody asked to cancel, another if somebody did.
CASE WHEN r.cancel_requested_at IS NULL THEN b.state ELSE b.state_cancelled END

-- fragment: settled
-- The row of a run `r` after a boundary `b`.
-- Which of two outcomes is decided on the locked row: a cancel is before or after, never between.
last_seq = r.last_seq
  + CASE WHEN r.cancel_requested_at IS NULL THEN b.n ELSE b.n_cancelled END,
state = {settled_state},
result = CASE WHEN r.cancel_requested_at IS NULL THEN b.result::jsonb END,
error = CASE WHEN r.cancel_requested_at IS NULL
             THEN b.error::jsonb ELSE b.error_cancelled::jsonb END,
lease_expires_at = CASE WHEN {settled_state} = 'running' THEN r.lease_expires_at END,
not_before = CASE WHEN {settled_state} = 'queued'
                  THEN least(CASE WHEN r.cancel_requested_at IS NULL THEN r.deadline_at END,
                    clock_timestamp() + make_interval(secs =>
                      CASE WHEN r.cancel_requested_at IS NULL
                           THEN b.delay ELSE b.delay_cancelled END)) END,
finished_at = CASE WHEN {settled_state} NOT IN ('running', 'queued')
                   THEN clock_timestamp() END

-- fragment: settled_columns
-- The columns of such a row and its boundary that `written_beside` needs.
b.i, b.shard, b.reason, r.run_id, r.last_seq, r.state, r.not_before, r.created_at,
NOT (r.cancel_requested_at IS NULL) AS cancelled,
CASE WHEN r.cancel_requested_at IS NULL THEN b.n ELSE b.n_cancelled END AS n

-- fragment: of_its_worker
-- The reasons of runs that have begun and go on at once: given back, woken by a signal, begun again.
-- They go before those of their priority that have not begun: they are due since they were made.
('busy', 'shutdown', 'signal', 'again')

-- fragment: each_settled_doorbell
-- `each_doorbell`, for runs that have come to a boundary: those that wait may be due.
CASE WHEN {each_asleep} THEN pg_notify('beatless_{schema}', shard::text ||
       CASE state WHEN 'running' THEN ' events' WHEN 'queued' THEN '' ELSE ' times' END) END

-- fragment: written_beside
-- The events, outbox rows and dispatches of runs `u` that were settled.
e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT u.run_id, u.last_seq - u.n + row_number() OVER (PARTITION BY u.i ORDER BY x.k),
         clock_timestamp(), x.type, 'worker', x.step, x.attempt,
         CASE WHEN x.type = 'StepFailed'
              THEN x.data::jsonb || jsonb_build_object(
                     'retry_at', (extract(epoch FROM u.not_before) * 1000)::bigint)
              WHEN x.type = 'WaitStarted' THEN {wait_started}
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
         due_at = CASE WHEN u.reason IN {of_its_worker} THEN u.created_at ELSE u.not_before END,
         reason = u.reason
    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'
)
