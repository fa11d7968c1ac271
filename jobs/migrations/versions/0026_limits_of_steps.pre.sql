-- The limits of a run that are its plan's: those of the step that it executes, or waits to execute, name
-- the step.
CREATE OR REPLACE FUNCTION limits_of_plan(given jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
  SELECT jsonb_agg(l ORDER BY place) FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) WITH ORDINALITY AS a(l, place)
   WHERE NOT l ? 'step' $$;

-- Takes a slot of each of these limits that a run has none of, in the order of ids, or the loan of one;
-- the limit that has none.
CREATE OR REPLACE FUNCTION missing_slot(claimed text, wanted jsonb, of_tree boolean) RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  place integer;
  each record;
BEGIN
  FOR each IN
    SELECT l.id, l.at_once,
           EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = l.id AND s.n > l.at_once) AS lowered
      FROM limits_of(wanted) l
     WHERE NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = l.id AND s.run_id = claimed)
       AND NOT EXISTS (SELECT FROM limit_loans o WHERE o.limit_id = l.id AND o.run_id = claimed)
     ORDER BY l.id
  LOOP
    WHILE of_tree LOOP
      place = slot_of_ancestor(each.id, claimed);
      EXIT WHEN place IS NULL;
      PERFORM FROM limit_slots s WHERE s.limit_id = each.id AND s.n = place FOR KEY SHARE;
      EXIT WHEN place = slot_of_ancestor(each.id, claimed);
    END LOOP;
    IF of_tree AND place IS NOT NULL THEN
      INSERT INTO limit_loans (limit_id, run_id, n) VALUES (each.id, claimed, place);
      CONTINUE;
    END IF;
    LOOP
      place = NULL;
      IF each.at_once > 64 AND NOT each.lowered THEN
        SELECT c.n INTO place
          FROM (SELECT 1 + floor(random() * each.at_once)::int AS n FROM generate_series(1, 16)) c
         WHERE NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = each.id AND s.n = c.n)
         LIMIT 1;
      END IF;
      IF place IS NULL THEN
        SELECT c.n INTO place FROM generate_series(1, each.at_once) c(n)
         WHERE NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = each.id AND s.n = c.n)
           AND (NOT each.lowered
                OR (SELECT count(*) FROM limit_slots s WHERE s.limit_id = each.id) < each.at_once)
         LIMIT 1;
      END IF;
      EXIT WHEN place IS NULL;
      INSERT INTO limit_slots (limit_id, n, run_id) VALUES (each.id, place, claimed)
      ON CONFLICT DO NOTHING;
      EXIT WHEN FOUND;
    END LOOP;
    IF place IS NULL THEN
      RETURN each.id;
    END IF;
  END LOOP;
  RETURN NULL;
END $$;

-- Takes a token of each of these rates, or none; the rate that has none.
CREATE OR REPLACE FUNCTION missing_token(wanted jsonb) RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  each record;
BEGIN
  FOR each IN SELECT * FROM rates_of(wanted) l ORDER BY l.id LOOP
    LOOP
      PERFORM FROM limit_rates r WHERE r.limit_id = each.id FOR NO KEY UPDATE;
      EXIT WHEN FOUND;
      INSERT INTO limit_rates (limit_id, full_at) VALUES (each.id, clock_timestamp())
      ON CONFLICT DO NOTHING;
    END LOOP;
    IF tokens_of(each.id, each.starts, each.period_s) < 1 THEN
      RETURN each.id;
    END IF;
  END LOOP;
  UPDATE limit_rates r
     SET full_at = greatest(r.full_at, clock_timestamp())
                   + make_interval(secs => l.period_s / l.starts)
    FROM rates_of(wanted) l WHERE r.limit_id = l.id;
  RETURN NULL;
END $$;

-- See 0018 and 0025; parts of it are functions of their own.
CREATE OR REPLACE FUNCTION take_slots(claimed text) RETURNS boolean LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  wanted jsonb;
  since timestamptz;
  missing text;
  bell integer;
  begins boolean;
  of_tree boolean;
BEGIN
  SELECT r.limits, r.created_at, r.attempt = 0, r.root_id IS NOT NULL
    INTO wanted, since, begins, of_tree FROM runs r
   WHERE r.run_id = claimed AND r.state = 'queued'
     AND coalesce(r.not_before <= clock_timestamp(), true) FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  missing = missing_slot(claimed, wanted, of_tree);
  IF missing IS NULL AND begins THEN
    missing = missing_token(wanted);
  END IF;
  IF missing IS NULL THEN
    RETURN true;
  END IF;
  DELETE FROM limit_loans o WHERE o.run_id = claimed;
  DELETE FROM limit_slots s
   WHERE s.run_id = claimed
     AND (begins OR keeps_slot(wanted, missing) OR NOT keeps_slot(wanted, s.limit_id));
  UPDATE dispatches d
     SET state = 'delayed', reason = 'limit', due_at = '9999-01-01Z', limit_id = missing,
         limit_since = since
   WHERE d.run_id = claimed RETURNING d.shard INTO bell;
  INSERT INTO limit_notes (shard, limit_id)
  SELECT bell, l.id FROM all_limits_of(wanted) l WHERE bell IS NOT NULL;
  PERFORM ring_relay(bell);
  RETURN false;
END $$;

