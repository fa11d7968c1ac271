-- Statements over runs and their events. Each changes a run, its events, its outbox row and its
-- dispatch at once, and rings the relay.

-- name: create
-- Store new runs with RunStarted, outbox row and dispatch; a run whose id or key is used is left out.
WITH input AS (
  SELECT * FROM jsonb_to_recordset(%(runs)s::jsonb) AS i({new_run_columns})
), {created_runs}
SELECT {run_columns}, {each_doorbell}
  FROM u AS r JOIN input i USING (run_id)

-- name: create_one
-- Store a new run as create does: its members are parameters, which is cheaper for one than JSON.
-- Not materialized: the planner puts them in the place of each use, and joins nothing.
WITH input AS NOT MATERIALIZED (SELECT {new_run_parameters}), {created_runs}
SELECT {run_columns}, {each_doorbell}
  FROM u AS r JOIN input i USING (run_id)

-- name: create_keyed
-- Store new runs as create does, some of which have a dedupe key: the key stands in the dispatch,
-- behind the name of the namespace, which has no slash. A successor is due in a time that never comes.
WITH input AS (
  SELECT * FROM jsonb_to_recordset(%(runs)s::jsonb) AS i({new_run_columns}, dedupe_next boolean)
), {stored_runs}, d AS (
  INSERT INTO {schema}.dispatches (run_id, shard, task, queue, priority, state, due_at, reason,
                                   deadline_at, dedupe_key, dedupe_next, limit_id, group_id)
  SELECT u.run_id, i.shard, u.plan, u.queue, u.priority,
         CASE WHEN i.dedupe_next OR u.not_before > clock_timestamp()
              THEN 'delayed' ELSE 'waiting' END,
         CASE WHEN i.dedupe_next THEN timestamptz '9999-01-01Z'
              ELSE coalesce(u.not_before, u.created_at) END,
         CASE WHEN i.dedupe_next THEN 'next' WHEN u.not_before IS NULL THEN 'start'
              ELSE 'delay' END, u.deadline_at,
         u.namespace || '/' || u.dedupe_key, coalesce(i.dedupe_next, false),
         u.limits -> 0 ->> 'id', {group_id}
    FROM u JOIN input i USING (run_id)
)
SELECT {run_columns}, {each_doorbell}
  FROM u AS r JOIN input i USING (run_id)

-- name: find
-- Read the runs that have this id or key, and whether their input is this one.
-- Compared here: only Postgres knows which numbers are the same to it.
SELECT {run_columns}, {retried_by}, {waiting}, default_queue, default_input,
       coalesce(input, 'null') = %(input)s::jsonb
  FROM {schema}.runs r
 WHERE run_id = %(run_id)s OR (namespace = %(namespace)s AND key = %(key)s)

-- fragment: under_lease
-- Whether a run is under this lease, and its journal has lost nothing that the owner has seen.
run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running' AND last_seq >= %(after)s

-- fragment: appended
-- The row, events and outbox row of a run that an UPDATE names and that stays as it is.
  RETURNING run_id, last_seq, cancel_requested_at IS NOT NULL AS cancelled
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT u.run_id, u.last_seq - %(n)s + x.n, clock_timestamp(), x.type, 'worker', x.step,
         x.attempt, x.data::jsonb
    FROM u, unnest(%(types)s::text[], %(steps)s::text[], %(attempts)s::int[], %(datas)s::text[])
         WITH ORDINALITY AS x(type, step, attempt, data, n)
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT %(shard)s, run_id, last_seq - (%(n)s) + 1, last_seq FROM u
)
SELECT last_seq, cancelled, {events_doorbell} FROM u

