-- Statements over leases. All clocks are the server's.

-- name: fence
-- Take the fence of the claims, and wait for no lock for long.
-- A claim that waited for the row of somebody's open transaction, with the fence in its hands, would
-- hold up `pause`. Not for the fence itself: only a `pause` of an older version holds it alone, and
-- is waited for.
SELECT pg_advisory_xact_lock_shared({claim_fence}::int4, 0),
       set_config('lock_timeout', '{lock_timeout_ms}', true)

-- name: fence_behind_end
-- The same in a transaction that has ended a run, whose row and slots others want: waits so many
-- milliseconds for a lock, and for the fence as well.
SELECT set_config('lock_timeout', %(milliseconds)s, true),
       pg_advisory_xact_lock_shared({claim_fence}::int4, 0)

-- name: limit_lock_wait
-- Wait for no lock for long, in this transaction.
SELECT set_config('lock_timeout', '{lock_timeout_ms}', true)

-- name: set_lock_timeout
-- Wait for a lock so many milliseconds, in this transaction.
SELECT set_config('lock_timeout', %(milliseconds)s, true)

-- fragment: fresh
-- Whether a run was never claimed, so that its first step starts in the claim itself, if it begins
-- with one.
last_seq = 1 AND attempt = 0 AND retry_of IS NULL AND cancel_requested_at IS NULL
AND (deadline_at IS NULL OR deadline_at > clock_timestamp())

-- fragment: begun
-- Whether the claim has started the first step.
-- Not if there is an event: a newer version writes some that this one does not know.
(last_seq = 2 AND attempt = 1 AND retry_of IS NULL AND cancel_requested_at IS NULL
 AND NOT EXISTS (SELECT FROM {schema}.run_events e WHERE e.run_id = r.run_id AND e.seq = 2))

-- fragment: claimed_columns
-- The columns of a run `r` that was claimed, and those of its lease.
{run_columns}, coalesce(r.dead_token = -1, false), r.lease_token,
extract(epoch FROM r.deadline_at - clock_timestamp())::float8,
extract(epoch FROM clock_timestamp()
  - coalesce(was_due, CASE WHEN attempt = 1 THEN created_at END))::float8,
extract(epoch FROM clock_timestamp() - started_at)::float8, r.trace_context,
coalesce(jsonb_path_exists(r.limits, '$[*].step'), false),
r.limits IS NOT NULL
  AND EXISTS (SELECT FROM {schema}.dispatches d WHERE d.run_id = r.run_id AND d.reason = 'slot')

-- fragment: first_lane
-- The runs that come first in the queue of `own`, by its highest priority; none if the relay alone knows
-- which come first.
-- In a queue with groups it shares out the turns, and in one with `age_after_s` it knows who is old.
SELECT d.queue, d.priority FROM {schema}.dispatches d
 WHERE d.state = 'waiting' AND d.queue = (SELECT queue FROM own WHERE fresh)
   AND (SELECT g.group_id FROM {schema}.dispatches g
         WHERE g.state = 'waiting' AND g.queue = (SELECT queue FROM own)
         ORDER BY g.group_id DESC LIMIT 1) = ''
   AND NOT EXISTS (SELECT FROM {schema}.queues q
                    WHERE q.name = d.queue AND q.age_after_s IS NOT NULL)
 ORDER BY d.priority DESC LIMIT 1

-- fragment: first_waiting
-- Some of these, those that wait the longest first.
SELECT d.* FROM {schema}.dispatches d
 WHERE d.state = 'waiting' AND d.queue = (SELECT queue FROM lane)
   AND d.priority = (SELECT priority FROM lane)
   AND d.due_at <= (SELECT clock_timestamp())
 ORDER BY d.due_at LIMIT {looked_at}

-- fragment: claimable
-- Whether a run `r` of a dispatch `d` waits, is due, and is of these plans; no queue of it is paused.
r.run_id = d.run_id AND r.plan = d.task AND d.task = ANY(%(plans)s::text[])
AND r.state = 'queued' AND coalesce(r.not_before <= clock_timestamp(), true)
AND NOT EXISTS (SELECT FROM {schema}.queues q
                 WHERE q.name = r.queue AND q.paused_at IS NOT NULL)

