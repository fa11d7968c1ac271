-- Statements over the signals of runs.

-- fragment: known
-- Whether a signal `i` was sent to its run before: it has been taken in, or is in the inbox.
-- By the run's events, which are read in whole.
SELECT e.data ->> 'name' AS name, e.data -> 'data' AS data, e.data -> 'decision' AS decision
   FROM {schema}.run_events e
   WHERE e.run_id = i.run_id AND e.type = 'SignalReceived' AND e.data ->> 'key' = i.key
  UNION ALL
  SELECT s.name, s.data, s.decision FROM {schema}.signals s
   WHERE s.run_id = i.run_id AND s.key = i.key

-- fragment: left_behind
-- The seq from which on a run `i` may have open waits: its function last began again there.
-- Looked for from the end.
coalesce((SELECT b.seq FROM {schema}.run_events b
             WHERE b.run_id = i.run_id AND b.type = 'RunRestarted' ORDER BY b.seq DESC LIMIT 1), 0)

-- fragment: waits_of
-- The waits of a run `i` that have begun and not ended, nor were left behind.
-- Each event is read once: a run may have thousands of waits.
SELECT w.step, w.data, w.seq FROM (
   SELECT w.step, w.data, w.seq, w.type,
          max(w.seq) FILTER (WHERE w.type = 'WaitFinished') OVER (PARTITION BY w.step) AS finished,
          max(w.seq) FILTER (WHERE w.type NOT IN ('WaitStarted', 'WaitFinished')) OVER () AS ended
     FROM {schema}.run_events w
    WHERE w.run_id = i.run_id AND w.seq >= {left_behind}
      AND w.type IN ('WaitStarted', 'WaitFinished', 'CancelRequested', 'UndoStarted', 'RunRestarted',
                     'RunFinished')) w
  WHERE w.type = 'WaitStarted' AND w.seq > greatest(w.finished, w.ended, 0)

-- name: open_waits
-- Read the open waits of a run, oldest first.
-- Also for children: of a call that has started many; of those that were started one by one the
-- last, while the run is parked for one of them.
SELECT step, data, seq FROM (SELECT %(run_id)s::text AS run_id) AS i CROSS JOIN LATERAL (
  {waits_of}
  UNION ALL
  SELECT w.step, jsonb_build_object('kind', 'children'), w.seq FROM (
    SELECT w.*, max(w.seq) OVER () AS last_seq FROM (
      SELECT w.step, w.data, w.seq, w.run_id, w.type,
             max(w.seq) FILTER (WHERE w.type = 'ChildrenFinished') OVER (PARTITION BY w.step)
               AS finished,
             max(w.seq) FILTER (WHERE w.type NOT IN ('ChildrenStarted', 'ChildrenFinished')) OVER ()
               AS ended
        FROM {schema}.run_events w
       WHERE w.run_id = i.run_id AND w.seq >= {left_behind}
         AND w.type IN ('ChildrenStarted', 'ChildrenFinished', 'CancelRequested', 'UndoStarted',
                        'RunRestarted', 'RunFinished')) w
     WHERE w.type = 'ChildrenStarted' AND w.seq > greatest(w.finished, w.ended, 0)) w
   WHERE NOT w.data ? 'run_id'
      OR w.seq = w.last_seq AND EXISTS (SELECT FROM {schema}.dispatches d
          WHERE d.run_id = i.run_id AND d.reason = 'wait' AND d.children_left IS NOT NULL)
) w ORDER BY seq

-- name: open_approvals
-- Read the approvals of these runs that are open, and not decided, in the order of the runs.
-- By the events of each run, which are read in whole.
SELECT i.run_id, w.step, w.data, w.seq
  FROM unnest(%(run_ids)s::text[]) WITH ORDINALITY AS i(run_id, n) CROSS JOIN LATERAL ({waits_of}) w
 WHERE w.data ->> 'kind' = 'approval' AND NOT EXISTS (
   SELECT FROM {schema}.decisions d WHERE d.run_id = i.run_id AND d.occurrence = w.step)
 ORDER BY i.n, w.seq

