-- The relay's statements over the outbox and the dispatches.
--
-- Whatever a row holds, no expression over its columns may fail: it would stop all runs. No write
-- waits for a row: whoever holds it would stop all runs too.

-- fragment: bounded_body
-- One outbox row `p` with the text `b` of its events, and how many bytes stand before it.
p.shard, p.id, p.run_id, coalesce(b.body, '') AS body,
sum(octet_length(b.body)) OVER (
  ORDER BY p.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before

-- fragment: body
-- The events of the outbox row `p`, one a line.
SELECT string_agg({event_json}, E'\n' ORDER BY e.seq) AS body
  FROM {schema}.run_events e
 WHERE e.run_id = p.run_id AND e.seq BETWEEN p.from_seq AND p.to_seq

-- name: history
-- Read what tells the history of this schema from every other.
SELECT {origin}

-- name: pick_events
-- Read the oldest appends of each shard with their events, by id, up to so many bytes.
-- The rows are sorted before they have bodies. One at least is given out.
SELECT shard, id, run_id, body FROM (
  SELECT {bounded_body}
    FROM (SELECT o.* FROM unnest(%(shards)s::int[]) AS own(shard) CROSS JOIN LATERAL (
   SELECT * FROM {schema}.run_outbox o
    WHERE o.shard = own.shard AND o.id > %(floor)s AND o.run_id <> ALL(%(aside)s::text[])
    ORDER BY o.id LIMIT {per_shard}) o
  ORDER BY o.id) p
   CROSS JOIN LATERAL ({body}) b) q
 WHERE coalesce(bytes_before, 0) < {batch_bytes} ORDER BY id

-- name: pick_few_events
-- Read as pick_events does, but few rows of each shard: their events are large.
SELECT shard, id, run_id, body FROM (
  SELECT {bounded_body}
    FROM (SELECT o.* FROM unnest(%(shards)s::int[]) AS own(shard) CROSS JOIN LATERAL (
   SELECT * FROM {schema}.run_outbox o
    WHERE o.shard = own.shard AND o.id > %(floor)s AND o.run_id <> ALL(%(aside)s::text[])
    ORDER BY o.id LIMIT {few_per_shard}) o
  ORDER BY o.id) p
   CROSS JOIN LATERAL ({body}) b) q
 WHERE coalesce(bytes_before, 0) < {batch_bytes} ORDER BY id

-- name: pick_run
-- Read as pick_events does, of one run only.
SELECT shard, id, run_id, body FROM (
  SELECT {bounded_body}
    FROM (SELECT * FROM {schema}.run_outbox
    WHERE shard = %(shard)s AND run_id = %(run_id)s AND run_id <> ALL(%(aside)s::text[])
    ORDER BY id LIMIT 500) p
   CROSS JOIN LATERAL ({body}) b) q
 WHERE coalesce(bytes_before, 0) < {batch_bytes} ORDER BY id

-- name: pick_one
-- Read as pick_events does, one row only: its batch could not be read.
SELECT shard, id, run_id, body FROM (
  SELECT {bounded_body}
    FROM (SELECT * FROM {schema}.run_outbox WHERE shard = %(shard)s AND id = %(id)s) p
   CROSS JOIN LATERAL ({body}) b) q
 WHERE coalesce(bytes_before, 0) < {batch_bytes} ORDER BY id

-- name: heads
-- List the appends that pick_events would read, without their events.
SELECT o.shard, o.id, o.run_id FROM unnest(%(shards)s::int[]) AS own(shard) CROSS JOIN LATERAL (
   SELECT * FROM {schema}.run_outbox o
    WHERE o.shard = own.shard AND o.id > %(floor)s AND o.run_id <> ALL(%(aside)s::text[])
      AND (%(run_id)s::text IS NULL OR o.run_id = %(run_id)s)
    ORDER BY o.id LIMIT {per_shard}) o

-- name: forget_events
-- Delete the appends that were published, but for those that another transaction holds.
-- Arrays as text: psycopg takes half as long to write one as to write the list. Row by row, by
-- LIMIT: told by an ANALYZE of the empty table that it has one row, the planner would join the
-- other way round and read the whole backlog.
DELETE FROM {schema}.run_outbox WHERE ctid = ANY(ARRAY(
  SELECT o.ctid
    FROM unnest(%(shards)s::text::int[], %(ids)s::text::bigint[]) AS done(shard, id)
   CROSS JOIN LATERAL (
     SELECT ctid FROM {schema}.run_outbox r WHERE r.shard = done.shard AND r.id = done.id
      LIMIT 1 FOR UPDATE SKIP LOCKED) o))

-- name: dead_letter
-- Move appends of one run that were refused to the dead letters, as one letter.
WITH gone AS (
  DELETE FROM {schema}.run_outbox WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {schema}.run_outbox WHERE shard = %(shard)s AND id = ANY(%(ids)s)
       FOR UPDATE SKIP LOCKED))
  RETURNING shard, from_seq, to_seq
)
INSERT INTO {schema}.dead_letters (kind, run_id, reason, message)
SELECT 'event', %(run_id)s, %(reason)s,
       jsonb_build_object('shard', min(shard), 'from_seq', min(from_seq), 'to_seq', max(to_seq))
  FROM gone