-- fragment: each_first_step
-- Tables that write down the first steps which the claims `u` have begun.
e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt)
  SELECT run_id, 2, clock_timestamp(), 'StepStarted', 'worker', first, 1
    FROM u WHERE begun
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, 2, 2 FROM u WHERE begun
)

-- name: claim
-- Take the lease of a run that waits and is due, or whose lease has run out.
-- A subquery of RETURNING sees the row as it was: since when the run has waited. The first step of a
-- fresh run starts in the claim itself: one commit less for each run. A paused queue sends its
-- message back to wait; `pause` makes that exact (`queues`). A run with limits takes its slots last:
-- without one it waits, and is not claimed. A takeover has them already. The row as it is now, and not
-- as the snapshot has it, says whether the holder is known to be dead: `end` may be just before this.
WITH u AS (
  UPDATE {schema}.runs r
     SET state = 'running', attempt = least(attempt, 2147483646) + 1, lease_token = %(token)s,
         dead_token = CASE WHEN state = 'running' AND dead_token IS DISTINCT FROM lease_token
                           THEN -1 END,
         lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s),
         worker = %(worker)s, started_at = coalesce(started_at, clock_timestamp()),
         not_before = NULL,
         last_seq = last_seq
           + CASE WHEN {fresh} AND %(first)s::text IS NOT NULL THEN 1 ELSE 0 END
   WHERE run_id = %(run_id)s AND plan = %(plan)s
     AND (state = 'running' AND lease_expires_at < clock_timestamp()
          OR state = 'queued' AND coalesce(not_before <= clock_timestamp(), true)
             AND NOT EXISTS (SELECT FROM {schema}.queues q
                              WHERE q.name = r.queue AND q.paused_at IS NOT NULL)
             AND (limits IS NULL OR {schema}.take_slots(run_id)))
  RETURNING r.*, (SELECT o.not_before FROM {schema}.runs o WHERE o.run_id = r.run_id) AS was_due,
            {begun} AS begun
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt)
  SELECT run_id, 2, clock_timestamp(), 'StepStarted', 'worker', %(first)s, 1
    FROM u WHERE begun
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT %(shard)s, run_id, 2, 2 FROM u WHERE begun
), d AS (
  UPDATE {schema}.dispatches d
     SET state = 'running', due_at = u.lease_expires_at, reason = 'lease',
         attempts = least(greatest(d.attempts, %(dispatch)s), d.attempts::bigint + 1)
    FROM u WHERE d.run_id = u.run_id
), back AS (
  UPDATE {schema}.dispatches d SET state = 'waiting', due_at = clock_timestamp()
   WHERE d.run_id = %(run_id)s AND d.state = 'sent' AND d.reason <> 'lease'
     AND NOT EXISTS (SELECT FROM u)
     AND EXISTS (SELECT FROM {schema}.queues q WHERE q.name = d.queue AND q.paused_at IS NOT NULL)
  -- A `resume` that came meanwhile has rung before this row could be seen.
  RETURNING {doorbell}
)
SELECT {claimed_columns}, begun, {claim_doorbell} FROM u AS r

-- name: claim_together
-- Take the leases of runs that wait and are due, whose messages have come together.
-- No run is waited for: one whose row another transaction holds is left out. So are those that wait for
-- more than their message: with limits, or of a paused queue. `claim` is for them, and for takeovers.
-- Its dispatch is waited for: a relay that has sent the message just now has it for a moment.
WITH found AS MATERIALIZED (
  SELECT x.*
    FROM unnest(%(run_ids)s::text[], %(shards)s::smallint[], %(plans)s::text[],
                %(firsts)s::text[], %(dispatches)s::int[], %(tokens)s::bigint[])
         AS x(run_id, shard, plan, first, dispatch, token)
   CROSS JOIN LATERAL (
     SELECT r.run_id FROM {schema}.runs r
      WHERE r.run_id = x.run_id AND r.plan = x.plan AND r.state = 'queued' AND r.limits IS NULL
        AND coalesce(r.not_before <= clock_timestamp(), true)
        AND NOT EXISTS (SELECT FROM {schema}.queues q
                         WHERE q.name = r.queue AND q.paused_at IS NOT NULL)
      LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED) r
), u AS (
  UPDATE {schema}.runs r
     SET state = 'running', attempt = least(r.attempt, 2147483646) + 1, lease_token = found.token,
         dead_token = NULL,
         lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s),
         worker = %(worker)s, started_at = coalesce(started_at, clock_timestamp()),
         not_before = NULL,
         last_seq = last_seq
           + CASE WHEN {fresh} AND found.first IS NOT NULL THEN 1 ELSE 0 END
    FROM found WHERE r.run_id = found.run_id
  RETURNING r.*, found.shard, found.first, found.dispatch,
            (SELECT o.not_before FROM {schema}.runs o WHERE o.run_id = r.run_id) AS was_due,
            {begun} AS begun
), {each_first_step}, d AS (
  UPDATE {schema}.dispatches d
     SET state = 'running', due_at = u.lease_expires_at, reason = 'lease',
         attempts = least(greatest(d.attempts, u.dispatch), d.attempts::bigint + 1)
    FROM u WHERE d.run_id = u.run_id
)
SELECT {claimed_columns}, begun, {each_claim_doorbell} FROM u AS r

