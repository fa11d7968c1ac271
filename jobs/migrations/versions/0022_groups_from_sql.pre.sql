-- Runs that SQL starts have a group. Two functions of one name, of which each takes the arguments of
-- the other, are ambiguous; and a statement that is under way calls the one that it has found, perhaps
-- for an hour. So the one of before stays, under the name `start_run_0020`, and calls the new one: what
-- depends on it goes on. All in one statement: no session sees none, or two. In a new schema nothing
-- depends on it. The new one has its owner and its grants.
DO $$
DECLARE
  before record;
  after regprocedure;
  each record;
BEGIN
  SELECT p.oid::regprocedure AS name, p.proowner AS owner,
         coalesce(p.proacl, acldefault('f', p.proowner)) AS grants,
         p.xmin = pg_current_xact_id()::xid
           OR EXISTS (SELECT FROM pg_proc o WHERE o.pronamespace = p.pronamespace AND o.proname = 'start_run_0020') AS unused
    INTO before FROM pg_proc p
   WHERE p.pronamespace = current_schema()::regnamespace AND p.proname = 'start_run' AND p.pronargs = 14;
  IF before.unused THEN
    EXECUTE concat('DROP FUNCTION ', before.name);
  ELSIF before.name IS NOT NULL THEN
    EXECUTE concat('ALTER FUNCTION ', before.name, ' RENAME TO start_run_0020');
  END IF;

  EXECUTE $start$
CREATE OR REPLACE FUNCTION start_run(
  plan text, input jsonb DEFAULT NULL, key text DEFAULT NULL, queue text DEFAULT NULL, priority integer DEFAULT 0, tags jsonb DEFAULT NULL,
  delay interval DEFAULT NULL, not_before timestamptz DEFAULT NULL, deadline interval DEFAULT NULL,
  dedupe_key text DEFAULT NULL, while_unfinished text DEFAULT NULL, run_id text DEFAULT NULL,
  traceparent text DEFAULT NULL, namespace text DEFAULT 'default', "group" text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql SET enable_seqscan TO off AS $body$
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
    WHEN start_run."group" = '' OR length(start_run."group") > 256
      THEN 'group must have 1 to 256 characters'
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
                        limits, priority, tags, dedupe_key, "group")
      VALUES (id, start_run.namespace, start_run.plan, declared.version,
              coalesce(start_run.queue, declared.queue), 'queued',
              coalesce(given, declared.default_input), start_run.key, 1,
              coalesce(start_run.not_before, clock_timestamp() + make_interval(secs => extract(epoch FROM start_run.delay)::float8)),
              clock_timestamp() + make_interval(secs => extract(epoch FROM start_run.deadline)::float8),
              CASE WHEN start_run.traceparent ~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$'
                   THEN jsonb_build_object('traceparent', start_run.traceparent) END,
              start_run.queue IS NULL, given IS NULL, own_limits, start_run.priority,
              coalesce(own_tags, '{}'), start_run.dedupe_key, start_run."group")
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
                              deadline_at, dedupe_key, limit_id, group_id)
      SELECT u.run_id, bell, u.plan, u.queue, u.priority,
             CASE WHEN u.not_before > clock_timestamp() THEN 'delayed' ELSE 'waiting' END,
             coalesce(u.not_before, u.created_at),
             CASE WHEN u.not_before IS NULL THEN 'start' ELSE 'delay' END, u.deadline_at,
             dispatch_key, u.limits -> 0 ->> 'id',
             coalesce(start_run.namespace || '/' || start_run."group", '')
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
END $body$
  $start$;
  SELECT p.oid::regprocedure INTO after FROM pg_proc p
   WHERE p.pronamespace = current_schema()::regnamespace AND p.proname = 'start_run';
  EXECUTE concat('ALTER FUNCTION ', after, ' SET search_path TO ', quote_ident(current_schema()), ', pg_temp');
  IF before.name IS NULL THEN
    RETURN;
  END IF;

  FOR each IN
    SELECT a.grantee, false AS is_given, false AS is_grantable
      FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
     WHERE p.oid = after AND a.grantee <> p.proowner
    UNION ALL
    SELECT a.grantee, true, a.is_grantable FROM aclexplode(before.grants) a WHERE a.grantee <> before.owner
     ORDER BY 2
  LOOP
    EXECUTE concat(
      CASE WHEN each.is_given THEN 'GRANT' ELSE 'REVOKE' END, ' EXECUTE ON FUNCTION ', after,
      CASE WHEN each.is_given THEN ' TO ' ELSE ' FROM ' END,
      CASE WHEN each.grantee = 0 THEN 'PUBLIC' ELSE each.grantee::regrole::text END,
      CASE WHEN each.is_grantable THEN ' WITH GRANT OPTION' END);
  END LOOP;
  IF before.owner <> (SELECT p.proowner FROM pg_proc p WHERE p.oid = after) THEN
    EXECUTE concat('ALTER FUNCTION ', after, ' OWNER TO ', before.owner::regrole);
  END IF;
  IF NOT before.unused THEN
    EXECUTE $start$
CREATE OR REPLACE FUNCTION start_run_0020(
  plan text, input jsonb DEFAULT NULL, key text DEFAULT NULL, queue text DEFAULT NULL, priority integer DEFAULT 0, tags jsonb DEFAULT NULL,
  delay interval DEFAULT NULL, not_before timestamptz DEFAULT NULL, deadline interval DEFAULT NULL,
  dedupe_key text DEFAULT NULL, while_unfinished text DEFAULT NULL, run_id text DEFAULT NULL,
  traceparent text DEFAULT NULL, namespace text DEFAULT 'default'
) RETURNS text LANGUAGE sql SET search_path FROM CURRENT AS $body$
  SELECT start_run($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
$body$
    $start$;
    EXECUTE concat('ALTER FUNCTION start_run_0020 SET search_path TO ', quote_ident(current_schema()), ', pg_temp');
  END IF;
END $$;