HAVING count(*) > 0

-- fragment: next_attempt
-- The number of the message that is sent next; an integer ends at 2147483647.
least(d.attempts, 2147483646) + 1

-- fragment: lanes
-- The pairs of queue and priority in which runs wait, and those of queues that are not paused.
-- Lanes are walked by index, so a long queue costs nothing to the others, and neither does one
-- whose runs are all for later: they are `delayed`, and found by their time. A queue is `grouped` if
-- some of its waiting runs have a group: those without one are a group as well then; or if runs that
-- have waited for long come first in it.
RECURSIVE lane(queue, priority) AS (
  (SELECT queue, priority FROM {schema}.dispatches WHERE state = 'waiting'
    ORDER BY queue, priority LIMIT 1)
  UNION ALL
  SELECT n.* FROM lane, LATERAL (
    SELECT queue, priority FROM {schema}.dispatches
     WHERE state = 'waiting' AND (queue, priority) > (lane.queue, lane.priority)
     ORDER BY queue, priority LIMIT 1) n
), open AS (
  SELECT lane.*, (SELECT group_id FROM {schema}.dispatches
                   WHERE state = 'waiting' AND queue = lane.queue
                   ORDER BY group_id DESC LIMIT 1) <> ''
                 OR q.age_after_s IS NOT NULL AS grouped
    FROM lane LEFT JOIN {schema}.queues q ON q.name = lane.queue
   WHERE q.paused_at IS NULL
)

-- fragment: windows
-- The content of the broker: the free places of each queue, and the plans that lost a message.
-- Each is read more than once, and so made once.
-- While a message of a plan is out that was lost once, no other of the plan is sent in that queue:
-- the workers may not have it, and drop them all.
out AS (
  SELECT queue, task, shard, reason FROM {schema}.dispatches WHERE state = 'sent'
), messages AS (
  SELECT queue, count(*) AS sent,
         least({window} - count(*),
               %(places)s - count(*) FILTER (WHERE shard = ANY(%(shards)s))) AS free
    FROM out GROUP BY queue
), doubted AS (
  SELECT DISTINCT queue, task FROM out WHERE reason = 'unclaimed' AND shard = ANY(%(shards)s)
)