-- name: claim_further
-- Take the leases of further runs, of the queue of the run that this transaction has claimed.
-- They wait, are due, were never claimed, and are in the order of the relay. Of those only, for a
-- run that has ended its process once shall have no neighbours; so none beside such a run either.
-- Those that another transaction holds are left out, and those with limits: two claims that take slots
-- for several runs could wait for each other.
WITH own AS (
  SELECT queue, lease_token IS DISTINCT FROM %(token)s OR attempt = 1 AS fresh
    FROM {schema}.runs r WHERE run_id = %(run_id)s
), lane AS (
  {first_lane}
), found AS MATERIALIZED (
  SELECT c.*, row_number() OVER () AS i FROM (
  SELECT r.run_id, d.shard
    FROM ({first_waiting}) d
   CROSS JOIN LATERAL (
     SELECT r.run_id FROM {schema}.runs r
      WHERE {claimable} AND {fresh} AND r.limits IS NULL
      LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED) r
   LIMIT %(places)s::int) c
), u AS (
  UPDATE {schema}.runs r
     SET state = 'running', attempt = attempt + 1,
         lease_token = (%(tokens)s::bigint[])[found.i],
         lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s),
         worker = %(worker)s, started_at = coalesce(started_at, clock_timestamp()),
         not_before = NULL, last_seq = last_seq + 1
    FROM found WHERE r.run_id = found.run_id
  RETURNING r.*, found.shard, found.i, (SELECT o.not_before FROM {schema}.runs o
                                         WHERE o.run_id = r.run_id) AS was_due
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt)
  SELECT run_id, last_seq, clock_timestamp(), 'StepStarted', 'worker',
         (%(firsts)s::text[])[array_position(%(plans)s::text[], u.plan)], 1 FROM u
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq, last_seq FROM u
), d AS (
  -- As if its message had been sent: one that the relay is just sending has this number.
  UPDATE {schema}.dispatches d
     SET state = 'running', due_at = u.lease_expires_at, reason = 'lease',
         attempts = least(d.attempts, 2147483646) + 1
    FROM u WHERE d.run_id = u.run_id
)
SELECT {claimed_columns}, true, {each_doorbell} FROM u AS r ORDER BY i

-- fragment: queues_beside
-- The queues that the workers have which have that of a run `r`.
ARRAY(SELECT unnest(w.queues) FROM {schema}.workers w
       WHERE r.queue = ANY(w.queues) AND w.seen_at > now() - interval '{presence_expires_s} s')

-- fragment: has_waited
-- Whether the message of a dispatch `s` was not sent just now.
extract(epoch FROM s.due_at - clock_timestamp()) NOT BETWEEN %(just_sent)s AND %(redispatch)s

-- fragment: claimed_next
-- Take the lease of the run that a table `taken` has, whose message was not sent.
u AS (
  UPDATE {schema}.runs r
     SET state = 'running', attempt = least(attempt, 2147483646) + 1, lease_token = %(next)s,
         dead_token = NULL,
         lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s),
         worker = %(worker)s, started_at = coalesce(started_at, clock_timestamp()),
         not_before = NULL,
         last_seq = last_seq
           + CASE WHEN {fresh} AND first IS NOT NULL THEN 1 ELSE 0 END
    FROM taken WHERE r.run_id = taken.run_id
  RETURNING r.*, shard, first, was_due, {begun} AS begun
), {each_first_step}, d AS (
  -- As if its message had been sent: one that the relay is just sending has this number.
  UPDATE {schema}.dispatches d
     SET state = 'running', due_at = u.lease_expires_at, reason = 'lease',
         attempts = least(attempts, 2147483646) + 1
    FROM u WHERE d.run_id = u.run_id
)
SELECT {claimed_columns}, begun, {each_doorbell} FROM u AS r