-- name: append
-- Append events under a lease, to a run that stays as it is.
WITH u AS (
  UPDATE {schema}.runs SET last_seq = last_seq + %(n)s
   WHERE {under_lease}
{appended}

-- name: append_if_free
-- `append`, unless another transaction holds the run's row: it is not waited for.
-- Nothing changes the row between its lock and its update, so the lease is looked at once.
WITH free AS MATERIALIZED (
  SELECT FROM {schema}.runs WHERE {under_lease} FOR NO KEY UPDATE SKIP LOCKED
), u AS (
  UPDATE {schema}.runs SET last_seq = last_seq + %(n)s
   WHERE run_id = %(run_id)s AND EXISTS (SELECT FROM free)
{appended}

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
deadline_at = CASE WHEN b.reason <> 'undo' THEN r.deadline_at END,
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

-- fragment: settled_run
-- The row of a run under a lease, updated to where it stands after a boundary.
-- The planner makes constants of the row `b`: this is an update of one row by its key.
UPDATE {schema}.runs r
     SET {settled}
    FROM (SELECT 1, %(shard)s::smallint, %(n)s::int, %(n_cancelled)s::int, %(state)s::text,
                 %(state_cancelled)s::text, %(result)s::text, %(error)s::text,
                 %(error_cancelled)s::text, %(delay)s::float8, %(delay_cancelled)s::float8,
                 %(reason)s::text)
         AS b(i, shard, n, n_cancelled, state, state_cancelled, result, error, error_cancelled,
              delay, delay_cancelled, reason)
   WHERE r.run_id = %(run_id)s AND r.lease_token = %(token)s AND r.state = 'running'
     AND r.last_seq >= %(after)s

-- name: settle
-- Append the events of a step boundary under a lease, and set where the run stands after it.
WITH u AS (
  {settled_run}
  RETURNING {settled_columns}
), {written_beside}
SELECT last_seq, cancelled, u.state = 'running' AND {signalled}, {each_settled_doorbell} FROM u

-- name: settle_if_unsignalled
-- The same, unless signals of the run wait to be taken into its journal.
WITH u AS (
  {settled_run} AND NOT EXISTS (SELECT FROM {schema}.signals s WHERE s.run_id = r.run_id)
  RETURNING {settled_columns}
), {written_beside}
SELECT last_seq, cancelled, false, {each_settled_doorbell} FROM u

-- name: get
-- Read one run.
SELECT {run_columns}, {retried_by}, {waiting} FROM {schema}.runs r
 WHERE run_id = %(run_id)s AND namespace = %(namespace)s

-- fragment: listed
-- Runs of a namespace. Each list says next by which index it is found.
SELECT {run_columns}, {retried_by}, {waiting} FROM {schema}.runs r
 WHERE namespace = %(namespace)s

-- fragment: kept
-- The filters of a list, of which each has one for its index.
(%(state)s::text IS NULL OR state = %(state)s)
   AND (%(plan)s::text IS NULL OR plan = %(plan)s)
   AND (%(queue)s::text IS NULL OR queue = %(queue)s)
   AND (%(tags)s::jsonb IS NULL OR tags @> %(tags)s::jsonb)
   AND (%(dedupe_key)s::text IS NULL OR dedupe_key = %(dedupe_key)s)
   AND (%(group)s::text IS NULL OR r."group" = %(group)s)
   AND (%(retried)s::bool IS NULL
        OR %(retried)s = EXISTS (SELECT FROM {schema}.runs n WHERE n.retry_of = r.run_id))

-- fragment: older
-- The runs after the page before: by any index that ends with the time, no run of earlier pages is
-- read. Without one, those before the last id of the last time.
(created_at, run_id) < (coalesce(%(before_at)s::timestamptz, 'infinity'),
                          coalesce(%(before_id)s::text, chr(127)))

-- fragment: newest
-- The order of the lists.
ORDER BY created_at DESC, run_id DESC

-- fragment: filtered
-- The filters of a list, and a page of it, newest first.
AND {kept} AND {older} {newest} LIMIT %(limit)s

-- fragment: place
-- The last event that says where a run `r` is: by the index of its events, backwards.
SELECT e.seq, e.type, e.step, e.data FROM {schema}.run_events e
 WHERE e.run_id = r.run_id
   AND e.type IN ('RunStarted', 'StepStarted', 'StepFinished', 'WaitStarted', 'WaitFinished',
                  'ChildrenStarted', 'ChildrenFinished')
 ORDER BY e.seq DESC LIMIT 1

-- fragment: promise
-- The `on_cancel` step that a cancel of the run `r` has promised.
-- Row by row, by LIMIT: the planner would look for the few cancels among the events of all runs.
LEFT JOIN LATERAL (
    SELECT c.seq, c.data ->> 'on_cancel' AS undo FROM {schema}.run_events c
     WHERE r.cancel_requested_at IS NOT NULL AND c.run_id = r.run_id
       AND c.type = 'CancelRequested' LIMIT 1) c ON true

-- fragment: at_step
-- Whether an unfinished run `r` is in this step, or goes on with it.
r.run_id IN (SELECT run_id FROM {schema}.dispatches)
   AND EXISTS (SELECT FROM (
     SELECT CASE WHEN c.undo IS NOT NULL AND NOT (e.type = 'StepStarted' AND c.seq < e.seq)
                 THEN c.undo
                 WHEN e.type IN ('StepStarted', 'WaitStarted', 'ChildrenStarted') THEN e.step
                 WHEN e.type = 'RunStarted' THEN e.data #>> '{reused,next}'
                 ELSE coalesce(e.data ->> 'next', e.data ->> 'following', e.step) END AS at
       FROM ({place}) e {promise}) e
    WHERE %(step)s::text IN (at, split_part(at, '#', 1)))

-- fragment: queued
-- Of the many stored runs few are unfinished: these are found by their dispatches.
run_id IN (SELECT run_id FROM {schema}.dispatches d WHERE NOT {parked})

-- fragment: parked_runs
-- The same of runs that wait for a signal or a time.
run_id IN (SELECT run_id FROM {schema}.dispatches d WHERE {parked})

-- fragment: running
-- Runs that run are found by the dispatches that do not wait.
run_id = ANY(ARRAY(SELECT run_id FROM {schema}.dispatches WHERE state <> 'waiting'))

-- name: list
-- List runs of a namespace, newest first.
{listed} {filtered}

-- name: list_of_plan
-- List runs of a plan, newest first.
{listed} AND plan = %(plan)s {filtered}

-- name: list_of_queue
-- List runs of a queue, newest first.
{listed} AND queue = %(queue)s {filtered}

-- name: list_of_dedupe_key
-- List runs with a dedupe key, newest first.
{listed} AND dedupe_key = %(dedupe_key)s {filtered}

-- name: list_of_group
-- List runs of a group, newest first.
{listed} AND r."group" = %(group)s {filtered}

-- fragment: unsuccessful
-- Runs that failed, or were cancelled: by their error, as the indexes have them.
error IS NOT NULL AND CASE WHEN error ->> 'type' = 'RunCancelled' AND NOT error ? 'traceback'
                           THEN 'cancelled' ELSE 'failed' END = %(state)s

-- name: list_unsuccessful
-- List runs that failed, or were cancelled, newest first.
{listed} AND {unsuccessful} {filtered}

-- name: list_unsuccessful_of_plan
-- List runs of a plan that failed, or were cancelled, newest first.
{listed} AND {unsuccessful} AND plan = %(plan)s {filtered}

-- name: list_unsuccessful_of_queue
-- List runs of a queue that failed, or were cancelled, newest first.
{listed} AND {unsuccessful} AND queue = %(queue)s {filtered}

-- fragment: near
-- The runs that pass the filters among the newest ones, whatever index these filters have.
-- Of a set in no order of time, as those with a tag, the newest are among these unless they are
-- rare; if they are, all of them are read and sorted instead.
near AS MATERIALIZED (
  SELECT run_id FROM (SELECT * FROM {schema}.runs WHERE namespace = %(namespace)s AND {older}
                      {newest} LIMIT {near_runs}) r
   WHERE {kept} LIMIT %(limit)s)

-- fragment: page_of_near
-- The page if enough runs are near.
SELECT {run_columns}, {retried_by}, {waiting} FROM {schema}.runs r
 WHERE run_id = ANY(ARRAY(SELECT run_id FROM near
                           WHERE (SELECT count(*) FROM near) = %(limit)s))

-- name: list_tagged
-- List runs with tags, newest first.
WITH {near}
{page_of_near}
UNION ALL
(SELECT {run_columns}, {retried_by}, {waiting}
   -- OFFSET keeps the planner from reading all runs in the order of time.
   FROM (SELECT * FROM {schema}.runs WHERE tags @> %(tags)s::jsonb AND tags <> '{}' OFFSET 0) r
  WHERE (SELECT count(*) FROM near) < %(limit)s AND namespace = %(namespace)s {filtered})
{newest}

-- name: list_retried
-- List runs that have a retry, newest first.
WITH {near}
{page_of_near}
UNION ALL
(SELECT {run_columns}, {retried_by}, {waiting} FROM {schema}.runs r
  WHERE (SELECT count(*) FROM near) < %(limit)s AND namespace = %(namespace)s
    AND run_id = ANY(ARRAY(SELECT retry_of FROM {schema}.runs WHERE retry_of IS NOT NULL))
    {filtered})
{newest}

-- name: list_queued
-- List runs that wait, newest first.
-- Reads in whole: dispatches.
{listed} AND {queued} {filtered}

-- name: list_waiting
-- List runs that wait for a signal or a time, newest first.
{listed} AND {parked_runs} {filtered}

-- name: list_running
-- List runs that run, newest first.
{listed} AND {running} {filtered}

-- name: list_at_step
-- List unfinished runs at a step, newest first.
-- Reads in whole: dispatches.
{listed} AND true AND {at_step} {filtered}

-- name: list_queued_at_step
-- List runs that wait at a step, newest first.
-- Reads in whole: dispatches.
{listed} AND {queued} AND {at_step} {filtered}

-- name: list_waiting_at_step
-- List runs that wait for a signal or a time at a step, newest first.
{listed} AND {parked_runs} AND {at_step} {filtered}

-- name: list_running_at_step
-- List runs that run at a step, newest first.
{listed} AND {running} AND {at_step} {filtered}

-- name: unfinished
-- List where all unfinished runs are, or those that wait for these reasons.
-- An attempt that was begun after the cancel is one of the step that undoes the run.
-- Reads in whole: dispatches, and runs if about as many are unfinished.
SELECT r.run_id, r.plan, r.plan_version, r.cancel_requested_at IS NOT NULL, c.undo,
       coalesce(c.seq < e.seq, false), e.seq, e.type, e.step, CASE WHEN jsonb_typeof(e.data) = 'object'
         THEN (e.data - 'result') #- '{reused,results}' #- '{reused,errors}' END
  FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
 CROSS JOIN LATERAL ({place}) e
  {promise}
 WHERE %(reasons)s::text[] IS NULL OR d.reason = ANY(%(reasons)s::text[])
 ORDER BY r.run_id

-- name: get_of_any_namespace
-- Read a run, whoever it belongs to.
SELECT {run_columns} FROM {schema}.runs r WHERE run_id = %(run_id)s

-- name: lock_run
-- Lock a run: nobody else can retry it before the commit.
SELECT FROM {schema}.runs WHERE run_id = %(run_id)s FOR UPDATE

-- name: other_retry
-- Find out whether a run has another retry than this one.
SELECT 1 FROM {schema}.runs WHERE retry_of = %(run_id)s AND run_id <> %(but)s LIMIT 1

-- fragment: failed
-- Failed runs `r` that nobody has retried and that can be, with their last events `e`.
-- Kept by no row of its own: a retry, a removal or retention takes the run out of this list.
FROM {schema}.run_events e JOIN {schema}.runs r USING (run_id)
 WHERE e.type = 'RunFinished' AND e.data ->> 'outcome' = 'failed'
   AND e.ts > coalesce((SELECT clock_timestamp() - make_interval(secs => %(seconds)s)), '-infinity')
   AND r.namespace = %(namespace)s AND r.pruned_seq = 0
   AND e.ts >= coalesce(%(after_at)s::timestamptz, '-infinity')
   AND (%(after_at)s::timestamptz IS NULL
        OR (e.ts, r.run_id) > (%(after_at)s, %(after_id)s::text))
   AND (%(plan)s::text IS NULL OR r.plan = %(plan)s)
   AND (%(queue)s::text IS NULL OR r.queue = %(queue)s)
   AND (%(tags)s::jsonb IS NULL OR r.tags @> %(tags)s::jsonb)
   AND (%(error)s::text IS NULL
        OR strpos(lower(concat(r.error ->> 'type', ': ', r.error ->> 'message')),
                  lower(%(error)s)) > 0)
   AND NOT EXISTS (SELECT FROM {schema}.runs n WHERE n.retry_of = r.run_id)

-- name: failed_runs
-- List a page of failed runs that nobody has retried, oldest end first.
SELECT e.ts, r.run_id, {run_columns} {failed}
 ORDER BY e.ts, r.run_id LIMIT %(limit)s

-- name: places_of_failed_runs
-- List as failed_runs does, ids and places only.
SELECT e.ts, r.run_id {failed}
 ORDER BY e.ts, r.run_id LIMIT %(limit)s

-- name: count_failed_runs
-- Count what failed_runs would list, up to a limit.
SELECT count(*) FROM (SELECT {failed} LIMIT %(limit)s) AS found

-- name: read
-- Read the events of a run after a seq, up to another.
-- No LIMIT, for there are no gaps: with one as a parameter Postgres plans each read anew, which
-- takes as long as the read itself.
SELECT {event_json} FROM {schema}.run_events e
 WHERE e.run_id = %(run_id)s AND e.seq > %(after)s
   AND e.seq <= %(until)s ORDER BY e.seq

-- name: read_page
-- Read as read does, up to so many bytes.
-- OFFSET 0, or each line would be built three times.
SELECT seq, type, line FROM (
  SELECT *, sum(octet_length(line)) OVER (ORDER BY seq ROWS UNBOUNDED PRECEDING)
            - octet_length(line) AS before
    FROM (SELECT e.seq, e.type, {event_json} AS line FROM {schema}.run_events e
           WHERE e.run_id = %(run_id)s AND e.seq > %(after)s AND e.seq <= %(until)s
           ORDER BY e.seq OFFSET 0) AS lines) AS sized
 WHERE before < {page_bytes} ORDER BY seq

-- name: checkpoint_page
-- Read the events after a seq that say where an unfinished run is, and its last one: some of them.
-- With each the seq of the last one, and that by which the run's function has begun again; it is
-- looked for with the first page, from the end, and given with the others.
-- A snooze is a start and a trace. Of many in a row the last says all that the others say.
-- Of a function that has begun again, those since then, and the signals that may not be taken yet.
-- With a token none, unless a lease has it: of the first page the RunStarted is read all the same.
WITH begun AS MATERIALIZED (
  SELECT e.seq, (e.data ->> 'signals_from')::int AS signals_from FROM {schema}.run_events e
   WHERE %(restarted)s::int IS NULL AND e.run_id = %(run_id)s AND e.type = 'RunRestarted'
   ORDER BY e.seq DESC LIMIT 1
), head AS MATERIALIZED (
  SELECT r.last_seq, coalesce(%(restarted)s, (SELECT seq FROM begun), 0) AS restarted,
         greatest(%(after)s, 1, (SELECT least(signals_from, seq) - 1 FROM begun)) AS after
    FROM {schema}.runs r
   WHERE r.run_id = %(run_id)s AND (%(token)s::bigint IS NULL OR r.lease_token = %(token)s)
)
SELECT {event_json}, (SELECT last_seq FROM head), (SELECT restarted FROM head) FROM (
  SELECT e.*, sum(e.size) OVER (ORDER BY e.seq ROWS UNBOUNDED PRECEDING) - e.size AS before FROM (
    SELECT e.*, lag(starts, 1, false) OVER w AS started, lead(starts, 1, false) OVER w AS starts_1,
           lead(starts, 2, false) OVER w AS starts_2, lead(step, 2) OVER w AS step_2,
           lag(step) OVER w AS started_step, lead(step) OVER w AS step_1,
           lead(rests, 1, false) OVER w AS rests_1,
           lead(rests, 2, false) OVER w AS rests_2, lead(rests, 3, false) OVER w AS rests_3
      FROM (
        SELECT e.*, coalesce(pg_column_size(e.data), 0) AS size, e.type = 'StepStarted' AS starts,
               coalesce(e.type = 'DebugTrace' AND e.data ->> 'name' = %(rest)s, false) AS rests
          FROM (
            SELECT * FROM {schema}.run_events e
             WHERE e.run_id = %(run_id)s AND e.seq = 1 AND %(after)s = 0
            UNION ALL
            SELECT * FROM {schema}.run_events e
             WHERE e.run_id = %(run_id)s AND e.seq > (SELECT after FROM head)
               AND (e.type IN ('SignalReceived', 'WaitFinished')
                    OR e.seq >= (SELECT restarted FROM head)
                       AND (e.type IN ('StepStarted', 'StepFailed', 'StepFinished',
                                       'CancelRequested', 'WaitStarted', 'RunRestarted',
                                       'ChildrenStarted', 'ChildrenFinished', 'UndoStarted')
                            OR e.type = 'DebugTrace' AND e.data ->> 'name' = ANY(%(names)s)
                            OR e.seq = (SELECT last_seq FROM head)))
          ) e ORDER BY e.seq LIMIT {page_events}
      ) e WINDOW w AS (ORDER BY e.seq)
  ) e
   WHERE NOT (starts AND rests_1 AND starts_2 AND rests_3 AND step = step_2)
     AND NOT (started AND rests AND starts_1 AND rests_2 AND started_step = step_1)
) e
 WHERE e.before < {page_bytes} ORDER BY e.seq

-- name: has_output
-- Read whether an event of output of a step that begins with this piece stands after a seq.
SELECT EXISTS (SELECT FROM {schema}.run_events e
                WHERE e.run_id = %(run_id)s AND e.seq > %(after)s AND e.type = 'StepOutput'
                  AND e.step = %(step)s AND (e.data ->> 'first')::bigint = %(first)s)

-- name: kept_events
-- Read which events of a run are kept.
SELECT pruned_seq, last_seq FROM {schema}.runs WHERE run_id = %(run_id)s

-- name: dispatch_status
-- Read where a run stands beside its own row: lease, dispatch, queue, outbox, dead letters, the
-- limit that it waits for, its place in its group, and whether a relay leads its shard.
SELECT clock_timestamp(), r.lease_expires_at, d.state, d.due_at, d.reason, d.attempts,
       EXISTS (SELECT FROM {schema}.queues q WHERE q.name = r.queue AND q.paused_at IS NOT NULL),
       (SELECT min(from_seq) FROM {schema}.run_outbox o
         WHERE o.shard = %(shard)s AND o.run_id = r.run_id),
       ARRAY(SELECT kind || ': ' || reason FROM {schema}.dead_letters l
              WHERE l.run_id = r.run_id ORDER BY id),
       CASE WHEN d.state = 'delayed' AND d.reason = 'limit' THEN (
         SELECT jsonb_build_object('id', l.id, 'at_once', l.at_once, 'starts', l.starts,
                  'period_s', l.period_s,
                  'held', (SELECT count(*) FROM {schema}.limit_slots s WHERE s.limit_id = l.id),
                  'by', ARRAY(SELECT s.run_id FROM {schema}.limit_slots s
                               WHERE s.limit_id = l.id ORDER BY s.taken_at LIMIT 3),
                  'before', (SELECT count(*) FROM (
                    (SELECT 1 FROM {schema}.dispatches o
                      WHERE o.limit_id = d.limit_id AND o.state = 'delayed' AND o.reason = 'limit'
                        AND o.priority > d.priority LIMIT {most_counted})
                    UNION ALL
                    (SELECT 1 FROM {schema}.dispatches o
                      WHERE o.limit_id = d.limit_id AND o.state = 'delayed' AND o.reason = 'limit'
                        AND o.priority = d.priority AND o.limit_since < d.limit_since
                      LIMIT {most_counted})) o))
           FROM {schema}.all_limits_of(r.limits) l WHERE l.id = d.limit_id) END,
       CASE WHEN d.state = 'waiting' AND d.due_at <= clock_timestamp()
             AND (d.group_id <> '' OR a.age_after_s IS NOT NULL) THEN
         jsonb_build_object(
           'weight', coalesce((SELECT w.weight FROM {schema}.group_weights w
                                WHERE w.group_id = d.group_id), 1),
           'age_after', a.age_after_s, 'is_aged', coalesce(d.due_at <= a.since, false),
           'before', (SELECT count(*) FROM (
             (SELECT 1 FROM {schema}.dispatches o
               WHERE o.queue = d.queue AND o.group_id = d.group_id AND o.state = 'waiting'
                 AND o.priority > d.priority
                 AND o.due_at <= CASE WHEN d.due_at <= a.since THEN d.due_at
                                      ELSE clock_timestamp() END
               LIMIT {most_counted})
             UNION ALL
             (SELECT 1 FROM {schema}.dispatches o
               WHERE o.queue = d.queue AND o.group_id = d.group_id AND o.state = 'waiting'
                 AND o.priority = d.priority AND o.due_at < d.due_at
               LIMIT {most_counted})
             UNION ALL
             (SELECT 1 FROM {schema}.dispatches o
               WHERE o.queue = d.queue AND o.group_id = d.group_id AND o.state = 'waiting'
                 AND o.priority < d.priority AND o.due_at <= least(d.due_at, a.since)
                 AND a.since IS NOT NULL
               LIMIT {most_counted})) o)) END,
       EXISTS (SELECT FROM pg_locks k
                WHERE k.locktype = 'advisory' AND k.granted AND k.objsubid = 2
                  AND k.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND k.classid = ({leader_key})::oid AND k.objid::int8 = %(shard)s)
  FROM {schema}.runs r LEFT JOIN {schema}.dispatches d USING (run_id)
  LEFT JOIN (SELECT name, age_after_s,
                    clock_timestamp() - make_interval(
                      secs => least(greatest(age_after_s, 0), 315360000)) AS since
               FROM {schema}.queues) a ON a.name = d.queue
 WHERE r.run_id = %(run_id)s

-- fragment: epoch_now
-- The origin of the schema and the timeline that is written now; on a standby, the checkpoint's.
{origin} || 't' || CASE WHEN pg_is_in_recovery()
       THEN (SELECT timeline_id FROM pg_control_checkpoint())
       ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END

-- name: epoch
-- Read what names this history of the database, and up to where it is on disk.
SELECT {epoch_now}, CASE WHEN pg_is_in_recovery() THEN 0
                     ELSE (pg_current_wal_flush_lsn() - '0/0')::bigint END

-- name: renew
-- Make the epoch another one, only if it is this one, if given.
UPDATE {schema}.history SET token = gen_random_uuid()::text
 WHERE %(epoch)s::text IS NULL OR {epoch_now} = %(epoch)s

-- name: heads
-- Read the last seq of each of these runs.
SELECT run_id, last_seq FROM {schema}.runs WHERE run_id = ANY(%(run_ids)s)
