-- The statements that check the promises of docs/guarantees.md on what is stored.

-- name: page
-- List some of the runs in the order of their ids, with how many events they have.
SELECT run_id, last_seq::bigint - pruned_seq FROM {schema}.runs
 WHERE run_id > %(after)s ORDER BY run_id LIMIT {page_runs}

-- fragment: run_facts
-- Of a run, what the checks read.
SELECT run_id, state, last_seq::bigint AS last_seq, attempt, finished_at,
       pruned_seq::bigint AS pruned_seq, parent_id, child_no, plan,
       namespace || '/' || dedupe_key AS dedupe_key, limits FROM {schema}.runs

-- fragment: dispatch_facts
-- Of a dispatch, what the checks read.
SELECT run_id, state = 'delayed' AND reason = 'wait' AS waits, children_left, task, dedupe_key,
       dedupe_next,
       CASE WHEN state = 'delayed' AND reason = 'limit' THEN limit_id END AS awaited
  FROM {schema}.dispatches

-- fragment: event_facts
-- Of an event, what the checks read: data may be large.
SELECT run_id, seq, ts, type, step,
       CASE WHEN type = 'RunFinished' THEN data ->> 'outcome' END AS outcome,
       CASE WHEN type IN ('StepStarted', 'StepFinished') THEN data ->> 'renamed_from' END
         AS renamed_from,
       CASE WHEN type = 'DebugTrace' AND step IS NOT NULL THEN data ->> 'name' IN
         ('beatless.snoozed', 'beatless.given_back', 'beatless.connection_lost') END AS repeats,
       CASE WHEN type = 'DebugTrace' AND step IS NOT NULL
            THEN data ->> 'name' = 'beatless.left_out' END AS left_out,
       CASE WHEN type = 'StepFinished'
            THEN coalesce(data @> '{"on_cancel": true}' OR data ? 'undoes', false) END AS undoes,
       CASE WHEN type = 'StepFailed' THEN data @> '{"final": true}' END AS final,
       type = 'StepStarted' AND coalesce(data -> 'version' >= '1073741824', false) AS beside
  FROM {schema}.run_events

-- fragment: violations
-- The checks of `run` and its `event`.
head AS (
  SELECT run_id, count(*) AS events, min(seq) AS first, max(seq) AS last,
         count(*) FILTER (WHERE type = 'RunFinished') AS finished,
         max(seq) FILTER (WHERE type = 'RunFinished') AS finished_seq,
         max(outcome) AS outcome,
         min(seq) FILTER (WHERE type = 'CancelRequested') AS cancel_seq,
         min(seq) FILTER (WHERE type IN ('CancelRequested', 'UndoStarted')) AS undo_seq,
         bool_or(type = 'RunStarted' AND seq = 1) AS started
    FROM event GROUP BY run_id
), step AS (
  SELECT run_id, step,
         count(*) FILTER (WHERE type = 'StepStarted') AS starts,
         count(*) FILTER (WHERE type = 'StepFinished') AS finishes,
         count(*) FILTER (WHERE type = 'StepFailed') AS failures,
         count(*) FILTER (WHERE repeats) AS repeats,
         min(seq) FILTER (WHERE type = 'StepFinished') AS finished_seq,
         max(seq) FILTER (WHERE type = 'StepStarted') AS last_start_seq
    FROM event WHERE step IS NOT NULL GROUP BY run_id, step
), passed AS (
  -- Under the name that it had when it began, if another version of the plan gave it another. A
  -- plan's function passes a step that has failed for good, or that it no longer asks for.
  SELECT run_id, type, step, began_as, lead(step) OVER following AS next_step,
         lead(began_as) OVER following AS next_began_as, lead(seq) OVER following AS next_seq
    FROM (SELECT *, coalesce(renamed_from, step) AS began_as
            FROM event
           WHERE (type IN ('StepStarted', 'StepFinished') OR final OR left_out) AND NOT beside) event
  WINDOW following AS (PARTITION BY run_id ORDER BY seq)
), beside AS (
  -- Steps that were begun beside others of their run: what comes between is of those. Only the starts
  -- of a step that was renamed meanwhile have its former name.
  SELECT run_id, step, bool_or(begun) OVER one AS begun, bool_or(ended) OVER one AS ended
    FROM (SELECT run_id, step, coalesce(max(renamed_from), step) AS began_as,
                 bool_or(beside) AS begun,
                 bool_or(type = 'StepFinished' OR coalesce(final, false)) AS ended
            FROM event WHERE type IN ('StepStarted', 'StepFinished') OR final GROUP BY 1, 2) event
  WINDOW one AS (PARTITION BY run_id, began_as)
), final AS MATERIALIZED (
  -- Joined once: the planner expects so few runs that it would compare each with each.
  SELECT run_id, run.state, run.last_seq, run.attempt, run.finished_at, run.pruned_seq,
         head.events, head.first, head.last, head.finished, head.finished_seq, head.outcome,
         head.cancel_seq, head.undo_seq, head.started, state IN ('completed', 'failed', 'cancelled') AS ended
    FROM run LEFT JOIN head USING (run_id)
)
SELECT 'I2', run_id,
       format('its events are not %%s to %%s without a gap: it has %%s, from %%s to %%s',
              pruned_seq + 1, last_seq, coalesce(events, 0), first, last)
  FROM final
 WHERE (coalesce(events, 0), coalesce(first, last_seq + 1), coalesce(last, last_seq))
       IS DISTINCT FROM ((last_seq - pruned_seq)::bigint, pruned_seq + 1, last_seq)