-- name: claim_next
-- Take the lease of the run that comes next in the queue of one that this transaction has ended.
-- Only if it has limits: its slot is one that was freed just now, and it would stay free until a message
-- has come. Those without wait for nothing but their message. None is taken while a message has waited
-- for longer than a moment for a process that takes this queue, whatever queue it is of: these come
-- first, by the weights of the queues; but not those of runs that were let in, which would end all such
-- claims of a limit with the first that was late. A message that was sent just now is due once more after the
-- redispatch time; one that was found to be in the broker, after longer.
-- A run that another end has let in is left to its message, which may be on its way already: who took it would
-- leave another one behind, of which the same is true, and a slot would be free all the time.
-- The slots are taken of one run, and not where the planner could ask for those of others.
WITH own AS (
  SELECT queue, true AS fresh FROM {schema}.runs r
   WHERE r.run_id = %(run_id)s AND r.lease_token = %(token)s AND finished_at IS NOT NULL
     AND NOT EXISTS (SELECT FROM {schema}.dispatches s
       WHERE s.state = 'sent' AND s.reason <> 'slot' AND s.queue = ANY(r.queue || {queues_beside})
         AND {has_waited})
), lane AS (
  {first_lane}
), taken AS (
  SELECT * FROM (
  SELECT r.*, d.shard, (%(firsts)s::text[])[array_position(%(plans)s::text[], d.task)] AS first
    FROM ({first_waiting}) d
   CROSS JOIN LATERAL (
     SELECT r.run_id, r.not_before AS was_due, r.limits IS NOT NULL AS limited
       FROM {schema}.runs r
      WHERE {claimable}
        AND (d.reason <> 'slot' OR r.xmin = pg_current_xact_id()::xid)
      LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED) r
   LIMIT 1) f
   WHERE limited AND {schema}.take_slots(run_id)
), {claimed_next}

-- name: claim_behind
-- Take the lease of the run that comes next in the queue of one that its worker has ended or parked.
-- It comes without a message: whoever asks has had one, and takes the next one before long. None comes
-- so while a message of another queue of its workers has waited: the weights of these would not hold.
-- One with limits takes its slots as in `claim_next`, and waits for its message where one is full. One that was
-- let in is left to that, as there.
WITH own AS (
  SELECT r.queue, true AS fresh FROM {schema}.runs r
   WHERE r.run_id = %(run_id)s AND r.lease_token = %(token)s AND r.state <> 'running'
     AND NOT EXISTS (SELECT FROM {schema}.dispatches s
       WHERE s.state = 'sent' AND s.queue = ANY(array_remove({queues_beside}, r.queue))
         AND {has_waited})
), lane AS (
  {first_lane}
), taken AS (
  SELECT * FROM (
  SELECT r.*, d.shard, (%(firsts)s::text[])[array_position(%(plans)s::text[], d.task)] AS first
    FROM ({first_waiting}) d
   CROSS JOIN LATERAL (
     SELECT r.run_id, r.not_before AS was_due, r.limits IS NOT NULL AS limited
       FROM {schema}.runs r
      WHERE {claimable} AND d.reason <> 'slot'
      LIMIT 1 FOR NO KEY UPDATE OF r SKIP LOCKED) r
   LIMIT 1) f
   WHERE NOT limited OR {schema}.take_slots(run_id)
), {claimed_next}

