-- Runs of a queue that have waited for so many seconds come before those of a higher priority; NULL: none.
ALTER TABLE queues ADD COLUMN IF NOT EXISTS age_after_s double precision;

-- A queue is resumed by the deletion of its row, also by older processes, which do not know that it can
-- hold more than its pause.
CREATE OR REPLACE FUNCTION keep_queue() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  EXECUTE format('UPDATE %I.queues SET paused_at = NULL WHERE name = $1', TG_TABLE_SCHEMA) USING OLD.name;
  RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER keep_queue BEFORE DELETE ON queues
  FOR EACH ROW WHEN (OLD.age_after_s IS NOT NULL) EXECUTE FUNCTION keep_queue();

-- The runs of a queue with groups that have the next turns, so many as there is room for. By start-time
-- fair queuing: the next turn of a group begins where its last one ended, or, if it had none lately,
-- where the queue has come to; a group owes one turn at most. Of equal turns that one is first of whose
-- group fewer are before it here, then that of a group that had none lately; runs without a group last.
-- The note of a turn: the group, where the turn begins and ends, the cursor, and whether there is room
-- left though runs wait. Groups are found by the index, and of each twice its share of the room is read.
-- The groups behind the cursor come first. If none of them has a run that can be sent, and there are
-- more, a row without a run says how far this look came: the next one goes on there. Of plans that are
-- in doubt no run is sent. Without sorts only the indexes by group give the orders that are asked for:
-- the planner would read all runs of a queue, or all turns, whose numbers it does not know. For the same
-- reason the runs of one group are asked for as a range: of one value any index has the order. Whatever
-- a weight is, it counts as one of 1 to 100.
-- In a queue with `age_after_s` the runs of a group that have waited for so long come before its others,
-- those that wait the longest first. They are among the first runs of each priority, which are read
-- instead of the first of all; only the index by groups has them in the order of falling priorities and rising
-- times, so that there a group can be asked for by its value.
CREATE OR REPLACE FUNCTION runs_in_turn(wanted text, room bigint, looked_at integer, own integer[], at_time timestamptz, only_run text, aside text[], doubted text[]) RETURNS TABLE (turn double precision, note text, defers boolean, run_id text, task text, queue text, priority smallint, due_at timestamptz, attempts integer, reason text, state text) LANGUAGE plpgsql STABLE ROWS 64 SET search_path FROM CURRENT SET enable_seqscan TO off SET enable_sort TO off SET enable_incremental_sort TO off AS $$
#variable_conflict use_column
DECLARE
  lead integer = (SELECT min(s) FROM unnest(own) s);
  look_time timestamptz = coalesce(at_time, clock_timestamp());
  served double precision;
  behind text;
  aged_since timestamptz;