UNION ALL
SELECT 'I2', run_id, format('it is %%s, and its events up to %%s were pruned', state, pruned_seq)
  FROM final WHERE pruned_seq > 0 AND NOT ended
UNION ALL
SELECT 'I2', run_id, 'its first event is not RunStarted'
  FROM final WHERE NOT started AND pruned_seq = 0
UNION ALL
SELECT 'I4', run_id, format('step %%s has %%s results', step, finishes) FROM step WHERE finishes > 1
UNION ALL
SELECT 'I4', run_id, format('step %%s was started again after its result', step)
  FROM step WHERE last_start_seq > finished_seq
UNION ALL
SELECT 'I4', run_id, format('step %%s was begun and passed without a result', step)
  FROM passed JOIN final USING (run_id)
 WHERE type = 'StepStarted'
   AND (next_step <> step AND next_began_as <> began_as
        AND (undo_seq IS NULL OR next_seq < undo_seq)
        OR next_step IS NULL AND cancel_seq IS NULL AND outcome = 'completed')
UNION ALL
SELECT 'I4', run_id, format('step %%s was begun beside others and passed without a result', step)
  FROM beside JOIN final USING (run_id)
 WHERE begun AND NOT beside.ended AND cancel_seq IS NULL AND outcome = 'completed'
UNION ALL
SELECT 'I5', run_id, format('it is %%s and has %%s RunFinished', state, coalesce(finished, 0))
  FROM final
 WHERE coalesce(finished, 0) <> (ended AND pruned_seq < last_seq)::int
UNION ALL
SELECT 'I5', run_id, format('RunFinished is event %%s of %%s', finished_seq, last)
  FROM final WHERE finished_seq < last
UNION ALL
SELECT 'I5', run_id, format('it is %%s, its RunFinished says %%s', state, outcome)
  FROM final
 WHERE ended AND last IS NOT NULL AND outcome IS DISTINCT FROM state
UNION ALL
SELECT 'I7', run_id, format('it is %%s and nothing will ever look at it again', final.state)
  FROM final LEFT JOIN dispatch d USING (run_id) WHERE NOT ended AND d.run_id IS NULL
UNION ALL
SELECT 'I7', run_id, format('it is %%s and would be dispatched again', final.state)
  FROM final JOIN dispatch d USING (run_id) WHERE ended
UNION ALL
SELECT 'I7', run_id, format('it waits, its signal %%s was sent, and nothing will wake it', s.name)
  FROM final JOIN dispatch d USING (run_id) JOIN {schema}.signals s USING (run_id)
 WHERE d.waits AND NOT EXISTS (SELECT FROM {schema}.wakes w WHERE w.run_id = final.run_id)