-- Gives a run under its lease the slots of the limits of the step that it begins, and a token of each of
-- its rates; the limit that has none. Then the run is to wait for that, outside of the broker: its lease
-- ends in this transaction, and a relay looks at the limit once more. No limits: those of another step
-- are given back. Those that the plan has as well are the plan's.
CREATE OR REPLACE FUNCTION take_slots_of_step(claimed text, token bigint, asked jsonb) RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  wanted jsonb;
  since timestamptz;
  missing text;
  bell integer;
  of_tree boolean;
BEGIN
  UPDATE runs r
     SET limits = nullif(coalesce(limits_of_plan(r.limits), '[]') || coalesce((
                    SELECT jsonb_agg(l) FROM jsonb_array_elements(asked) l
                     WHERE NOT coalesce(limits_of_plan(r.limits), '[]')
                               @> jsonb_build_array(jsonb_build_object('id', l -> 'id'))), '[]'),
                  '[]')
   WHERE r.run_id = claimed AND r.lease_token = token AND r.state = 'running'
  RETURNING r.limits, r.created_at, r.root_id IS NOT NULL INTO wanted, since, of_tree;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  missing = missing_slot(claimed, wanted, of_tree);
  IF missing IS NULL THEN
    missing = missing_token((SELECT jsonb_agg(l) FROM jsonb_array_elements(wanted) l WHERE l ? 'step'));
  END IF;
  IF missing IS NOT NULL THEN
    UPDATE dispatches d SET limit_id = missing, limit_since = since
     WHERE d.run_id = claimed RETURNING d.shard INTO bell;
    INSERT INTO limit_notes (shard, limit_id) SELECT bell, missing WHERE bell IS NOT NULL;
  END IF;
  RETURN missing;
END $$;

-- Frees a slot, or leaves it to a child that has a lease by it.
CREATE OR REPLACE FUNCTION free_slot(limited text, place integer, bell integer) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  heir text;
BEGIN
  WHILE EXISTS (SELECT FROM limit_loans o WHERE o.limit_id = limited AND o.n = place) LOOP
    SELECT o.run_id INTO heir FROM limit_loans o
     WHERE o.limit_id = limited AND o.n = place LIMIT 1 FOR UPDATE;
    EXIT WHEN FOUND;
  END LOOP;
  IF heir IS NOT NULL THEN
    DELETE FROM limit_loans o WHERE o.limit_id = limited AND o.run_id = heir;
    UPDATE limit_slots s SET run_id = heir WHERE s.limit_id = limited AND s.n = place;
    RETURN;
  END IF;
  DELETE FROM limit_slots s WHERE s.limit_id = limited AND s.n = place;
  PERFORM pass_slot(limited, place, bell);
END $$;

-- See 0025.
CREATE OR REPLACE FUNCTION free_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  bell integer = abs(mod(hashtext(OLD.run_id), 16));
  ends boolean = TG_OP = 'DELETE';
  each record;
BEGIN
  IF NOT ends THEN
    ends = NEW.finished_at IS NOT NULL;
  END IF;
  DELETE FROM limit_loans o WHERE o.run_id = OLD.run_id;
  FOR each IN
    SELECT s.limit_id, s.n FROM limit_slots s
     WHERE s.run_id = OLD.run_id AND (ends OR NOT keeps_slot(OLD.limits, s.limit_id))
     ORDER BY s.limit_id FOR UPDATE
  LOOP
    PERFORM free_slot(each.limit_id, each.n, bell);
  END LOOP;
  IF OLD.state = 'queued' THEN
    INSERT INTO limit_notes (shard, limit_id) SELECT bell, l.id FROM all_limits_of(OLD.limits) l;
    PERFORM ring_relay(bell);
  END IF;
  RETURN NULL;
END $$;

-- Frees the slots of a step that has ended, or that a run that waits will not begin, in the commit that
-- says so. The run waits for its limits no more: the turn that it may have of theirs is to be another's.
CREATE OR REPLACE FUNCTION free_slots_of_step() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  bell integer = abs(mod(hashtext(OLD.run_id), 16));
  each record;
BEGIN
  DELETE FROM limit_loans o
   WHERE o.run_id = OLD.run_id AND NOT coalesce(NEW.limits, '[]')
                                       @> jsonb_build_array(jsonb_build_object('id', o.limit_id));
  FOR each IN
    SELECT s.limit_id, s.n FROM limit_slots s
     WHERE s.run_id = OLD.run_id AND NOT coalesce(NEW.limits, '[]')
                                         @> jsonb_build_array(jsonb_build_object('id', s.limit_id))
     ORDER BY s.limit_id FOR UPDATE
  LOOP
    PERFORM free_slot(each.limit_id, each.n, bell);
  END LOOP;
  UPDATE dispatches d SET limit_id = NEW.limits -> 0 ->> 'id'
   WHERE d.run_id = OLD.run_id AND d.limit_id IS NOT NULL
     AND NOT coalesce(NEW.limits, '[]') @> jsonb_build_array(jsonb_build_object('id', d.limit_id));
  IF OLD.state = 'queued' THEN
    INSERT INTO limit_notes (shard, limit_id)
    SELECT bell, l.id FROM all_limits_of(OLD.limits) l
     WHERE NOT coalesce(NEW.limits, '[]') @> jsonb_build_array(jsonb_build_object('id', l.id));
    PERFORM ring_relay(bell);
  END IF;
  RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER runs_end_step AFTER UPDATE OF limits ON runs FOR EACH ROW
  WHEN (OLD.limits IS NOT NULL AND NEW.finished_at IS NULL AND OLD.limits IS DISTINCT FROM NEW.limits)
  EXECUTE FUNCTION free_slots_of_step();
