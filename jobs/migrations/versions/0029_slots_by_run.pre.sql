-- The functions of 0018 and 0025 that each claim and each end of a run with limits call. A slot lives for
-- as long as a lease, so an index has more that were deleted than are there: up to thousands of one limit
-- while any session has an old snapshot, and a reader passes over all of them. So the slots of a run are
-- looked for by the run alone, of many places one is looked at, and whoever claims behind an end in the same
-- transaction tries the place first that is free by that end: nobody else sees that it is.

-- Takes a slot of each of these limits that a run has none of, in the order of ids, or the loan of one;
-- the limit that has none.
CREATE OR REPLACE FUNCTION missing_slot(claimed text, wanted jsonb, of_tree boolean) RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  place integer;
  tried integer;
  freed text = current_setting('beatless.freed_slot', true);
  had text[];
  each record;
BEGIN
  had = ARRAY(SELECT s.limit_id FROM limit_slots s WHERE s.run_id = claimed
              UNION ALL SELECT o.limit_id FROM limit_loans o WHERE o.run_id = claimed);
  FOR each IN
    SELECT l.id, l.at_once,
           EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = l.id AND s.n > l.at_once) AS lowered
      FROM limits_of(wanted) l WHERE l.id <> ALL(had) ORDER BY l.id
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
    IF NOT each.lowered AND substr(freed, strpos(freed, ' ') + 1) = each.id
       AND freed ~ '^[1-9][0-9]{0,4} ' THEN
      place = split_part(freed, ' ', 1)::int;
      IF place <= each.at_once THEN
        INSERT INTO limit_slots (limit_id, n, run_id) VALUES (each.id, place, claimed)
        ON CONFLICT DO NOTHING;
        CONTINUE WHEN FOUND;
      END IF;
    END IF;
    place = NULL;
    IF each.at_once > 64 AND NOT each.lowered THEN
      FOR tries IN 1..16 LOOP
        tried = 1 + floor(random() * each.at_once)::int;
        CONTINUE WHEN EXISTS (
          SELECT FROM limit_slots s WHERE s.limit_id = each.id AND s.n = tried);
        INSERT INTO limit_slots (limit_id, n, run_id) VALUES (each.id, tried, claimed)
        ON CONFLICT DO NOTHING RETURNING n INTO place;
        EXIT WHEN place IS NOT NULL;
      END LOOP;
      CONTINUE WHEN place IS NOT NULL;
    END IF;
    LOOP
      SELECT c.n INTO place FROM generate_series(1, each.at_once) c(n)
       WHERE NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = each.id AND s.n = c.n)
         AND (NOT each.lowered
              OR (SELECT count(*) FROM limit_slots s WHERE s.limit_id = each.id) < each.at_once)
       LIMIT 1;
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

-- Frees the slots of a run that does not run any more, whatever has ended its lease, but those that it
-- keeps until its end. A slot that is lent then is that of a child that has a lease by it: of a run that
-- keeps none, and has no ancestor, none is. The turn of one that ends while it waits is to be another's.
CREATE OR REPLACE FUNCTION free_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  bell integer = abs(mod(hashtext(OLD.run_id), 16));
  ends boolean = TG_OP = 'DELETE';
  each record;
BEGIN
  IF OLD.root_id IS NULL AND NOT OLD.limits @> '[{"hold": "run"}]' THEN
    FOR each IN
      DELETE FROM limit_slots s WHERE s.run_id = OLD.run_id RETURNING s.limit_id, s.n
    LOOP
      PERFORM set_config('beatless.freed_slot', concat(each.n, ' ', each.limit_id), true);
      PERFORM pass_slot(each.limit_id, each.n, bell);
    END LOOP;
  ELSE
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
  END IF;
  IF OLD.state = 'queued' THEN
    INSERT INTO limit_notes (shard, limit_id) SELECT bell, l.id FROM all_limits_of(OLD.limits) l;
    PERFORM ring_relay(bell);
  END IF;
  RETURN NULL;
END $$;

-- No lease without its slots, whoever claims: see 0018. Usually it has one of each limit.
CREATE OR REPLACE FUNCTION require_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  held bigint = (SELECT count(*) FROM limit_slots s WHERE s.run_id = NEW.run_id);
BEGIN
  IF held < (CASE jsonb_typeof(NEW.limits) WHEN 'array' THEN jsonb_array_length(NEW.limits) END)
     AND held
     + (SELECT count(*) FROM limit_loans o WHERE o.run_id = NEW.run_id)
     < (SELECT count(*) FROM limits_of(NEW.limits)) THEN
    RAISE lock_not_available
      USING MESSAGE = concat('run ', NEW.run_id, ' has no slot of each of its limits');
  END IF;
  RETURN NULL;
END $$;
