-- The limits of a run that are its plan's: those of the step that it executes, or waits to execute, name
-- the step.
CREATE OR REPLACE FUNCTION limits_of_plan(given jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
  SELECT jsonb_agg(l ORDER BY place) FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) WITH ORDINALITY AS a(l, place)
   WHERE NOT l ? 'step' $$;

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