-- fragment: due_runs
-- Runs outside the lanes whose time has come: delayed ones, lost messages and dead workers.
-- They are rows of `dispatches_out` that are due; a run that a dead worker had begun goes on even
-- if its queue was paused meanwhile. A delayed run `defers` if it is not to be sent from here: it waits
-- in its lane for the end of the pause, or for the turn of its group. The time is a subquery: compared with a volatile function,
-- every delayed run would be read.
SELECT NULL::float8 AS turn, NULL AS note,
       q.paused_at IS NOT NULL OR d.group_id <> ''
       OR d.queue IN (SELECT queue FROM open WHERE grouped) AS defers,
       d.run_id, d.task, d.queue, d.priority, d.due_at, d.attempts, d.reason, d.state
  FROM {schema}.dispatches d LEFT JOIN {schema}.queues q ON q.name = d.queue
 WHERE d.state <> 'waiting' AND d.due_at <= (SELECT coalesce(%(now)s, clock_timestamp()))
   AND d.shard = ANY(%(shards)s)
   AND (%(run_id)s::text IS NULL OR d.run_id = %(run_id)s)
   AND d.run_id <> ALL(%(aside)s::text[])
   AND (d.state <> 'sent' OR d.reason = 'lease' OR q.paused_at IS NULL)
 ORDER BY d.due_at LIMIT {window}

-- fragment: waiting_runs
-- The runs of one lane, those that wait the longest first. A paused queue is not looked at.
SELECT NULL::float8, NULL, false, d.run_id, d.task, d.queue, d.priority, d.due_at, d.attempts, d.reason,
       d.state
  FROM {schema}.dispatches d
 WHERE d.state = 'waiting' AND d.queue = open.queue AND d.priority = open.priority
   AND d.due_at <= (SELECT coalesce(%(now)s, clock_timestamp())) AND d.shard = ANY(%(shards)s)
   AND (%(run_id)s::text IS NULL OR d.run_id = %(run_id)s)
   AND d.run_id <> ALL(%(aside)s::text[])
   AND NOT EXISTS (
     SELECT FROM doubted o WHERE o.queue = d.queue AND o.task = d.task)
 ORDER BY d.due_at LIMIT {window}

-- fragment: room
-- The places that are free in the queue of a lane: it is asked for no more runs than those.
-- Usually there is none, and its runs are not read at all.
greatest(coalesce(messages.free, %(places)s), 0)

-- fragment: ready_order
-- The order of the runs of a queue: those that a dead worker had begun; then, in a queue with groups,
-- their turns; then priority and time.
row_number() OVER (
  PARTITION BY queue
  ORDER BY state = 'running' DESC, turn, priority DESC, due_at) AS place

-- fragment: acts
-- The action: `send` while there are places, `look` whether a message is lost, `defer`; and `wake`
-- if any run is to be woken. `pass`: no run, but a note of groups that none can be sent of.
SELECT run_id, task, queue, {next_attempt}, reason,
       CASE run_id WHEN '' THEN 'pass' ELSE 'send' END AS act, coalesce(sent, 0), note
  FROM ready d WHERE place <= coalesce(free, %(places)s)
UNION ALL
(SELECT run_id, task, queue, {next_attempt},
        CASE WHEN reason IN ('lease', 'broker_lost') THEN reason ELSE 'unclaimed' END,
        'look', coalesce(sent, 0), NULL
   FROM due d LEFT JOIN messages USING (queue) WHERE state = 'sent' ORDER BY due_at)
UNION ALL
SELECT run_id, task, queue, {next_attempt}, reason, 'defer', 0, NULL
  FROM due d
 WHERE state = 'delayed' AND defers
    OR state <> 'sent' AND run_id IN (
      SELECT run_id FROM ready r
       WHERE r.state <> 'waiting' AND place > coalesce(free, %(places)s))
UNION ALL
(SELECT run_id, '', '', 0, '', 'wake', 0, NULL FROM {schema}.wakes WHERE shard = ANY(%(shards)s) LIMIT 1)
UNION ALL
(SELECT limit_id, '', '', 0, '', 'wake', 0, NULL FROM {schema}.limit_notes
  WHERE shard = ANY(%(shards)s) AND coalesce(due_at <= clock_timestamp(), true) LIMIT 1)

