-- The statements over schedules of which clients and the command line make use.

-- fragment: schedule_columns
-- The columns of a schedule `s`, in the order in which a `StoredSchedule` is made of them.
-- A number that none of ours is must not keep the others from being listed.
s.name, s.namespace, s.app, s.declared, s.run ->> 'plan', s.run -> 'input', s.cron, s.every, s.tz,
s.catch_up, s.overlap, s.jitter,
CASE WHEN s.run -> 'default_queue' = 'false' THEN s.run ->> 'queue' END,
CASE WHEN jsonb_typeof(s.run -> 'priority') = 'number'
      AND (s.run -> 'priority')::numeric BETWEEN -32768 AND 32767
     THEN (s.run -> 'priority')::numeric::int END,
s.run -> 'tags',
CASE WHEN jsonb_typeof(s.run -> 'deadline') = 'number'
      AND (s.run -> 'deadline')::numeric BETWEEN 0 AND 1e12
     THEN (s.run -> 'deadline')::numeric::float8 END,
s.run ->> 'group', s.state, s.reason, CASE WHEN s.state = 'active' THEN s.tick END,
s.last_tick, s.last_run_id, s.last_fired_at, s.last_late_s, s.failures, s.created_at

-- fragment: common
-- The members that all runs of a schedule have, of one that was checked.
%(run)s::jsonb - ARRAY['run_id', 'shard', 'key', 'not_before', 'delay']

-- fragment: ring_all
-- Ring each relay, whether it sleeps or not: any of them may be the one that fires.
pg_notify('beatless_{schema}', 'schedules')

-- name: clock
-- Read the clock of Postgres.
SELECT clock_timestamp()

-- name: create
-- Store a schedule; none if the name is used.
WITH s AS (
  INSERT INTO {schema}.schedules (namespace, name, app, declared, run, cron, every, tz, catch_up,
                                  overlap, jitter, state, tick, due_at, look_at)
  VALUES (%(namespace)s, %(name)s, %(app)s, %(declared)s, {common}, %(cron)s, %(every)s, %(tz)s,
          %(catch_up)s, %(overlap)s, %(jitter)s, 'active', %(tick)s, %(due_at)s, %(due_at)s)
  ON CONFLICT DO NOTHING
  RETURNING *
)
SELECT {schedule_columns}, {ring_all} FROM s

-- name: lock
-- Read a schedule that is to be changed, and hold it until the commit; whether its runs are these.
SELECT {schedule_columns}, s.run = {common} FROM {schema}.schedules s
 WHERE namespace = %(namespace)s AND name = %(name)s FOR NO KEY UPDATE

-- name: change
-- Store another definition of a schedule; without a tick the next one stays as it is.
WITH s AS (
  UPDATE {schema}.schedules s
     SET version = version + 1, app = %(app)s, declared = %(declared)s, run = {common},
         cron = %(cron)s, every = %(every)s, tz = %(tz)s, catch_up = %(catch_up)s,
         overlap = %(overlap)s, jitter = %(jitter)s,
         tick = CASE WHEN %(moves)s THEN %(tick)s ELSE tick END,
         due_at = CASE WHEN %(moves)s THEN %(due_at)s ELSE due_at END,
         look_at = CASE WHEN state <> 'active' THEN NULL WHEN %(moves)s THEN %(due_at)s
                        ELSE look_at END
   WHERE namespace = %(namespace)s AND name = %(name)s
  RETURNING *
)
SELECT {schedule_columns}, {ring_all} FROM s

-- name: set_state
-- Pause, stop or resume a schedule: it goes on with this tick.
WITH s AS (
  UPDATE {schema}.schedules s
     SET version = version + 1, state = %(state)s, reason = %(reason)s, tick = %(tick)s,
         due_at = %(due_at)s, look_at = %(due_at)s
   WHERE namespace = %(namespace)s AND name = %(name)s
  RETURNING *
)
SELECT {schedule_columns}, {ring_all} FROM s

-- name: delete
-- Take a schedule away; its runs stay.
DELETE FROM {schema}.schedules WHERE namespace = %(namespace)s AND name = %(name)s RETURNING name

-- name: get
-- Read a schedule.
SELECT {schedule_columns} FROM {schema}.schedules s
 WHERE namespace = %(namespace)s AND name = %(name)s

-- name: page
-- List the schedules of a namespace by name, from the one after.
SELECT {schedule_columns} FROM {schema}.schedules s
 WHERE namespace = %(namespace)s AND name > %(after)s ORDER BY name LIMIT %(limit)s

-- name: of_app
-- List the schedules of an app that are declared, or have been, and those of its plans that are gone,
-- which are of any namespace.
-- Reads in whole: schedules. Only a deploy asks.
SELECT {schedule_columns} FROM {schema}.schedules s
 WHERE app = %(app)s
   AND (declared AND namespace = %(namespace)s
        OR NOT declared AND NOT s.run ->> 'plan' = ANY(%(plans)s))
 ORDER BY name, namespace

-- name: alone
-- Wait for another deploy that applies schedules, and keep others waiting until the commit.
SELECT pg_advisory_xact_lock(hashtext('beatless schedules'), hashtext('{schema}'))

-- name: refresh
-- Note the versions and queues of plans for the runs of schedules that were made at run time.
-- Reads in whole: schedules. Only a deploy asks.
UPDATE {schema}.schedules s
   SET version = s.version + 1,
       run = s.run || jsonb_build_object('plan_version', p.version)
             || CASE WHEN s.run -> 'default_queue' = 'true'
                     THEN jsonb_build_object('queue', p.queue) ELSE '{}' END
  FROM unnest(%(plans)s::text[], %(versions)s::text[], %(queues)s::text[]) AS p(plan, version, queue)
 WHERE s.app = %(app)s AND NOT s.declared AND s.run ->> 'plan' = p.plan
   AND (s.run ->> 'plan_version', CASE WHEN s.run -> 'default_queue' = 'true'
                                       THEN s.run ->> 'queue' ELSE p.queue END)
       IS DISTINCT FROM (p.version, p.queue)

-- name: of_limited_plans
-- List schedules that were made at run time, from an id on: those of plans with limits, and those
-- whose runs have some. Only a deploy asks.
SELECT s.id, s.namespace, s.name, s.state, s.run ->> 'plan', (s.run -> 'input')::text,
       (s.run -> 'limits')::text, md5(s.run::text)
  FROM {schema}.schedules s
 WHERE s.app = %(app)s AND NOT s.declared AND s.id > %(after_id)s
   AND (s.run ->> 'plan' = ANY(%(limited)s)
        OR s.run ? 'limits' AND s.run ->> 'plan' = ANY(%(plans)s))
 ORDER BY s.id LIMIT {page}

-- name: note_limits
-- Note the limits of the runs of schedules, but for those that have changed since they were read.
UPDATE {schema}.schedules s
   SET version = s.version + 1,
       run = CASE w.limits WHEN '[]' THEN s.run - 'limits'
                  ELSE s.run || jsonb_build_object('limits', w.limits::jsonb) END
  FROM unnest(%(ids)s::bigint[], %(digests)s::text[], %(limits)s::text[]) AS w(id, digest, limits)
 WHERE s.id = w.id AND md5(s.run::text) = w.digest

-- name: run_now
-- Read the members of a run of a schedule, for a start out of turn.
SELECT s.id, (s.run - 'input')::text, (s.run -> 'input')::text, clock_timestamp()
  FROM {schema}.schedules s WHERE namespace = %(namespace)s AND name = %(name)s
