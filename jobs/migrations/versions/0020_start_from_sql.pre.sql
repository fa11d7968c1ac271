-- The plans of the apps, as the last deploy of each declared them: what a start from SQL must know.
-- `limits` are those of its runs without the namespace, `refused` says why SQL cannot start it.
CREATE TABLE IF NOT EXISTS declared_plans (
  name text COLLATE "C" NOT NULL,
  app text COLLATE "C" NOT NULL,
  declared boolean NOT NULL DEFAULT true,
  version text NOT NULL,
  queue text COLLATE "C" NOT NULL,
  default_input jsonb,
  limits jsonb,
  refused text,
  max_event_bytes integer NOT NULL,
  declared_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (name, app)
);

-- The shard of a run, as `shard_of` has it in Python: its CRC-32 modulo 16, by half bytes.
CREATE OR REPLACE FUNCTION shard_of(run_id text) RETURNS integer LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
DECLARE
  halves CONSTANT bigint[] = '{0,498536548,997073096,651767980,1994146192,1802195444,1303535960,1342533948,3988292384,4027552580,3604390888,3412177804,2607071920,2262029012,2685067896,3183342108}';
  bytes CONSTANT bytea = convert_to(run_id, 'UTF8');
  crc bigint = 4294967295;
BEGIN
  FOR n IN 0 .. octet_length(bytes) - 1 LOOP
    crc = crc # get_byte(bytes, n);
    crc = (crc >> 4) # halves[(crc & 15) + 1];
    crc = (crc >> 4) # halves[(crc & 15) + 1];
  END LOOP;
  RETURN (crc & 15) # 15;
END $$;

-- The problem with JSON that a run is to hold, which the Python client refuses too; NULL: none.
-- A number of more than 4,300 digits is one that Python does not read.
CREATE OR REPLACE FUNCTION json_problem(given jsonb, most integer) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE
    WHEN octet_length(given::text) > most
      THEN concat('is ', octet_length(given::text), ' bytes as JSON, the limit is ', most,
                  ' (BEATLESS_MAX_EVENT_BYTES): store it elsewhere and keep a reference')
    WHEN length(given::text) - length(translate(given::text, '[{', '')) > 100
         AND jsonb_path_exists(given, 'strict $.**{100} ? (@.type() == "array" || @.type() == "object")')
      THEN 'is nested deeper than 100 levels: store it elsewhere and keep a reference'
    WHEN length(given::text) >= 4300
         AND jsonb_path_exists(given, 'strict $.** ? (@.type() == "number" && (@ >= 1e4299 || @ <= -1e4299))')
      THEN 'holds a number of more than 4300 digits: give it as a string' END $$;

-- Stores a run as the Python client does, in the transaction of the caller; its id, or that of the
-- run that was started with this key or id, or of the unfinished one with this dedupe key.
-- It reads what its statements see, with the rights of its caller. Options that change an unfinished
-- run (`replace`, `debounce`) need what only Python knows.
CREATE OR REPLACE FUNCTION start_run(
  plan text, input jsonb DEFAULT NULL, key text DEFAULT NULL, queue text DEFAULT NULL, priority integer DEFAULT 0, tags jsonb DEFAULT NULL,
  delay interval DEFAULT NULL, not_before timestamptz DEFAULT NULL, deadline interval DEFAULT NULL,
  dedupe_key text DEFAULT NULL, while_unfinished text DEFAULT NULL, run_id text DEFAULT NULL,
  traceparent text DEFAULT NULL, namespace text DEFAULT 'default'
) RETURNS text LANGUAGE plpgsql SET enable_seqscan TO off AS $$
#variable_conflict use_column
DECLARE
  declared record;
  given jsonb = nullif(start_run.input, 'null');
  own_tags jsonb = nullif(start_run.tags, 'null');
  prefix text = CASE WHEN start_run.namespace = 'default' THEN '' ELSE start_run.namespace || '~' END;
  id text;
  own_limits jsonb;
  dispatch_key text = start_run.namespace || '/' || start_run.dedupe_key;
  problem text;
  existing record;
  tried boolean = start_run.dedupe_key IS NOT NULL;
  locked boolean = false;
  bell integer;