BEGIN
  IF room <= 0 THEN
    RETURN;
  END IF;
  SELECT look_time - make_interval(secs => least(greatest(q.age_after_s, 0), 315360000)) INTO aged_since
    FROM queues q WHERE q.name = wanted AND q.age_after_s IS NOT NULL;
  SELECT q.served, q.cursor INTO served, behind FROM queue_turns q
   WHERE q.shard = lead AND q.queue = wanted;
  served = coalesce(served, 0);
  behind = coalesce(behind, '');
  RETURN QUERY
  WITH RECURSIVE walk(group_id, lap, n) AS (
    (SELECT * FROM (
      (SELECT d.group_id, 0 AS lap, 1 AS n FROM dispatches d
        WHERE d.state = 'waiting' AND d.queue = wanted AND d.group_id > behind
        ORDER BY d.group_id LIMIT 1)
      UNION ALL
      (SELECT d.group_id, 1, 1 FROM dispatches d
        WHERE d.state = 'waiting' AND d.queue = wanted AND d.group_id <= behind
        ORDER BY d.group_id LIMIT 1)) f LIMIT 1)
    UNION ALL
    SELECT next.* FROM walk w CROSS JOIN LATERAL (
      SELECT * FROM (
        (SELECT d.group_id, w.lap, w.n + 1 FROM dispatches d
          WHERE d.state = 'waiting' AND d.queue = wanted AND d.group_id > w.group_id
            AND (w.lap = 0 OR d.group_id <= behind)
          ORDER BY d.group_id LIMIT 1)
        UNION ALL
        (SELECT d.group_id, 1, w.n + 1 FROM dispatches d
          WHERE d.state = 'waiting' AND d.queue = wanted AND w.lap = 0 AND d.group_id <= behind
          ORDER BY d.group_id LIMIT 1)) f LIMIT 1) next
     WHERE w.n < looked_at
  ), level(priority) AS (
    (SELECT d.priority FROM dispatches d
      WHERE d.state = 'waiting' AND d.queue = wanted AND aged_since IS NOT NULL
      ORDER BY d.queue, d.priority LIMIT 1)
    UNION ALL
    SELECT next.priority FROM level CROSS JOIN LATERAL (
      SELECT d.priority FROM dispatches d
       WHERE d.state = 'waiting' AND d.queue = wanted AND d.priority > level.priority
       ORDER BY d.queue, d.priority LIMIT 1) next
  ), weighed AS MATERIALIZED (
    SELECT w.group_id, w.n,
           least(greatest((SELECT g.weight FROM group_weights g WHERE g.group_id = w.group_id), 1), 100) AS weight,
           (SELECT t.finish FROM (
              SELECT * FROM group_turns t
               WHERE t.shard = lead AND t.queue = wanted AND t.group_id >= w.group_id
               ORDER BY t.shard, t.queue, t.group_id LIMIT 1) t
             WHERE t.group_id = w.group_id) AS finish
      FROM walk w
  ), lane AS (
    SELECT w.group_id, w.weight, w.finish,
           least(greatest(w.finish, served), served + 1.0::float8 / w.weight) AS base,
           max(w.group_id) FILTER (WHERE w.n = looked_at) OVER () AS cursor,
           least(room, 1 + ceil(2.0 * room * w.weight / sum(w.weight) OVER ()))::integer AS most
      FROM weighed w
  ), found AS (
    SELECT l.*, r.*,
           row_number() OVER (PARTITION BY l.group_id
                              ORDER BY CASE WHEN r.due_at <= aged_since THEN r.due_at END,
                                       r.priority DESC, r.due_at, r.run_id) - 1 AS ahead,
           l.most < room AND count(*) OVER (PARTITION BY l.group_id) >= l.most AS is_cut
      FROM lane l CROSS JOIN LATERAL (
        (SELECT d.run_id, d.task, d.priority, d.due_at, d.attempts, d.reason FROM dispatches d
          WHERE aged_since IS NULL AND d.state = 'waiting' AND d.queue = wanted
            AND d.group_id >= l.group_id AND d.group_id <= l.group_id
            AND d.due_at <= look_time AND d.shard = ANY(own)
            AND (only_run IS NULL OR d.run_id = only_run)
            AND d.run_id <> ALL(aside) AND d.task <> ALL(doubted)
          ORDER BY d.group_id, d.priority DESC, d.due_at LIMIT l.most)
        UNION ALL
        (SELECT a.* FROM level v CROSS JOIN LATERAL (
           SELECT d.run_id, d.task, d.priority, d.due_at, d.attempts, d.reason FROM dispatches d
            WHERE d.state = 'waiting' AND d.queue = wanted AND d.group_id = l.group_id
              AND d.priority >= v.priority AND d.priority <= v.priority
              AND d.due_at <= look_time AND d.shard = ANY(own)
              AND (only_run IS NULL OR d.run_id = only_run)
              AND d.run_id <> ALL(aside) AND d.task <> ALL(doubted)
            ORDER BY d.priority DESC, d.due_at LIMIT l.most) a)) r
  ), placed AS (
    SELECT f.*, f.base + f.ahead / f.weight::float8 AS start,
           row_number() OVER (ORDER BY f.base + f.ahead / f.weight::float8, f.ahead,
                              f.finish NULLS FIRST, f.group_id = '', f.due_at, f.run_id) AS place,
           (bool_or(f.is_cut) OVER () OR f.cursor IS NOT NULL) AND count(*) OVER () < room AS is_short
      FROM found f
  )
  SELECT p.place::float8,
         jsonb_build_array(p.group_id, p.start, p.start + 1.0::float8 / p.weight, p.cursor,
                           p.is_short)::text,
         false, p.run_id, p.task, wanted, p.priority, p.due_at, p.attempts, p.reason, 'waiting'
    FROM placed p WHERE p.place <= room
  UNION ALL
  SELECT NULL, jsonb_build_array(NULL, served, NULL, l.cursor, false)::text,
         false, '', '', wanted, 0::smallint, NULL, 0, '', 'waiting'
    FROM (SELECT cursor FROM lane WHERE cursor IS NOT NULL LIMIT 1) l
   WHERE NOT EXISTS (SELECT FROM found);
END $$;