-- fragment: runs_in_turn
-- The runs of queues with groups, in the order of their turns, with a note of each turn.
-- None is locked: those that another transaction holds are known to the relay, and left out.
SELECT sent, free, d.* FROM (SELECT DISTINCT queue FROM open WHERE grouped) o
  LEFT JOIN messages USING (queue) CROSS JOIN LATERAL {schema}.runs_in_turn(
    o.queue, {room}, {groups_looked_at}, %(shards)s::int[], %(now)s, %(run_id)s,
    %(aside)s || %(held)s::text[],
    ARRAY(SELECT task FROM doubted d WHERE d.queue = o.queue)) d

-- name: pick_tasks
-- Read the runs that are due, and what is to be done about each.
WITH {lanes}, {windows}, due AS (
  {due_runs}
), ready AS (
  SELECT d.*, {ready_order}
    FROM (
      SELECT sent, free, d.* FROM due d LEFT JOIN messages m ON m.queue = d.queue
       WHERE state = 'running' OR state = 'delayed' AND NOT defers
      UNION ALL
      SELECT sent, free, d.* FROM open LEFT JOIN messages USING (queue) CROSS JOIN LATERAL (
        SELECT * FROM (
          {waiting_runs}) w LIMIT {room}) d
       WHERE NOT grouped
      UNION ALL
      {runs_in_turn}) d
)
{acts}

-- name: pick_free_tasks
-- Read as pick_tasks does, but for runs that another transaction holds.
-- Locks are written: it is used only while there are such runs.
WITH {lanes}, {windows}, due AS (
  {due_runs} FOR NO KEY UPDATE OF d SKIP LOCKED
), ready AS (
  SELECT d.*, {ready_order}
    FROM (
      SELECT sent, free, d.* FROM due d LEFT JOIN messages m ON m.queue = d.queue
       WHERE state = 'running' OR state = 'delayed' AND NOT defers
      UNION ALL
      SELECT sent, free, d.* FROM open LEFT JOIN messages USING (queue) CROSS JOIN LATERAL (
        SELECT * FROM (
          {waiting_runs} FOR NO KEY UPDATE OF d SKIP LOCKED) w LIMIT {room}) d
       WHERE NOT grouped
      UNION ALL
      {runs_in_turn}) d
)
{acts}

-- name: count_turns
-- Note the turns that groups have had: where their next ones begin, and how far their queues have come.
-- A group whose turn is behind its queue is forgotten, as one that had none: so many at a time, for
-- thousands can fall behind at once. A turn is noted once its message is sent, not before: what a
-- relay leaves undone counts nothing. The rows are this relay's own, unless it has given the shard
-- away in between: who finds another one at them notes nothing, and does not wait.
WITH had AS MATERIALIZED (
  SELECT queue, group_id, max(turn) AS turn, max(finish) AS finish, max(cursor) AS cursor
    FROM unnest(%(queues)s::text[], %(groups)s::text[], %(turns)s::float8[], %(finishes)s::float8[],
                %(cursors)s::text[]) AS h(queue, group_id, turn, finish, cursor)
   WHERE (SELECT pg_try_advisory_xact_lock(hashtextextended('{schema}/turns/' || %(lead)s::int, 0)))
   GROUP BY queue, group_id
), come AS (
  INSERT INTO {schema}.queue_turns AS q (shard, queue, served, cursor)
  SELECT %(lead)s, queue, max(turn), coalesce(max(cursor), '') FROM had GROUP BY queue
  ON CONFLICT (shard, queue) DO UPDATE
     SET served = greatest(q.served, excluded.served), cursor = excluded.cursor
  RETURNING queue, served
), kept AS (
  INSERT INTO {schema}.group_turns (shard, queue, group_id, finish)
  SELECT %(lead)s, had.queue, had.group_id, had.finish FROM had JOIN come USING (queue)
   WHERE had.finish >= come.served
  ON CONFLICT (shard, queue, group_id) DO UPDATE SET finish = excluded.finish
)
DELETE FROM {schema}.group_turns WHERE ctid = ANY(ARRAY(
  SELECT past.ctid FROM come CROSS JOIN LATERAL (
    SELECT t.ctid FROM {schema}.group_turns t
     WHERE t.shard = %(lead)s AND t.queue = come.queue AND t.finish < come.served
       AND NOT EXISTS (SELECT FROM had WHERE had.queue = t.queue AND had.group_id = t.group_id
                                         AND had.finish >= come.served)
     ORDER BY t.finish LIMIT {turns_forgotten}) past))