UNION ALL
SELECT 'I7', run_id, 'it waits, its children have ended, and nothing will wake it'
  FROM final JOIN dispatch d USING (run_id)
 WHERE d.waits AND d.children_left IS NOT NULL
   AND (SELECT count(*) FROM (SELECT FROM {schema}.dispatches c WHERE c.parent_id = final.run_id
                               LIMIT d.children_left + 1) c) <= d.children_left
   AND NOT EXISTS (SELECT FROM {schema}.wakes w WHERE w.run_id = final.run_id)
UNION ALL
SELECT 'I7', run_id, 'it waits, the run before it with its dedupe key has ended, and nothing says so'
  FROM final JOIN dispatch d USING (run_id)
 WHERE NOT ended AND d.dedupe_next
   AND NOT EXISTS (SELECT FROM {schema}.dispatches p
                    WHERE p.task = d.task AND p.dedupe_key = d.dedupe_key AND NOT p.dedupe_next)
   AND NOT EXISTS (SELECT FROM {schema}.wakes w
                    WHERE w.reason = 'next' AND w.plan = d.task AND w.dedupe_key = d.dedupe_key)
UNION ALL
SELECT 'I13', run.run_id, 'its dispatch does not hold its dedupe key: another run may have it, too'
  FROM run JOIN dispatch d USING (run_id)
 WHERE (d.dedupe_key, d.task) IS DISTINCT FROM (run.dedupe_key, run.plan)
UNION ALL
SELECT 'I13', run.run_id, 'it has begun while a run with its dedupe key was unfinished'
  FROM run JOIN dispatch d USING (run_id) WHERE d.dedupe_next AND run.attempt > 0
UNION ALL
SELECT 'I7', run_id, format('it waits for the limit %%s, of which slots are free, and nothing will let '
       'a run in', d.awaited)
  FROM run JOIN dispatch d USING (run_id)
 CROSS JOIN LATERAL {schema}.limits_of(run.limits) l
 WHERE l.id = d.awaited
   AND (SELECT count(*) FROM {schema}.limit_slots s WHERE s.limit_id = d.awaited) < l.at_once
   AND NOT EXISTS (SELECT FROM {schema}.dispatches o
                    WHERE o.limit_id = d.awaited AND o.state IN ('waiting', 'sent'))
   AND NOT EXISTS (SELECT FROM {schema}.limit_notes n WHERE n.limit_id = d.awaited)
UNION ALL
SELECT 'I14', run_id, format('it is %%s and has %%s slots of %%s limits', state, slots, limits)
  FROM (SELECT run_id, state, CASE WHEN limits IS NULL THEN 0
               ELSE (SELECT count(*) FROM {schema}.limits_of(run.limits)) END AS limits,
               (SELECT count(*) FROM {schema}.limit_slots s
                 WHERE s.run_id = run.run_id
                   AND (run.state <> 'queued' OR NOT {schema}.keeps_slot(run.limits, s.limit_id)))
               + (SELECT count(*) FROM {schema}.limit_loans o WHERE o.run_id = run.run_id) AS slots
          FROM run) held
 WHERE slots <> CASE WHEN state = 'running' THEN limits ELSE 0 END
UNION ALL
SELECT 'I14', run.run_id, format('it has a lease by slot %%s of the limit %%s, which nobody holds',
       o.n, o.limit_id)
  FROM run JOIN {schema}.limit_loans o USING (run_id)
 WHERE NOT EXISTS (SELECT FROM {schema}.limit_slots s WHERE s.limit_id = o.limit_id AND s.n = o.n)
UNION ALL
SELECT 'I2', run.run_id, format('it is child %%s of run %%s, which has started none of this number',
       run.child_no, run.parent_id)
  FROM run JOIN {schema}.runs p ON p.run_id = run.parent_id AND p.pruned_seq = 0
 WHERE NOT EXISTS (
   SELECT FROM {schema}.run_events e
    WHERE e.run_id = run.parent_id AND e.type = 'ChildrenStarted'
      AND run.child_no - (e.data ->> 'first')::int BETWEEN 0 AND (e.data ->> 'count')::int - 1)
