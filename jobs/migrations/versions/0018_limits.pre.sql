-- The limits of a run: a list of objects with `id` (name and key) and `at_once`, in the order of ids.
ALTER TABLE runs ADD COLUMN IF NOT EXISTS limits jsonb;

-- The limit that a run waits for, or of which it was let in; while it waits, since when.
ALTER TABLE dispatches
  ADD COLUMN IF NOT EXISTS limit_id text COLLATE "C",
  ADD COLUMN IF NOT EXISTS limit_since timestamptz;

CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_limited ON dispatches (limit_id, priority DESC, limit_since) WHERE state = 'delayed' AND reason = 'limit';
CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_let_in ON dispatches (limit_id) WHERE limit_id IS NOT NULL AND state IN ('waiting', 'sent');

-- A slot is one of the runs that a limit lets have a lease at once. Its primary key decides which of
-- two claims has it.
CREATE TABLE IF NOT EXISTS limit_slots (
  limit_id text COLLATE "C" NOT NULL,
  n integer NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  taken_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (limit_id, n)
);

CREATE INDEX CONCURRENTLY IF NOT EXISTS limit_slots_run ON limit_slots (run_id);

-- What a person has set, in place of what the plan says.
CREATE TABLE IF NOT EXISTS limit_settings (
  name text COLLATE "C" PRIMARY KEY,
  at_once integer NOT NULL,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Limits that a relay is to look at: a run has come to wait, or a turn was not used.
CREATE TABLE IF NOT EXISTS limit_notes (
  shard smallint NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY,
  limit_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (shard, id)
);

-- The limits of a run, each with how many it lets run at once now.
CREATE OR REPLACE FUNCTION limits_of(given jsonb) RETURNS TABLE (id text, at_once integer) LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
  SELECT l ->> 'id', coalesce(s.at_once, (l ->> 'at_once')::int) FROM jsonb_array_elements(given) l
    LEFT JOIN limit_settings s ON s.name = split_part(l ->> 'id', ':', 1) $$;

-- Rings the relay of a shard, as the statements of the code do.
CREATE OR REPLACE FUNCTION ring_relay(bell integer) RETURNS void LANGUAGE sql SET search_path FROM CURRENT AS $$
  SELECT CASE WHEN NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, bell)
              THEN pg_notify('beatless_' || current_schema(), bell::text) END $$;

-- Has a new run wait from the start if one of its limits has no room: with the runs before it of the
-- same statement, which a trigger sees. Its dispatch is counted to the limit with the least room. Read
-- without a lock: who does not wait needs a slot all the same, when it is claimed. Who waits is looked
-- at once more after the commit, for which one note of each transaction is enough: its caller has rung
-- the relay.
CREATE OR REPLACE FUNCTION park_if_full() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  room bigint;
BEGIN
  SELECT l.id, CASE WHEN EXISTS (SELECT FROM dispatches d
                                  WHERE d.limit_id = l.id AND d.state = 'delayed'
                                    AND d.reason = 'limit') THEN 0
                    ELSE l.at_once
                         - (SELECT count(*) FROM (SELECT FROM limit_slots s
                                                   WHERE s.limit_id = l.id LIMIT l.at_once) s)
                         - (SELECT count(*) FROM (SELECT FROM dispatches d
                                                   WHERE d.limit_id = l.id
                                                     AND d.state IN ('waiting', 'sent')
                                                   LIMIT l.at_once) d) END
    INTO NEW.limit_id, room FROM runs r CROSS JOIN LATERAL limits_of(r.limits) l
   WHERE r.run_id = NEW.run_id ORDER BY 2, 1 LIMIT 1;
  IF room > 0 THEN
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

CREATE OR REPLACE TRIGGER dispatches_limited BEFORE INSERT ON dispatches FOR EACH ROW
  WHEN (NEW.limit_id IS NOT NULL AND NEW.state = 'waiting')
  EXECUTE FUNCTION park_if_full();