-- name: find_following
-- Read the run that was claimed under a token by a statement whose answer was lost, as the claim would
-- have told. Its first step has begun if there is nothing behind its StepStarted.
-- By the time at which the lease runs out, as in `held_by`: no index has the token.
SELECT {claimed_columns},
       last_seq = 2 AND attempt = 1 AND retry_of IS NULL AND cancel_requested_at IS NULL
       AND EXISTS (SELECT FROM {schema}.run_events e
                    WHERE e.run_id = r.run_id AND e.seq = 2 AND e.type = 'StepStarted'), NULL
  FROM (SELECT r.*, NULL::timestamptz AS was_due
          FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
         WHERE d.state <> 'waiting' AND d.due_at > clock_timestamp()
           AND d.due_at < (SELECT clock_timestamp() + make_interval(secs => 2 * %(seconds)s))
           AND r.state = 'running' AND r.lease_token = %(token)s::bigint) r

-- name: renew
-- Give a lease that is held another token.
UPDATE {schema}.runs SET lease_token = %(next)s
 WHERE run_id = %(run_id)s AND lease_token = ANY(%(tokens)s::bigint[]) AND state = 'running'
RETURNING lease_token

-- name: extend
-- Keep these leases for their full time from now, but for those whose rows somebody holds.
-- A row that somebody holds is not waited for: the other leases must not run out meanwhile. Who keeps a
-- lease is not dead, whatever was noted of the token.
WITH held AS (
  SELECT r.run_id FROM unnest(%(run_ids)s::text[], %(tokens)s::bigint[]) AS l(run_id, token)
    JOIN {schema}.runs r ON r.run_id = l.run_id AND r.lease_token = l.token AND r.state = 'running'
    JOIN {schema}.dispatches d ON d.run_id = r.run_id
     FOR NO KEY UPDATE OF r, d SKIP LOCKED
), u AS (
  UPDATE {schema}.runs r
     SET dead_token = NULL,
         lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
    FROM held WHERE r.run_id = held.run_id
  RETURNING r.run_id, lease_token, lease_expires_at, cancel_requested_at IS NOT NULL AS cancelled
), d AS (
  UPDATE {schema}.dispatches d SET due_at = u.lease_expires_at FROM u WHERE d.run_id = u.run_id
)
SELECT lease_token, cancelled, {signalled} FROM u

-- name: end
-- End the leases of processes that have died, and ring for their runs; say which are left.
-- A lease that a transaction still writes under, or has since this began, is left for the next try:
-- its row is not waited for.
-- The token stays: what the dead process had sent before may still be written, until the next claim.
-- An attempt whose body was not called is given back: it was not what the process has died of. So is
-- one whose body ran beside others: it may have been, which its trace says. That is its outcome: the
-- token is another one then, or a process that lives after all would write one too, and it would be
-- given back twice. So would one that has a trace already, of a claim that has begun no other.
WITH held AS (
  SELECT r.run_id, r.lease_token, r.last_seq, l.renewed, l.uncalled, l.beside
    FROM unnest(%(run_ids)s::text[], %(tokens)s::bigint[], %(renewed)s::bigint[],
                %(uncalled)s::bool[], %(beside)s::bool[])
         AS l(run_id, token, renewed, uncalled, beside)
    JOIN {schema}.runs r ON r.run_id = l.run_id AND r.lease_token = l.token AND r.state = 'running'
   WHERE r.lease_expires_at > clock_timestamp()
), free AS (
  SELECT held.run_id, held.renewed, d.shard, s.step, s.attempt, held.beside,
         s.run_id IS NOT NULL AND r.last_seq < 2147483647 AS given_back
    FROM held
    JOIN {schema}.runs r ON r.run_id = held.run_id AND r.lease_token = held.lease_token
     AND r.state = 'running' AND r.last_seq = held.last_seq
     AND r.lease_expires_at > clock_timestamp()
    JOIN {schema}.dispatches d ON d.run_id = held.run_id
    LEFT JOIN LATERAL (
      SELECT * FROM {schema}.run_events e
       WHERE e.run_id = held.run_id AND e.type IN ('StepStarted', 'StepFinished', 'StepFailed')
       ORDER BY e.seq DESC LIMIT 1) s
      ON held.uncalled AND s.type = 'StepStarted'
     AND NOT EXISTS (SELECT FROM {schema}.run_events t
                      WHERE t.run_id = held.run_id AND t.seq > s.seq AND t.step = s.step
                        AND t.type = 'DebugTrace' AND t.data ->> 'name' = ANY(%(uncounted)s::text[]))
     FOR NO KEY UPDATE OF r, d SKIP LOCKED
), u AS (
  UPDATE {schema}.runs r
     SET lease_expires_at = clock_timestamp(), last_seq = r.last_seq + free.given_back::int,
         lease_token = CASE WHEN free.given_back THEN free.renewed ELSE r.lease_token END,
         dead_token = CASE WHEN free.given_back THEN free.renewed ELSE r.lease_token END
    FROM free WHERE r.run_id = free.run_id
  RETURNING r.run_id, r.last_seq, free.shard, free.step, free.attempt AS begun, free.given_back,
            free.beside
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, step, attempt, data)
  SELECT run_id, last_seq, clock_timestamp(), 'DebugTrace', 'worker', step, begun,
         jsonb_build_object('name', %(trace)s::text, 'process_died', beside)
    FROM u WHERE given_back
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT shard, run_id, last_seq, last_seq FROM u WHERE given_back
), d AS (
  UPDATE {schema}.dispatches d SET due_at = clock_timestamp() FROM u WHERE d.run_id = u.run_id
)
SELECT held.lease_token, u.run_id IS NOT NULL, {each_doorbell}
  FROM held LEFT JOIN u USING (run_id)