BEGIN
  SELECT p.* INTO declared FROM declared_plans p
   WHERE p.name = start_run.plan ORDER BY p.declared DESC, p.declared_at DESC, p.app LIMIT 1;
  IF NOT FOUND THEN
    RAISE undefined_object USING
      MESSAGE = concat('no plan ', quote_nullable(start_run.plan), ' is registered'),
      HINT = 'Plans of the App are registered by `beatless migrate`. Registered: ' || coalesce(
        (SELECT string_agg(DISTINCT p.name, ', ') FROM declared_plans p WHERE p.declared), 'none') || '.';
  ELSIF NOT declared.declared THEN
    RAISE undefined_object USING
      MESSAGE = concat('plan ', start_run.plan, ' is declared no more by the app ', declared.app),
      HINT = 'Declare it in the App again and run `beatless migrate`, or start another plan.';
  ELSIF declared.refused IS NOT NULL THEN
    RAISE feature_not_supported USING
      MESSAGE = concat('plan ', start_run.plan, ' cannot be started from SQL: ', declared.refused),
      HINT = 'Start it by the Python client or POST /v1/runs; or start from SQL a plan that starts it as its child.';
  END IF;

  id = coalesce(start_run.run_id, overlay(encode(overlay(
    uuid_send(gen_random_uuid()) PLACING substring(int8send(
      floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) FROM 3) FROM 1), 'hex')
    PLACING '7' FROM 13 FOR 1)::uuid::text);
  id = CASE WHEN starts_with(id, prefix) THEN id ELSE prefix || id END;
  problem = CASE
    WHEN start_run.namespace IS NULL OR start_run.namespace !~ '^[a-z0-9_][a-z0-9_-]{0,30}$'
      THEN 'namespace must match ^[a-z0-9_][a-z0-9_-]{0,30}$'
    WHEN substr(id, length(prefix) + 1) !~ '^[A-Za-z0-9._:-]{1,128}$' OR substr(id, length(prefix) + 1) IN ('.', '..')
      THEN 'run_id must match ^[A-Za-z0-9._:-]{1,128}$'
    WHEN start_run.key = '' OR length(start_run.key) > 256
      THEN 'key must have 1 to 256 characters'
    WHEN start_run.dedupe_key = '' OR length(start_run.dedupe_key) > 256
      THEN 'dedupe_key must have 1 to 256 characters'
    WHEN start_run.queue IS NOT NULL AND NOT EXISTS (
           SELECT FROM declared_plans p WHERE p.queue = start_run.queue AND p.declared)
      THEN concat('queue is ', quote_literal(start_run.queue), ', which no registered plan has: take one of ',
                  (SELECT string_agg(DISTINCT p.queue, ', ') FROM declared_plans p WHERE p.declared))
    WHEN start_run.priority IS NULL OR start_run.priority NOT BETWEEN 0 AND 9
      THEN 'priority must be 0 to 9'
    WHEN jsonb_typeof(own_tags) <> 'object'
         OR jsonb_path_exists(own_tags, 'strict $.* ? (@.type() != "string")')
      THEN 'tags must be an object whose members are strings, as {"shop": "berlin"}'
    WHEN (SELECT sum(octet_length(t.key || t.value)) FROM jsonb_each_text(own_tags) t) > 16384
      THEN 'tags are longer than 16384 bytes: put large values into the input'
    WHEN extract(epoch FROM start_run.delay) NOT BETWEEN 0 AND 315360000
      THEN 'delay must be 0 seconds to ten years'
    WHEN extract(epoch FROM start_run.deadline) NOT BETWEEN 0 AND 315360000
      THEN 'deadline must be 0 seconds to ten years'
    WHEN start_run.not_before NOT BETWEEN '1000-01-02Z' AND '9998-12-30Z'
      THEN 'not_before must be in the years 1000 to 9998'
    WHEN start_run.delay IS NOT NULL AND start_run.not_before IS NOT NULL
      THEN 'delay and not_before cannot both be given'
    WHEN extract(epoch FROM start_run.deadline) <= coalesce(extract(epoch FROM start_run.delay), 0)
      THEN 'deadline is before the run may start'
    WHEN start_run.while_unfinished NOT IN ('join', 'skip')
      THEN 'while_unfinished must be join or skip; to replace a run, start it by the Python client or POST /v1/runs'
    WHEN start_run.while_unfinished IS NOT NULL AND start_run.dedupe_key IS NULL
      THEN 'while_unfinished needs a dedupe_key, of which it is the duplicates'
    ELSE 'input ' || json_problem(given, declared.max_event_bytes) END;
  IF problem IS NOT NULL THEN
    RAISE invalid_parameter_value USING MESSAGE = concat('start_run: ', problem);
  END IF;

  SELECT jsonb_agg(jsonb_set(l.value, '{id}', to_jsonb(prefix || (l.value ->> 'id'))) ORDER BY l.ordinality)
    INTO own_limits FROM jsonb_array_elements(declared.limits) WITH ORDINALITY AS l;
  bell = shard_of(id);
  LOOP
    IF tried THEN
      SELECT r.run_id, CASE
               WHEN r.namespace <> start_run.namespace THEN 'namespace'
               WHEN r.plan <> start_run.plan THEN 'plan'
               WHEN r.queue <> coalesce(start_run.queue, declared.queue)
                    AND (start_run.queue IS NOT NULL OR r.default_queue = false) THEN 'queue'
               WHEN coalesce(r.input, 'null') <> coalesce(given, declared.default_input, 'null')
                    AND (given IS NOT NULL OR r.default_input = false) THEN 'input'
               WHEN r.key IS DISTINCT FROM start_run.key THEN 'key' END AS differs,
             CASE WHEN r.key = start_run.key THEN 'key' ELSE 'run id' END AS used
        INTO existing FROM runs r
       WHERE r.run_id = id OR r.namespace = start_run.namespace AND r.key = start_run.key
       ORDER BY coalesce(r.key = start_run.key, false) DESC LIMIT 1;
      IF FOUND AND existing.differs IS NOT NULL THEN
        RAISE unique_violation USING
          MESSAGE = concat(existing.used, ' is used by run ', existing.run_id, ' with another ', existing.differs),
          HINT = 'A key names one run for ever: give this run another key, or start it with the same content.';
      ELSIF FOUND THEN
        RETURN existing.run_id;
      END IF;
    END IF;
    IF start_run.dedupe_key IS NOT NULL THEN
      SELECT d.run_id INTO existing FROM dispatches d
       WHERE d.task = start_run.plan AND d.dedupe_key = dispatch_key
       ORDER BY d.dedupe_next DESC LIMIT 1;
      IF FOUND THEN
        RETURN existing.run_id;
      ELSIF NOT locked THEN
        -- Until the end of the transaction; who looks again sees what was committed meanwhile.
        PERFORM pg_advisory_xact_lock(hashtextextended(concat_ws('/',
          current_schema(), start_run.namespace, start_run.plan, start_run.dedupe_key), 0));
        locked = true;
        CONTINUE;
      END IF;
    END IF;
    WITH u AS (
      INSERT INTO runs (run_id, namespace, plan, plan_version, queue, state, input, key, last_seq,
                        not_before, deadline_at, trace_context, default_queue, default_input,
                        limits, priority, tags, dedupe_key)
      VALUES (id, start_run.namespace, start_run.plan, declared.version,
              coalesce(start_run.queue, declared.queue), 'queued',
              coalesce(given, declared.default_input), start_run.key, 1,
              coalesce(start_run.not_before, clock_timestamp() + make_interval(secs => extract(epoch FROM start_run.delay)::float8)),
              clock_timestamp() + make_interval(secs => extract(epoch FROM start_run.deadline)::float8),
              CASE WHEN start_run.traceparent ~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$'
                   THEN jsonb_build_object('traceparent', start_run.traceparent) END,
              start_run.queue IS NULL, given IS NULL, own_limits, start_run.priority,
              coalesce(own_tags, '{}'), start_run.dedupe_key)
      ON CONFLICT DO NOTHING
      RETURNING run_id, plan, plan_version, queue, priority, not_before, deadline_at, created_at,
                trace_context, limits
    ), e AS (
      INSERT INTO run_events (run_id, seq, ts, type, source, data)
      SELECT u.run_id, 1, u.created_at, 'RunStarted', 'api',
             jsonb_strip_nulls(jsonb_build_object('plan', u.plan, 'version', u.plan_version,
               'queue', u.queue, 'not_before', (extract(epoch FROM u.not_before) * 1000)::bigint,
               'traceparent', u.trace_context ->> 'traceparent'))
        FROM u
    ), o AS (
      INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) SELECT bell, u.run_id, 1, 1 FROM u
    ), d AS (
      INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason,
                              deadline_at, dedupe_key, limit_id)
      SELECT u.run_id, bell, u.plan, u.queue, u.priority,
             CASE WHEN u.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
             coalesce(u.not_before, u.created_at),
             CASE WHEN u.not_before IS NULL THEN 'start' ELSE 'delay' END, u.deadline_at,
             dispatch_key, u.limits -> 0 ->> 'id'
        FROM u
    )
    SELECT u.run_id INTO existing FROM u;
    IF FOUND THEN
      PERFORM pg_notify('beatless_' || current_schema(), bell::text)
        WHERE NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, bell);
      RETURN id;
    END IF;
    tried = true;
  END LOOP;
