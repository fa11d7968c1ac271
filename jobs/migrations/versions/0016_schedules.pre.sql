-- A schedule starts a run at each tick. `tick` is the name of the next one, `due_at` the time at which
-- it is to start, `look_at` the time at which relays look at it: null while it is not active. `run` has
-- the members that its runs have in common. `version` grows with each change: who has read the row
-- and then fires a tick, fires it only if the row is still the one that was read.
CREATE TABLE IF NOT EXISTS schedules (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  namespace text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  version bigint NOT NULL DEFAULT 1,
  app text NOT NULL,
  declared boolean NOT NULL,
  run jsonb NOT NULL,
  cron text,
  every integer,
  tz text NOT NULL,
  catch_up text NOT NULL,
  overlap text NOT NULL,
  jitter double precision NOT NULL,
  state text NOT NULL,
  reason text,
  tick timestamptz,
  due_at timestamptz,
  look_at timestamptz,
  last_tick timestamptz,
  last_run_id text COLLATE "C",
  last_fired_at timestamptz,
  last_late_s double precision,
  failures integer NOT NULL DEFAULT 0,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS schedules_name ON schedules (namespace, name);
CREATE INDEX CONCURRENTLY IF NOT EXISTS schedules_due ON schedules (look_at) WHERE look_at IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS schedules_stopped ON schedules (name) WHERE state = 'stopped';

-- A run knows its tick; the unfinished runs of a schedule are among the dispatches.
ALTER TABLE runs
  ADD COLUMN IF NOT EXISTS schedule text,
  ADD COLUMN IF NOT EXISTS tick timestamptz;

ALTER TABLE dispatches ADD COLUMN IF NOT EXISTS schedule_id bigint;

CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_schedule ON dispatches (schedule_id) WHERE schedule_id IS NOT NULL;