-- name: send
-- Store signals for runs, and have the relay look at these; none if one of them cannot be sent.
-- The run's row is read, and neither locked nor changed: the caller's transaction may stay open.
-- Says of each whether its run exists, has ended, and has received this signal before, if it was
-- another one, and which signals the run waits for.
WITH input AS (
  SELECT * FROM ROWS FROM (jsonb_to_recordset(%(signals)s::jsonb) AS (
    run_id text, shard smallint, name text, key text, data jsonb)) WITH ORDINALITY
    AS i(run_id, shard, name, key, data, n)
), found AS MATERIALIZED (
  SELECT i.*, r.run_id IS NOT NULL AS exists,
         coalesce(r.state IN ('completed', 'failed', 'cancelled'), false) AS ended,
         k.name IS NOT NULL AS known,
         k.name IS NOT NULL
           AND (k.name <> i.name OR coalesce(k.data, 'null') <> coalesce(i.data, 'null')) AS differs
    FROM input i
    LEFT JOIN {schema}.runs r ON r.run_id = i.run_id AND r.namespace = %(namespace)s
    LEFT JOIN LATERAL ({known} LIMIT 1) k ON true
), good AS (
  SELECT * FROM found WHERE NOT known AND NOT EXISTS (
    SELECT FROM found WHERE NOT exists OR differs OR ended AND NOT known)
), s AS (
  INSERT INTO {schema}.signals (run_id, name, key, data)
  SELECT run_id, name, key, data FROM good ORDER BY n
), w AS (
  INSERT INTO {schema}.wakes (shard, run_id) SELECT DISTINCT shard, run_id FROM good
)
SELECT exists, ended, known, differs,
       ARRAY(SELECT DISTINCT e.value FROM ({waits_of}) w
              CROSS JOIN LATERAL jsonb_array_elements_text(w.data -> 'names') e ORDER BY e.value),
       CASE WHEN n IN (SELECT n FROM good) THEN {each_doorbell} END
  FROM found i ORDER BY n

-- name: decide
-- Store the decision of an approval that is open: once, and with the signal that carries it.
-- Of two transactions the second waits at the primary key of `decisions` for the first. Of one call
-- that is tried again each try has its key: it decides nothing else meanwhile.
WITH i AS (
  SELECT run_id, %(key)s::text AS key FROM {schema}.runs
   WHERE run_id = %(run_id)s AND namespace = %(namespace)s AND cancel_requested_at IS NULL
     AND state NOT IN ('completed', 'failed', 'cancelled')
     AND (%(link)s::text IS NULL OR EXISTS (
       SELECT FROM {schema}.approval_links l
        WHERE l.id = %(link)s AND l.revoked_at IS NULL AND l.expires_at > clock_timestamp()))
), d AS (
  INSERT INTO {schema}.decisions (run_id, occurrence, data, decided_by, link)
  SELECT i.run_id, w.step, %(data)s::jsonb, %(by)s, %(link)s::text FROM i CROSS JOIN LATERAL ({waits_of}) w
   WHERE w.step = %(occurrence)s AND w.data ->> 'kind' = 'approval' AND NOT EXISTS ({known})
  ON CONFLICT DO NOTHING RETURNING *
), s AS (
  INSERT INTO {schema}.signals (run_id, name, key, data, decision)
  SELECT run_id, occurrence, %(key)s, data, jsonb_strip_nulls(jsonb_build_object(
         'wait', occurrence, 'by', decided_by, 'link', link,
         'at', (extract(epoch FROM decided_at) * 1000)::bigint)) FROM d
), w AS (
  INSERT INTO {schema}.wakes (shard, run_id) SELECT %(shard)s, run_id FROM d
)
SELECT (SELECT decided_at FROM d), CASE WHEN EXISTS (SELECT FROM d) THEN {doorbell} END