-- Takes a slot of each limit of a run that is being claimed, or has the run wait and takes none.
-- The run's row is locked first, and what is read after that is read anew: each query of this
-- function sees what was committed before it. In the order of ids, so that no two claims wait for
-- each other. Of many numbers some are tried at random: to read all of them would cost more.
CREATE OR REPLACE FUNCTION take_slots(claimed text) RETURNS boolean LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  wanted jsonb;
  since timestamptz;
  place integer;
  missing text;
  bell integer;
  each record;
BEGIN
  SELECT r.limits, r.created_at INTO wanted, since FROM runs r
   WHERE r.run_id = claimed AND r.state = 'queued' FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  FOR each IN
    SELECT l.id, l.at_once,
           EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = l.id AND s.n > l.at_once) AS lowered
      FROM limits_of(wanted) l
     WHERE NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = l.id AND s.run_id = claimed)
     ORDER BY l.id
  LOOP
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
      missing = each.id;
      EXIT;
    END IF;
  END LOOP;
  IF missing IS NULL THEN
    RETURN true;
  END IF;
  DELETE FROM limit_slots s WHERE s.run_id = claimed;
  UPDATE dispatches d
     SET state = 'delayed', reason = 'limit', due_at = '9999-01-01Z', limit_id = missing,
         limit_since = since
   WHERE d.run_id = claimed RETURNING d.shard INTO bell;
  INSERT INTO limit_notes (shard, limit_id) SELECT bell, l.id FROM limits_of(wanted) l;
  PERFORM ring_relay(bell);
  RETURN false;
END $$;

-- Makes runs due that wait for a limit, by priority and then by time; how many.
-- Those that another transaction holds are left out. They go before runs that have not waited.
CREATE OR REPLACE FUNCTION let_in(limited text, most bigint) RETURNS integer LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  done integer = 0;
  each record;
BEGIN
  FOR each IN
    SELECT d.run_id, d.shard FROM dispatches d JOIN runs r USING (run_id)
     WHERE d.limit_id = limited AND d.state = 'delayed' AND d.reason = 'limit' AND r.state = 'queued'
     ORDER BY d.priority DESC, d.limit_since LIMIT greatest(most, 0)
       FOR NO KEY UPDATE OF r, d SKIP LOCKED
  LOOP
    UPDATE runs SET not_before = clock_timestamp() WHERE run_id = each.run_id;
    UPDATE dispatches
       SET state = 'waiting', reason = 'slot', due_at = limit_since, limit_since = NULL
     WHERE run_id = each.run_id;
    PERFORM ring_relay(each.shard);
    done = done + 1;
  END LOOP;
  RETURN done;
END $$;

-- Gives the turn of a slot that was freed to the run that has waited for it the longest.
-- Who looks at all slots of a limit holds the lock alone; it is not waited for: a note has that done
-- once more. Also if a person has lowered the limit, for then the slots are to be counted.
CREATE OR REPLACE FUNCTION pass_slot(limited text, freed integer, bell integer) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  most integer;
BEGIN
  IF pg_try_advisory_xact_lock_shared('limit_slots'::regclass::oid::int4, hashtext(limited)) THEN
    SELECT (SELECT l.at_once FROM limits_of(r.limits) l WHERE l.id = limited) INTO most
      FROM dispatches d JOIN runs r USING (run_id)
     WHERE d.limit_id = limited AND d.state = 'delayed' AND d.reason = 'limit'
     ORDER BY d.priority DESC, d.limit_since LIMIT 1;
    IF NOT FOUND THEN
      RETURN;
    END IF;
    IF freed <= most
       AND NOT EXISTS (SELECT FROM limit_slots s WHERE s.limit_id = limited AND s.n > most)
       AND let_in(limited, 1) = 1 THEN
      RETURN;
    END IF;
  END IF;
  INSERT INTO limit_notes (shard, limit_id) VALUES (bell, limited);
  PERFORM ring_relay(bell);
END $$;

-- Frees the slots of a run that does not run any more, whatever has ended its lease. The turn of one
-- that ends while it waits is to be another's.
CREATE OR REPLACE FUNCTION free_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  bell integer = abs(mod(hashtext(OLD.run_id), 16));
  each record;