END $$;

-- Sends a signal to a run as the Python client does, in the transaction of the caller; its key, or a
-- random one. The run's row is neither locked nor changed.
CREATE OR REPLACE FUNCTION signal_run(run_id text, name text, data jsonb DEFAULT NULL, key text DEFAULT NULL) RETURNS text LANGUAGE plpgsql SET enable_seqscan TO off AS $$
#variable_conflict use_column
DECLARE
  own_key text = coalesce(signal_run.key, gen_random_uuid()::text);
  given jsonb = coalesce(signal_run.data, 'null');
  found_run record;
  known record;
  problem text;
  bell integer = shard_of(signal_run.run_id);
BEGIN
  SELECT r.state, r.plan INTO found_run FROM runs r WHERE r.run_id = signal_run.run_id;
  IF NOT FOUND THEN
    RAISE no_data_found USING
      MESSAGE = concat('there is no run ', quote_nullable(signal_run.run_id)),
      HINT = 'Give the id that start_run returned; in another namespace than default with its prefix, as acme~order-1.';
  END IF;
  problem = CASE
    WHEN signal_run.name IS NULL OR signal_run.name !~ '^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$'
      THEN 'name must match ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$'
    WHEN own_key = '' OR length(own_key) > 256 THEN 'key must have 1 to 256 characters'
    ELSE 'data ' || json_problem(given, coalesce((
           SELECT p.max_event_bytes FROM declared_plans p WHERE p.name = found_run.plan
            ORDER BY p.declared DESC, p.declared_at DESC, p.app LIMIT 1), 262144)) END;
  IF problem IS NOT NULL THEN
    RAISE invalid_parameter_value USING MESSAGE = concat('signal_run: ', problem);
  END IF;
  SELECT s.* INTO known FROM (
    SELECT e.data ->> 'name' AS name, e.data -> 'data' AS data FROM run_events e
     WHERE e.run_id = signal_run.run_id AND e.type = 'SignalReceived' AND e.data ->> 'key' = own_key
    UNION ALL
    SELECT s.name, s.data FROM signals s WHERE s.run_id = signal_run.run_id AND s.key = own_key) s
   LIMIT 1;
  IF FOUND THEN
    IF known.name <> signal_run.name OR coalesce(known.data, 'null') <> given THEN
      RAISE unique_violation USING
        MESSAGE = concat('key ', quote_literal(own_key), ' of run ', signal_run.run_id, ' is used by another signal'),
        HINT = 'A key names one signal of a run: give this one another key.';
    END IF;
    RETURN own_key;
  END IF;
  IF found_run.state NOT IN ('queued', 'running') THEN
    RAISE object_not_in_prerequisite_state USING
      MESSAGE = concat('run ', signal_run.run_id, ' has ended: it is ', found_run.state),
      HINT = 'Signals go to unfinished runs: start another run, or retry this one.';
  END IF;
  INSERT INTO signals (run_id, name, key, data)
  VALUES (signal_run.run_id, signal_run.name, own_key, nullif(given, 'null'));
  INSERT INTO wakes (shard, run_id) VALUES (bell, signal_run.run_id);
  PERFORM pg_notify('beatless_' || current_schema(), bell::text)
    WHERE NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, bell);
  RETURN own_key;
END $$;

-- Our tables before temporary ones of the caller's session, which Postgres would look for first.
-- Also for the functions that a start calls.
DO $$
DECLARE
  each regprocedure;
BEGIN
  FOR each IN
    SELECT p.oid::regprocedure FROM pg_proc p
     WHERE p.pronamespace = current_schema()::regnamespace
       AND p.proname IN ('start_run', 'signal_run', 'park_if_full', 'limits_of', 'rates_of', 'tokens_of')
  LOOP
    EXECUTE concat('ALTER FUNCTION ', each, ' SET search_path TO ', quote_ident(current_schema()), ', pg_temp');
  END LOOP;
END $$;