-- name: sent_with
-- Read what a key was used for: the occurrence that it has decided, and the form of that.
SELECT k.decision ->> 'wait', w.data ->> 'form'
  FROM (SELECT %(run_id)s::text AS run_id, %(key)s::text AS key) i CROSS JOIN LATERAL ({known}) k
  LEFT JOIN {schema}.run_events w
         ON w.run_id = i.run_id AND w.type = 'WaitStarted' AND w.step = k.decision ->> 'wait'
 LIMIT 1

-- name: decision
-- Read the last decision of an occurrence, or of a name, and whether its data is this.
SELECT occurrence, decided_by, link, decided_at, data = %(data)s::jsonb FROM {schema}.decisions
 WHERE run_id = %(run_id)s AND %(name)s = CASE WHEN %(exact)s THEN occurrence
                                               ELSE split_part(occurrence, '#', 1) END
 ORDER BY decided_at DESC LIMIT 1

-- name: begun
-- Count the occurrences of a wait that a run has begun, but for those with an id.
-- By the run's events, which are read in whole.
SELECT count(*) FROM {schema}.run_events
 WHERE run_id = %(run_id)s AND type = 'WaitStarted'
   AND split_part(step, '#', 1) = %(name)s AND split_part(step, '#', 2) ~ '^[0-9]*$'

-- name: lock
-- Lock a run under its lease.
-- In a statement of its own: the next one sees the signals that were committed while this waited.
SELECT last_seq FROM {schema}.runs
 WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running' FOR NO KEY UPDATE

-- name: take_in
-- Move the signals of a run that was locked under its lease into the journal.
-- Of a key that was sent twice, by transactions that did not see each other, the first. Decisions
-- are all taken in: `decisions` has each once, and says that its wait is decided.
WITH gone AS (
  DELETE FROM {schema}.signals WHERE run_id = (
    SELECT run_id FROM {schema}.runs
     WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running')
  RETURNING run_id, id, name, key, data, decision
), fresh AS MATERIALIZED (
  SELECT *, row_number() OVER (ORDER BY id) AS n FROM (
    SELECT DISTINCT ON (key, decision ->> 'wait') * FROM gone i
     WHERE decision IS NOT NULL OR NOT EXISTS (
       SELECT FROM {schema}.run_events e
        WHERE e.run_id = i.run_id AND e.type = 'SignalReceived' AND e.data ->> 'key' = i.key)
     ORDER BY key, decision ->> 'wait', id) i
), u AS (
  UPDATE {schema}.runs r SET last_seq = r.last_seq + (SELECT count(*)::int FROM fresh)
   WHERE run_id = (SELECT run_id FROM fresh LIMIT 1)
  RETURNING r.run_id, r.last_seq, (SELECT count(*)::int FROM fresh) AS n
), e AS (
  INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
  SELECT u.run_id, u.last_seq - u.n + fresh.n, clock_timestamp(), 'SignalReceived', 'api',
         jsonb_build_object('name', name, 'data', coalesce(data, 'null'), 'key', key)
           || CASE WHEN decision IS NULL THEN jsonb_build_object() ELSE jsonb_build_object('decision', decision) END
    FROM u CROSS JOIN fresh
), o AS (
  INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
  SELECT %(shard)s, run_id, last_seq - (n) + 1, last_seq FROM u
)
SELECT {doorbell} FROM u

-- name: look
-- Read the signals of a run after a seq, its last seq, and the seconds until some of its waits end.
-- A wait without an end is due in a time that never comes, which is a date all the same: before
-- PostgreSQL 17 an infinite time has no distance from another.
SELECT ARRAY(SELECT {event_json} FROM {schema}.run_events e
              WHERE e.run_id = %(run_id)s AND e.seq > %(seen)s AND e.type = 'SignalReceived'
              ORDER BY e.seq),
       (SELECT last_seq FROM {schema}.runs WHERE run_id = %(run_id)s),
       extract(epoch FROM least('{never}'::timestamptz, (
         SELECT min(to_timestamp((e.data ->> 'until')::float8 / 1000)) FROM {schema}.run_events e
          WHERE e.run_id = %(run_id)s AND e.seq = ANY(%(waits)s::int[])))
         - clock_timestamp())::float8