-- name: still_held
-- List those of these messages whose runs another transaction holds.
SELECT m.run_id || '.' || m.attempt
  FROM unnest(%(run_ids)s::text[], %(attempts)s::int[]) AS m(run_id, attempt) CROSS JOIN LATERAL (
    SELECT attempts FROM {schema}.dispatches d
     WHERE d.run_id = m.run_id AND due_at <= (SELECT coalesce(%(now)s, clock_timestamp()))
       AND {next_attempt} = m.attempt LIMIT 1) d
 WHERE NOT EXISTS (SELECT FROM {schema}.dispatches d
                    WHERE d.run_id = m.run_id FOR NO KEY UPDATE SKIP LOCKED)

-- fragment: unclaimed
-- The dispatches of these messages that no worker has claimed and no transaction holds.
-- A worker may have claimed the run before this statement came: its due time has moved.
run_id = ANY(ARRAY(
   SELECT free.run_id
     FROM unnest(%(run_ids)s::text[], %(attempts)s::int[]) AS m(run_id, attempt)
    CROSS JOIN LATERAL (
      SELECT run_id FROM {schema}.dispatches d
       WHERE run_id = m.run_id AND {next_attempt} = m.attempt
         AND due_at <= coalesce(%(now)s, clock_timestamp())
       LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) free))

-- name: mark_sent
-- Count messages that the broker has taken, and set when their runs are looked at again.
UPDATE {schema}.dispatches d
   SET state = 'sent', attempts = {next_attempt},
       reason = CASE WHEN d.state = 'sent' AND d.reason <> 'lease' THEN 'unclaimed'
                     ELSE d.reason END,
       due_at = clock_timestamp() + make_interval(secs => %(redispatch)s
         * CASE WHEN d.state = 'sent' THEN {recheck_factor} ELSE 1 END)
 WHERE {unclaimed}

-- name: mark_kept
-- Set when runs are looked at again whose messages are in the broker still.
UPDATE {schema}.dispatches d
   SET due_at = clock_timestamp() + make_interval(secs => %(redispatch)s * {recheck_factor})
 WHERE {unclaimed}

-- name: mark_lost
-- Let runs whose messages are lost wait for a place in the window again.
UPDATE {schema}.dispatches d
   SET state = 'waiting', due_at = clock_timestamp(),
       reason = CASE reason WHEN 'broker_lost' THEN reason ELSE 'unclaimed' END
 WHERE {unclaimed}

-- name: defer
-- Put off runs that have become due and find no place in their queue.
-- A delayed run waits in its lane from now on, so that those behind it are seen; the run of a dead
-- worker is tried again soon.
UPDATE {schema}.dispatches d
   SET state = CASE state WHEN 'delayed' THEN 'waiting' ELSE state END,
       due_at = CASE state WHEN 'delayed' THEN due_at
                     ELSE clock_timestamp() + make_interval(secs => {defer_s}) END
 WHERE state <> 'sent' AND {unclaimed}

