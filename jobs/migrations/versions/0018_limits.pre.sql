-- The limits of a run: a list of objects with `id` (name and key) and `at_once`, or `starts` in
-- `period_s` seconds, in the order of ids.
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

CREATE TABLE IF NOT EXISTS rate_settings (
  name text COLLATE "C" PRIMARY KEY,
  starts integer NOT NULL,
  period_s double precision NOT NULL,
  changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Limits that a relay is to look at: a run has come to wait, or a turn was not used. A note with a
-- time is for a look then, when the limit has a token.
CREATE TABLE IF NOT EXISTS limit_notes (
  shard smallint NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY,
  limit_id text COLLATE "C" NOT NULL,
  due_at timestamptz,
  PRIMARY KEY (shard, id)
);

CREATE INDEX CONCURRENTLY IF NOT EXISTS limit_notes_limit ON limit_notes (limit_id);

-- The bucket of a limit: when it is full again. A token fills `period_s / starts` seconds of it.
CREATE TABLE IF NOT EXISTS limit_rates (
  limit_id text COLLATE "C" PRIMARY KEY,
  full_at timestamptz NOT NULL
);

-- The limits of a run that are no rates, each with how many it lets run at once now. What no version
-- has written is no limit: a row that somebody has changed must not stop a relay.
CREATE OR REPLACE FUNCTION limits_of(given jsonb) RETURNS TABLE (id text, at_once integer) LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
  SELECT l ->> 'id', coalesce(s.at_once, (l ->> 'at_once')::int)
    FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) l
    LEFT JOIN limit_settings s ON s.name = split_part(l ->> 'id', ':', 1)
   WHERE l ->> 'at_once' ~ '^[1-9][0-9]{0,4}$' $$;

-- The limits of a run that are rates, each with what it lets begin now.
CREATE OR REPLACE FUNCTION rates_of(given jsonb) RETURNS TABLE (id text, starts integer, period_s double precision) LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
  SELECT l ->> 'id', coalesce(s.starts, (l ->> 'starts')::int),
         coalesce(s.period_s, (l ->> 'period_s')::float8)
    FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) l
    LEFT JOIN rate_settings s ON s.name = split_part(l ->> 'id', ':', 1)
   WHERE l ->> 'starts' ~ '^[1-9][0-9]{0,6}$' AND l ->> 'period_s' ~ '^[1-9][0-9]{0,5}(\.[0-9]+)?$' $$;

-- All limits of a run, each with what it lets run or begin now.
CREATE OR REPLACE FUNCTION all_limits_of(given jsonb) RETURNS TABLE (id text, at_once integer, starts integer, period_s double precision) LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
  SELECT l.id, l.at_once, NULL::integer, NULL::float8 FROM limits_of(given) l
  UNION ALL SELECT l.id, NULL, l.starts, l.period_s FROM rates_of(given) l $$;

-- The tokens in the bucket of a limit now; it holds `starts` of them.
CREATE OR REPLACE FUNCTION tokens_of(limited text, starts integer, period_s double precision) RETURNS double precision LANGUAGE sql SET search_path FROM CURRENT AS $$
  SELECT starts - starts / period_s * coalesce(greatest(0, extract(epoch FROM (
           SELECT full_at FROM limit_rates r WHERE r.limit_id = limited) - clock_timestamp())), 0)::float8 $$;

-- Rings the relay of a shard, as the statements of the code do.
CREATE OR REPLACE FUNCTION ring_relay(bell integer) RETURNS void LANGUAGE sql SET search_path FROM CURRENT AS $$
  SELECT CASE WHEN NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, bell)
              THEN pg_notify('beatless_' || current_schema(), bell::text) END $$;

-- The functions from here on keep off scans of whole tables: a session keeps a plan, and the statistics
-- of a queue swing between empty, where a scan is the cheapest, and full.

