-- A loan lets a child have a lease by a slot that one of its ancestors keeps (`"hold": "run"` in the
-- limits of that): the child holds none of its own.
CREATE TABLE IF NOT EXISTS limit_loans (
  limit_id text COLLATE "C" NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  n integer NOT NULL,
  PRIMARY KEY (limit_id, run_id)
);

CREATE INDEX CONCURRENTLY IF NOT EXISTS limit_loans_slot ON limit_loans (limit_id, n);

CREATE INDEX CONCURRENTLY IF NOT EXISTS limit_loans_run ON limit_loans (run_id);

-- Whether a run with these limits keeps its slot of this one until its end.
CREATE OR REPLACE FUNCTION keeps_slot(given jsonb, limited text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT coalesce(given @> jsonb_build_array(jsonb_build_object('id', limited, 'hold', 'run')), false) $$;

-- The slot of a limit that the nearest ancestor of a run keeps. A detached run has no ancestors.
CREATE OR REPLACE FUNCTION slot_of_ancestor(limited text, child text) RETURNS integer LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  at text = child;
  found_n integer;
BEGIN
  LOOP
    SELECT r.parent_id INTO at FROM runs r WHERE r.run_id = at AND r.root_id IS NOT NULL;
    EXIT WHEN at IS NULL;
    SELECT s.n INTO found_n FROM limit_slots s JOIN runs a ON a.run_id = s.run_id
     WHERE s.limit_id = limited AND s.run_id = at AND keeps_slot(a.limits, limited);
    EXIT WHEN FOUND;
  END LOOP;
  RETURN found_n;
END $$;

-- The functions of 0018, with slots that are kept and lent.

-- A child waits for no slot that it is lent. A run that has its slot, and waits, is not let in once more.

CREATE OR REPLACE FUNCTION park_if_full() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  room bigint;
BEGIN
  SELECT l.id, CASE WHEN (SELECT true FROM dispatches d
                           WHERE d.limit_id = l.id AND d.state = 'delayed' AND d.reason = 'limit'
                           ORDER BY d.priority DESC, d.limit_since LIMIT 1) THEN 0
                    ELSE l.free - (SELECT count(*) FROM (
                           SELECT FROM dispatches d
                            WHERE d.limit_id = l.id AND d.state IN ('waiting', 'sent')
                              AND NOT (l.kept AND EXISTS (
                                SELECT FROM limit_slots s
                                 WHERE s.run_id = d.run_id AND s.limit_id = l.id))
                            LIMIT l.most) d) END
    INTO NEW.limit_id, room
    FROM runs r CROSS JOIN LATERAL (
      SELECT l.id, keeps_slot(r.limits, l.id) AS kept, l.at_once AS most, l.at_once - (
               SELECT count(*) FROM (SELECT FROM limit_slots s
                                      WHERE s.limit_id = l.id LIMIT l.at_once) s) AS free
        FROM limits_of(r.limits) l
       WHERE r.root_id IS NULL OR slot_of_ancestor(l.id, r.run_id) IS NULL
      UNION ALL
      SELECT l.id, false, l.starts, floor(tokens_of(l.id, l.starts, l.period_s))::bigint
        FROM rates_of(r.limits) l) l
   WHERE r.run_id = NEW.run_id ORDER BY 2, 1 LIMIT 1;
  IF room > 0 OR NEW.limit_id IS NULL THEN
    RETURN NEW;
  END IF;
  NEW.limit_since = NEW.due_at;
  NEW.state = 'delayed';
  NEW.reason = 'limit';
  NEW.due_at = '9999-01-01Z';
  IF NOT EXISTS (SELECT FROM limit_notes w
                  WHERE w.limit_id = NEW.limit_id AND w.xmin = pg_current_xact_id()::xid) THEN
    INSERT INTO limit_notes (shard, limit_id) VALUES (NEW.shard, NEW.limit_id);
  END IF;
  RETURN NEW;
END $$;

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

-- See 0018. A child takes a loan in place of a slot that an ancestor keeps: the slot is locked until
-- the commit, and is the ancestor's then or is not lent. Who waits for another limit keeps what it
-- keeps, but for its first claim, and if it lacks one of those itself: so that nobody keeps one and waits
-- for another that is kept.
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

-- Frees the slots of a run that does not run any more, whatever has ended its lease, but those that it
-- keeps until its end. A slot that is lent then is that of a child that has a lease by it. The turn of
-- one that ends while it waits is to be another's.
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

CREATE OR REPLACE FUNCTION require_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
BEGIN
  IF (SELECT count(*) FROM limit_slots s WHERE s.run_id = NEW.run_id)
     + (SELECT count(*) FROM limit_loans o WHERE o.run_id = NEW.run_id)
     < (SELECT count(*) FROM limits_of(NEW.limits)) THEN
    RAISE lock_not_available
      USING MESSAGE = concat('run ', NEW.run_id, ' has no slot of each of its limits');
  END IF;
  RETURN NULL;
END $$;

-- See 0018. A run that has its slot, and waits for something else, is not counted twice.
CREATE OR REPLACE FUNCTION look_at_limits(own integer[], batch integer) RETURNS TABLE (looked_at integer, kept integer) LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  most bigint;
  rate record;
  waits record;
  room bigint;
  places bigint;
  entered integer;
  next_look timestamptz;
  each record;
BEGIN
  looked_at = 0;
  kept = 0;
  places = 1000;
  FOR each IN
    SELECT w.limit_id, array_agg(w.id) AS ids, sum(count(*)) OVER () >= batch AS crowded
      FROM (SELECT limit_id, id FROM limit_notes
             WHERE shard = ANY(own) AND coalesce(due_at <= clock_timestamp(), true)
             ORDER BY id LIMIT batch) w
     GROUP BY w.limit_id ORDER BY w.limit_id
  LOOP
    EXIT WHEN places = 0;
    looked_at = looked_at + cardinality(each.ids);
    IF NOT pg_try_advisory_xact_lock('limit_slots'::regclass::oid::int4,
                                     hashtext(each.limit_id)) THEN
      kept = kept + cardinality(each.ids);
      CONTINUE;
    END IF;
    SELECT d.shard, r.limits INTO waits FROM dispatches d JOIN runs r USING (run_id)
     WHERE d.limit_id = each.limit_id AND d.state = 'delayed' AND d.reason = 'limit'
     ORDER BY d.priority DESC, d.limit_since LIMIT 1;
    IF FOUND THEN
      SELECT l.at_once INTO most FROM limits_of(waits.limits) l WHERE l.id = each.limit_id;
      SELECT l.* INTO rate FROM rates_of(waits.limits) l WHERE l.id = each.limit_id;
      room = CASE WHEN most IS NULL
                  THEN floor(tokens_of(each.limit_id, rate.starts, rate.period_s))::bigint
                  ELSE most - (SELECT count(*) FROM limit_slots s WHERE s.limit_id = each.limit_id)
             END - (SELECT count(*) FROM dispatches d JOIN runs r USING (run_id)
                     WHERE d.limit_id = each.limit_id AND d.state IN ('waiting', 'sent')
                       AND coalesce(r.not_before, r.created_at)
                           > clock_timestamp() - interval '1 minute'
                       AND NOT EXISTS (SELECT FROM limit_slots s WHERE s.run_id = d.run_id
                                                                   AND s.limit_id = each.limit_id));
      IF room > 0 THEN
        entered = let_in(each.limit_id, least(room, places));
        room = room - entered;
        places = places - entered;
      ELSE
        room = 0;
      END IF;
      IF EXISTS (SELECT FROM dispatches d
                  WHERE d.limit_id = each.limit_id AND d.state = 'delayed'
                    AND d.reason = 'limit') THEN
        CONTINUE WHEN room > 0 AND places = 0;
        IF room > 0 AND each.crowded THEN
          DELETE FROM limit_notes w WHERE w.shard = ANY(own) AND w.id = ANY(each.ids);
          INSERT INTO limit_notes (shard, limit_id) VALUES (own[1], each.limit_id);
          kept = kept + 1;
          CONTINUE;
        ELSIF room > 0 THEN
          kept = kept + cardinality(each.ids);
          CONTINUE;
        END IF;
        IF most IS NULL THEN
          SELECT clock_timestamp() + make_interval(secs => greatest(
                   0.05, rate.period_s / rate.starts * (1 - t + floor(t) * (t >= 1)::int)))
            INTO next_look FROM tokens_of(each.limit_id, rate.starts, rate.period_s) t;
          INSERT INTO limit_notes (shard, limit_id, due_at)
          SELECT waits.shard, each.limit_id, next_look
           WHERE NOT EXISTS (SELECT FROM limit_notes w
                              WHERE w.limit_id = each.limit_id AND w.due_at > clock_timestamp()
                                AND w.due_at <= next_look);
          PERFORM ring_relay(waits.shard);
        END IF;
      END IF;
    END IF;
    DELETE FROM limit_notes w WHERE w.shard = ANY(own) AND w.id = ANY(each.ids);
  END LOOP;
  RETURN NEXT;
END $$;

-- Our tables before temporary ones of the session, as in 0020: also for the functions that a start calls.
DO $$
DECLARE
  each regprocedure;
BEGIN
  FOR each IN
    SELECT p.oid::regprocedure FROM pg_proc p
     WHERE p.pronamespace = current_schema()::regnamespace
       AND p.proname IN ('park_if_full', 'slot_of_ancestor')
  LOOP
    EXECUTE concat('ALTER FUNCTION ', each, ' SET search_path TO ', quote_ident(current_schema()), ', pg_temp');
  END LOOP;
END $$;