-- name: postpone
-- Put off runs whose messages the broker has refused.
-- Part of what was refused may have arrived, and be claimed. The next attempt is another: it
-- declares its queue anew.
UPDATE {schema}.dispatches d
   SET state = CASE WHEN state = 'running' OR reason = 'lease' THEN state ELSE 'delayed' END,
       attempts = {next_attempt},
       due_at = clock_timestamp() + make_interval(secs => %(redispatch)s),
       reason = CASE reason WHEN 'lease' THEN reason ELSE 'refused' END
 WHERE {unclaimed}

-- fragment: next_tick_s
-- Seconds until the next tick of a schedule; null if there is none.
-- Also of one that is not `firable`, for the sake of the index: it counts as held.
(SELECT extract(epoch FROM least(look_at, clock_timestamp() + interval '1 day')
                           - clock_timestamp())::float8 FROM {schema}.schedules
  WHERE look_at IS NOT NULL ORDER BY look_at LIMIT 1)

-- name: next_tick
-- Read in how many seconds a schedule has its next tick: a relay stays awake, and has fired some.
SELECT {next_tick_s}

-- name: next_due
-- Read how many seconds the relay may sleep: until a run is due, until one meets its deadline, and
-- until a schedule has a tick; and whether it has left something of what is due.
-- A dispatch that is due and was not taken waits for a place in the window, which the claims of
-- another relay's shards may free without a ring: look again soon. Before PostgreSQL 17 an infinite
-- time has no distance from another.
WITH {lanes}, clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
SELECT extract(epoch FROM CASE WHEN min(t.due_at) > clock_timestamp() + interval '1 day'
         THEN interval '1 day' ELSE min(t.due_at) - clock_timestamp() END)::float8,
       (SELECT extract(epoch FROM least(greatest(deadline_at, clock_timestamp() - interval '1 day'),
                                        clock_timestamp() + interval '1 day')
                                  - clock_timestamp())::float8 FROM {schema}.dispatches
         WHERE deadline_at IS NOT NULL AND shard = ANY(%(shards)s) ORDER BY deadline_at LIMIT 1),
       {next_tick_s},
       coalesce(bool_or(t.is_left), false)
         OR EXISTS (SELECT FROM {schema}.wakes WHERE shard = ANY(%(shards)s))
         OR EXISTS (SELECT FROM {schema}.limit_notes
                     WHERE shard = ANY(%(shards)s) AND coalesce(due_at <= clock_timestamp(), true))
  FROM (
  SELECT min(due_at) AS due_at, false AS is_left FROM {schema}.dispatches
   WHERE state <> 'waiting' AND due_at > (SELECT now FROM clock) AND shard = ANY(%(shards)s)
  UNION ALL
  SELECT min(due_at), false FROM {schema}.limit_notes WHERE shard = ANY(%(shards)s)
  UNION ALL
  SELECT NULL, EXISTS (SELECT FROM {schema}.dispatches
                        WHERE state <> 'waiting' AND due_at <= (SELECT now FROM clock)
                          AND shard = ANY(%(shards)s))
  UNION ALL
  SELECT n.due_at, n.is_left FROM open CROSS JOIN LATERAL (
    SELECT CASE WHEN due_at > clock_timestamp() THEN due_at
                ELSE clock_timestamp() + interval '0.25 s' END AS due_at,
           due_at <= clock_timestamp() AS is_left
      FROM {schema}.dispatches
     WHERE state = 'waiting' AND queue = open.queue AND priority = open.priority
       AND shard = ANY(%(shards)s)
     ORDER BY dispatches.due_at LIMIT 1) n
) t

-- name: resend_unclaimed
-- Make all messages of these shards due now: the broker has lost some, which are sent again.
UPDATE {schema}.dispatches
   SET due_at = clock_timestamp(),
       reason = CASE reason WHEN 'lease' THEN reason ELSE 'broker_lost' END
 WHERE run_id = ANY(ARRAY(
   SELECT run_id FROM {schema}.dispatches WHERE state = 'sent' AND shard = ANY(%(shards)s)
      FOR NO KEY UPDATE SKIP LOCKED))