-- Has a new run wait from the start if one of its limits has no room: with the runs before it of the
-- same statement, which a trigger sees. Its dispatch is counted to the limit with the least room. Read
-- without a lock: who does not wait needs a slot all the same, when it is claimed. Who waits is looked
-- at once more after the commit, for which one note of each transaction is enough: its caller has rung
-- the relay. Not EXISTS, which may be hashed: it would read the runs that wait for any limit; and
-- in the order of the index: if all wait for one limit, the first run of the table seemed enough.
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
                            LIMIT l.most) d) END
    INTO NEW.limit_id, room
    FROM runs r CROSS JOIN LATERAL (
      SELECT l.id, l.at_once AS most, l.at_once - (
               SELECT count(*) FROM (SELECT FROM limit_slots s
                                      WHERE s.limit_id = l.id LIMIT l.at_once) s) AS free
        FROM limits_of(r.limits) l
      UNION ALL
      SELECT l.id, l.starts, floor(tokens_of(l.id, l.starts, l.period_s))::bigint
        FROM rates_of(r.limits) l) l
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

-- or has the run wait and takes none.
-- The run's row is locked first, and what is read after that is read anew: each query of this
-- function sees what was committed before it. The claim may have seen an older row: a run that is
-- not due any more takes nothing, for the claim will not have it. In the order of ids, so that no two
-- claims wait for each other. Of many numbers some are tried at random: to read all of them would
-- cost more.
CREATE OR REPLACE FUNCTION take_slots(claimed text) RETURNS boolean LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  wanted jsonb;
  since timestamptz;
  place integer;
  missing text;
  bell integer;
  begins boolean;
  each record;
BEGIN
  SELECT r.limits, r.created_at, r.attempt = 0 INTO wanted, since, begins FROM runs r
   WHERE r.run_id = claimed AND r.state = 'queued'
     AND coalesce(r.not_before <= clock_timestamp(), true) FOR NO KEY UPDATE;
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
  IF missing IS NULL AND begins THEN
    FOR each IN SELECT * FROM rates_of(wanted) l ORDER BY l.id LOOP
      LOOP
        PERFORM FROM limit_rates r WHERE r.limit_id = each.id FOR NO KEY UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO limit_rates (limit_id, full_at) VALUES (each.id, clock_timestamp())
        ON CONFLICT DO NOTHING;
      END LOOP;
      IF tokens_of(each.id, each.starts, each.period_s) < 1 THEN
        missing = each.id;
        EXIT;
      END IF;
    END LOOP;
  END IF;
  IF missing IS NULL THEN
    IF begins THEN
      UPDATE limit_rates r
         SET full_at = greatest(r.full_at, clock_timestamp())
                       + make_interval(secs => l.period_s / l.starts)
        FROM rates_of(wanted) l WHERE r.limit_id = l.id;
    END IF;
    RETURN true;
  END IF;
  DELETE FROM limit_slots s WHERE s.run_id = claimed;
  UPDATE dispatches d
     SET state = 'delayed', reason = 'limit', due_at = '9999-01-01Z', limit_id = missing,
         limit_since = since
   WHERE d.run_id = claimed RETURNING d.shard INTO bell;
  INSERT INTO limit_notes (shard, limit_id)
  SELECT bell, l.id FROM all_limits_of(wanted) l WHERE bell IS NOT NULL;
  PERFORM ring_relay(bell);
  RETURN false;
END $$;

-- Makes runs due that wait for a limit, by priority and then by time; how many.
-- Those that another transaction holds are left out. They go before runs that have not waited.
CREATE OR REPLACE FUNCTION let_in(limited text, most bigint) RETURNS integer LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
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
CREATE OR REPLACE FUNCTION pass_slot(limited text, freed integer, bell integer) RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
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
CREATE OR REPLACE FUNCTION free_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
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
    INSERT INTO limit_notes (shard, limit_id) SELECT bell, l.id FROM all_limits_of(OLD.limits) l;
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
CREATE OR REPLACE FUNCTION require_slots() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
BEGIN
  IF (SELECT count(*) FROM limit_slots s WHERE s.run_id = NEW.run_id)
     < (SELECT count(*) FROM limits_of(NEW.limits)) THEN
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
-- and has no slot is not counted: its queue may be paused, or have no worker. While runs wait for a
-- rate, there is a note for the time of the next token: of many a second, for those of a twentieth.
-- One look lets in a thousand runs: it has seconds, and a bucket may hold a million tokens. Runs that
-- others hold keep their note; of a batch that is full of notes one for all, behind those of others.
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
                           > clock_timestamp() - interval '1 minute');
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

-- For the same reason.
ALTER FUNCTION note_children() SET enable_seqscan TO off;