BEGIN
  FOR each IN
    DELETE FROM limit_slots s WHERE s.run_id = OLD.run_id RETURNING s.limit_id, s.n
  LOOP
    PERFORM pass_slot(each.limit_id, each.n, bell);
  END LOOP;
  IF OLD.state = 'queued' THEN
    INSERT INTO limit_notes (shard, limit_id) SELECT bell, l.id FROM limits_of(OLD.limits) l;
    PERFORM ring_relay(bell);
  END IF;
  RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER runs_leave AFTER UPDATE OF state ON runs FOR EACH ROW
  WHEN (OLD.limits IS NOT NULL AND OLD.state <> NEW.state
        AND (OLD.state = 'running' OR NEW.finished_at IS NOT NULL))
  EXECUTE FUNCTION free_slots();

CREATE OR REPLACE TRIGGER runs_taken_away AFTER DELETE ON runs FOR EACH ROW
  WHEN (OLD.limits IS NOT NULL AND OLD.finished_at IS NULL)
  EXECUTE FUNCTION free_slots();

-- No lease without its slots, whoever claims: a version that knows no limits takes this for a row
-- that another transaction holds, and leaves the run alone.
CREATE OR REPLACE FUNCTION require_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
  IF (SELECT count(*) FROM limit_slots s WHERE s.run_id = NEW.run_id)
     < jsonb_array_length(NEW.limits) THEN
    RAISE lock_not_available
      USING MESSAGE = concat('run ', NEW.run_id, ' has no slot of each of its limits');
  END IF;
  RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER runs_limited AFTER UPDATE OF state ON runs FOR EACH ROW
  WHEN (NEW.limits IS NOT NULL AND OLD.state = 'queued' AND NEW.state = 'running')
  EXECUTE FUNCTION require_slots();

-- Looks at the limits that were noted for some shards, and lets in as many runs as have room; how
-- many notes there were, and how many are left for a later look. A run that was let in a minute ago
-- and has no slot is not counted: its queue may be paused, or have no worker.
CREATE OR REPLACE FUNCTION look_at_limits(own integer[], batch integer) RETURNS TABLE (looked_at integer, kept integer) LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  most bigint;
  room bigint;
  each record;
BEGIN
  looked_at = 0;
  kept = 0;
  FOR each IN
    SELECT w.limit_id, array_agg(w.id) AS ids
      FROM (SELECT limit_id, id FROM limit_notes WHERE shard = ANY(own) ORDER BY id LIMIT batch) w
     GROUP BY w.limit_id ORDER BY w.limit_id
  LOOP
    looked_at = looked_at + cardinality(each.ids);
    IF NOT pg_try_advisory_xact_lock('limit_slots'::regclass::oid::int4,
                                     hashtext(each.limit_id)) THEN
      kept = kept + cardinality(each.ids);
      CONTINUE;
    END IF;
    SELECT (SELECT l.at_once FROM limits_of(r.limits) l WHERE l.id = each.limit_id) INTO most
      FROM dispatches d JOIN runs r USING (run_id)
     WHERE d.limit_id = each.limit_id AND d.state = 'delayed' AND d.reason = 'limit'
     ORDER BY d.priority DESC, d.limit_since LIMIT 1;
    IF FOUND THEN
      room = most - (SELECT count(*) FROM limit_slots s WHERE s.limit_id = each.limit_id)
             - (SELECT count(*) FROM dispatches d JOIN runs r USING (run_id)
                 WHERE d.limit_id = each.limit_id AND d.state IN ('waiting', 'sent')
                   AND coalesce(r.not_before, r.created_at)
                       > clock_timestamp() - interval '1 minute');
      IF room > 0 AND let_in(each.limit_id, room) < room
         AND EXISTS (SELECT FROM dispatches d
                      WHERE d.limit_id = each.limit_id AND d.state = 'delayed'
                        AND d.reason = 'limit') THEN
        kept = kept + cardinality(each.ids);
        CONTINUE;
      END IF;
    END IF;
    DELETE FROM limit_notes w WHERE w.shard = ANY(own) AND w.id = ANY(each.ids);
  END LOOP;
  RETURN NEXT;
END $$;