-- name: note_death
-- Note that a process has died, as the kit has it: its leases still run out by their time.
UPDATE {schema}.runs r SET dead_token = lease_token
  FROM {schema}.dispatches d
 WHERE d.run_id = r.run_id AND d.state = 'running' AND r.state = 'running'
   AND r.worker = %(worker)s

-- name: held_by
-- List the leases that the processes of these workers hold.
-- By the time at which they run out: what is delayed for longer is not read.
-- Of a suspect it is in the journal whether its body was called, and alone: it says so before. Not
-- looked for behind all that a step may have emitted.
SELECT r.run_id, r.lease_token, substring(r.worker FROM '[^:]*$'),
       coalesce(l.type = 'DebugTrace' AND (l.data ->> 'alone')::bool, false),
       coalesce(l.type = 'StepStarted' AND b.type = 'DebugTrace', false)
  FROM {schema}.dispatches d JOIN {schema}.runs r USING (run_id)
  LEFT JOIN LATERAL (
    SELECT e.type, e.data FROM {schema}.run_events e
     WHERE e.run_id = r.run_id AND e.seq > r.last_seq - {looked_back}
       AND (e.type IN ('StepStarted', 'StepFinished', 'StepFailed')
            OR e.type = 'DebugTrace' AND e.data ->> 'name' = %(suspect)s)
     ORDER BY e.seq DESC LIMIT 1) l ON true
  LEFT JOIN LATERAL (
    SELECT e.type FROM {schema}.run_events e
     WHERE e.run_id = r.run_id AND e.seq > r.last_seq - {looked_back}
       AND (e.type IN ('StepFinished', 'StepFailed')
            OR e.type = 'DebugTrace' AND e.data ->> 'name' = %(given_back)s
               AND e.data ->> 'process_died' = 'true')
     ORDER BY e.seq DESC LIMIT 1) b ON true
 WHERE d.state <> 'waiting' AND d.due_at > clock_timestamp()
   AND d.due_at < (SELECT clock_timestamp() + make_interval(secs => 2 * %(seconds)s))
   AND r.state = 'running' AND r.lease_expires_at > clock_timestamp()
   AND substring(r.worker FROM '[^:]*$') = ANY(%(workers)s::text[])

-- name: inspect
-- Read who has the lease of a run, and whether a worker has written since a seq.
SELECT r.lease_token, r.last_seq, r.cancel_requested_at IS NOT NULL, r.state,
       EXISTS (SELECT FROM {schema}.run_events e WHERE e.run_id = r.run_id AND e.seq > %(after)s
                                              AND e.source = 'worker')
  FROM {schema}.runs r WHERE r.run_id = %(run_id)s

-- name: take_slots_of_step
-- Take the slots and tokens of the limits of a step that begins; the limit that has none.
SELECT {schema}.take_slots_of_step(%(run_id)s::text, %(token)s::bigint, %(limits)s::jsonb)

-- name: free_slots_of_step
-- Give back those of a step that ends with this transaction, or does as its run is cancelled.
UPDATE {schema}.runs SET limits = {schema}.limits_of_plan(limits)
 WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running'
   AND (%(ends)s OR cancel_requested_at IS NOT NULL)