UNION ALL
SELECT 'I8', run_id, format('events %%s to %%s still wait to be published, %%s after its end',
       o.from_seq, o.to_seq, date_trunc('second', clock_timestamp() - finished_at))
  FROM final JOIN {schema}.run_outbox o USING (run_id)
 WHERE ended AND finished_at < clock_timestamp() - make_interval(secs => %(patience)s)
UNION ALL
SELECT 'I8', run_id, format('outbox row %%s names events that do not exist', o.id)
  FROM final JOIN {schema}.run_outbox o USING (run_id) WHERE o.to_seq > last_seq OR o.from_seq < 1
UNION ALL
SELECT 'I1', run_id, format('event %%s has a time that no clock gave: %%s', seq, ts)
  FROM event WHERE ts <= '1000-01-01Z' OR ts >= '10000-01-01Z'
UNION ALL
SELECT 'I9', run_id, format('%%s steps finished after its cancel was accepted', count(*))
  FROM final JOIN event USING (run_id) LEFT JOIN beside USING (run_id, step)
 WHERE event.type = 'StepFinished' AND event.seq > cancel_seq
   AND NOT event.undoes AND beside.begun IS NOT TRUE
 GROUP BY run_id HAVING count(*) > 1
UNION ALL
SELECT 'I9', run_id, format('its cancel was accepted, yet it ended as %%s', state)
  FROM final
 WHERE ended AND cancel_seq IS NOT NULL AND state <> 'cancelled'
UNION ALL
SELECT 'I10', run_id, format('step %%s was started %%s times, with %%s failures in %%s claims',
       step, starts, failures, attempt)
  FROM step JOIN run USING (run_id) WHERE starts > attempt + failures + repeats

-- name: violations_of
-- List each promise that one of these runs breaks.
-- One statement, so that everything is seen at one instant.
-- Reads in whole: run_outbox and wakes, which are short, and dispatches. For a person who asks.
WITH run AS MATERIALIZED (
  {run_facts} WHERE run_id = ANY(%(run_ids)s)
), event AS MATERIALIZED (
  {event_facts} WHERE run_id = ANY(ARRAY(SELECT run_id FROM run))
), dispatch AS MATERIALIZED (
  {dispatch_facts} WHERE run_id = ANY(%(run_ids)s)
), {violations}
UNION ALL
{unfit}
 ORDER BY 2, 1

-- name: violations_between
-- List each promise that a run breaks whose id is between two, or that rows without a run break.
-- One statement, so that everything of a run is seen at one instant.
-- Reads in whole: run_outbox and wakes, which are short.
WITH run AS MATERIALIZED (
  {run_facts} WHERE run_id > %(after)s AND run_id <= %(upto)s
), event AS MATERIALIZED (
  {event_facts} WHERE run_id > %(after)s AND run_id <= %(upto)s
    AND run_id IN (SELECT run_id FROM run)
), dispatch AS MATERIALIZED (
  {dispatch_facts} WHERE run_id > %(after)s AND run_id <= %(upto)s
), {violations}
UNION ALL
SELECT 'I12', run_id, format('it does not exist, yet it has rows in %%s', string_agg(name, ', '))
  FROM (SELECT DISTINCT run_id, 'run_events' FROM {schema}.run_events
         WHERE run_id > %(after)s AND run_id <= %(upto)s
         UNION SELECT run_id, 'run_outbox' FROM {schema}.run_outbox
                WHERE run_id > %(after)s AND run_id <= %(upto)s
         UNION SELECT run_id, 'limit_slots' FROM {schema}.limit_slots
                WHERE run_id > %(after)s AND run_id <= %(upto)s
         UNION SELECT run_id, 'limit_loans' FROM {schema}.limit_loans
                WHERE run_id > %(after)s AND run_id <= %(upto)s
         UNION SELECT run_id, 'dispatches' FROM dispatch) AS stored(run_id, name)
 WHERE NOT EXISTS (SELECT FROM run WHERE run.run_id = stored.run_id)
 GROUP BY run_id
 ORDER BY 2, 1
