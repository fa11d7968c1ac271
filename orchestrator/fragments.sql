-- Text that statements of several files of this package share.

-- fragment: run_columns
-- The columns of a run `r`, in the order in which a `Run` is made of them.
r.run_id, r.namespace, r.plan, r.plan_version, r.queue, r.state, r.input, r.result, r.error, r.key,
r.last_seq, r.attempt, r.worker, r.cancel_requested_at, r.not_before, r.deadline_at, r.retry_of,
r.parent_id, r.child_no, r.created_at, r.started_at, r.finished_at, r.pruned_seq, r.schedule, r.tick,
{run_options}

-- fragment: retried_by
-- The id of the newest retry of a run `r`.
(SELECT n.run_id FROM {schema}.runs n WHERE n.retry_of = r.run_id
  ORDER BY n.created_at DESC LIMIT 1) AS retried_by

-- fragment: has_undos
-- Whether a run `r` has begun a step that is to be undone, or a boundary that this snapshot misses.
-- By its journal: the plans of this process may be of another version, or none. A row that waited
-- for its lock may be newer than the events that are seen. Not EXISTS, which may be hashed: it would
-- read the events of all runs.
(coalesce((SELECT true FROM {schema}.run_events e
            WHERE e.run_id = r.run_id AND e.type = 'StepStarted' AND e.data ? 'undo' LIMIT 1), false)
 OR (SELECT max(e.seq) FROM {schema}.run_events e WHERE e.run_id = r.run_id)
    IS DISTINCT FROM r.last_seq)

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

-- fragment: of_its_worker
-- The reasons of runs that go on at once: given back, woken by a signal, begun again, let in by a limit.
-- They go before those of their priority that have not begun: they are due since they were made.
('busy', 'shutdown', 'signal', 'again', 'slot')

-- fragment: each_settled_doorbell
-- `each_doorbell`, for runs that have come to a boundary: those that wait may be due.
CASE WHEN {each_asleep} THEN pg_notify('beatless_{schema}', shard::text ||
       CASE state WHEN 'running' THEN ' events' WHEN 'queued' THEN '' ELSE ' times' END) END

-- fragment: taken_deadline
-- The deadline that a run `u` had until this statement, in milliseconds: for a retry of it.
(SELECT jsonb_strip_nulls(jsonb_build_object('deadline_at',
          (extract(epoch FROM o.deadline_at) * 1000)::bigint))
   FROM {schema}.runs o WHERE o.run_id = u.run_id)

-- fragment: written_beside
-- The events, outbox rows and dispatches of runs `u` that were settled.
e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT u.run_id, u.last_seq - u.n + row_number() OVER (PARTITION BY u.i ORDER BY x.k),
         clock_timestamp(), x.type, 'worker', x.step, x.attempt,
         CASE WHEN x.type = 'StepFailed'
              THEN x.data::jsonb || jsonb_build_object(
                     'retry_at', CASE WHEN NOT x.data::jsonb ? 'final'
                                      THEN (extract(epoch FROM u.not_before) * 1000)::bigint END)
              WHEN x.type = 'WaitStarted' THEN {wait_started}
              WHEN x.type = 'UndoStarted' THEN x.data::jsonb || {taken_deadline}
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
         deadline_at = CASE WHEN u.reason <> 'undo' THEN d.deadline_at END,
         reason = u.reason
    FROM u WHERE d.run_id = u.run_id AND u.state = 'queued'
)

-- fragment: new_run_columns
-- The members of a new run as JSON, with their types.
run_id text, shard smallint, namespace text, plan text, plan_version text, queue text,
input jsonb, key text, not_before timestamptz, delay float8, deadline float8, retry_of text,
trace_context jsonb, reused jsonb, default_queue boolean, default_input boolean,
parent_id text, child_no int, detached boolean, deadline_at timestamptz,
schedule text, schedule_id bigint, tick timestamptz, limits jsonb, {option_types}

-- fragment: new_run_parameters
-- The same of one run, each as a parameter.
%(run_id)s::text run_id, %(shard)s::smallint shard, %(namespace)s::text namespace,
%(plan)s::text plan, %(plan_version)s::text plan_version, %(queue)s::text queue,
%(input)s::jsonb input, %(key)s::text "key", %(not_before)s::timestamptz not_before,
%(delay)s::float8 delay, %(deadline)s::float8 deadline, %(retry_of)s::text retry_of,
%(trace_context)s::jsonb trace_context, %(reused)s::jsonb reused,
%(default_queue)s::boolean default_queue, %(default_input)s::boolean default_input,
%(parent_id)s::text parent_id, %(child_no)s::int child_no, %(detached)s::boolean detached,
%(deadline_at)s::timestamptz deadline_at, %(schedule)s::text schedule,
%(schedule_id)s::bigint schedule_id, %(tick)s::timestamptz tick, %(limits)s::jsonb limits,
{option_parameters}

-- fragment: stored_runs
-- New runs `u` from `input`, with RunStarted and outbox row; none whose id or key is used.
u AS (
  INSERT INTO {schema}.runs (run_id, namespace, plan, plan_version, queue, state, input, key,
    last_seq, not_before, deadline_at, retry_of, trace_context,
    default_queue, default_input, parent_id, child_no, root_id,
    schedule, tick, limits, {option_columns})
  SELECT run_id, namespace, plan, plan_version, queue, 'queued', input, key, 1,
         coalesce(not_before, clock_timestamp() + make_interval(secs => delay)),
         least(deadline_at, clock_timestamp() + make_interval(secs => deadline)), retry_of,
         trace_context, default_queue, default_input, parent_id, child_no,
         CASE WHEN NOT detached THEN (SELECT coalesce(p.root_id, p.run_id) FROM {schema}.runs p
    WHERE p.run_id = i.parent_id) END,
         schedule, tick, limits, {option_values}
    FROM input i
  ON CONFLICT DO NOTHING
  RETURNING *
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
  SELECT u.run_id, 1, u.created_at, 'RunStarted', 'api',
         jsonb_strip_nulls(jsonb_build_object('plan', u.plan, 'version', u.plan_version,
           'queue', u.queue, 'retry_of', u.retry_of, 'parent', u.parent_id,
           'not_before', (extract(epoch FROM u.not_before) * 1000)::bigint,
           'traceparent', u.trace_context->>'traceparent'))
         -- Results of users, whose nulls are theirs.
         || CASE WHEN i.reused IS NULL THEN '{}' ELSE jsonb_build_object('reused', i.reused) END
    FROM u JOIN input i USING (run_id)
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT i.shard, u.run_id, 1, 1 FROM u JOIN input i USING (run_id)
)

-- fragment: group_id
-- The group of a new run `u` as its dispatch has it: behind its namespace, whose name has no slash.
coalesce(u.namespace || '/' || u."group", '')

-- fragment: created_runs
-- Such runs with their dispatches. A trigger has those wait whose limit has no room (`park_if_full`).
{stored_runs}, d AS (
  INSERT INTO {schema}.dispatches (
    run_id, shard, task, queue, priority, state, due_at, reason, deadline_at, parent_id, child_no,
    schedule_id, limit_id, group_id)
  SELECT u.run_id, i.shard, u.plan, u.queue, u.priority,
         CASE WHEN u.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
         coalesce(u.not_before, u.created_at),
         CASE WHEN u.not_before IS NULL THEN 'start' ELSE 'delay' END, u.deadline_at,
         u.parent_id, u.child_no, i.schedule_id, u.limits -> 0 ->> 'id', {group_id}
    FROM u JOIN input i USING (run_id)
)
