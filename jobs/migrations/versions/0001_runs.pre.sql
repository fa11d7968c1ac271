CREATE TABLE runs (
  run_id text COLLATE "C" PRIMARY KEY,
  namespace text COLLATE "C" NOT NULL DEFAULT 'default',
  plan text NOT NULL,
  plan_version text NOT NULL,
  queue text COLLATE "C" NOT NULL,
  priority smallint NOT NULL DEFAULT 0,
  state text NOT NULL,
  input jsonb,
  result jsonb,
  error jsonb,
  key text,
  last_seq integer NOT NULL,
  attempt integer NOT NULL DEFAULT 0,
  lease_token bigint NOT NULL DEFAULT 0,
  lease_expires_at timestamptz,
  worker text,
  cancel_requested_at timestamptz,
  not_before timestamptz,
  deadline_at timestamptz,
  tags jsonb NOT NULL DEFAULT '{}',
  retry_of text COLLATE "C",
  trace_context jsonb,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  started_at timestamptz,
  finished_at timestamptz,
  CONSTRAINT runs_state CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled'))
) WITH (fillfactor = 70);
-- No index on a column that changes while a run lives, so that its updates stay HOT.
CREATE UNIQUE INDEX runs_key ON runs (namespace, key) WHERE key IS NOT NULL;
CREATE INDEX runs_created ON runs (namespace, created_at, run_id);

CREATE TABLE run_events (
  run_id text COLLATE "C" NOT NULL,
  seq integer NOT NULL,
  ts timestamptz NOT NULL DEFAULT clock_timestamp(),
  type text NOT NULL,
  v smallint NOT NULL DEFAULT 1,
  source text NOT NULL,
  step text,
  attempt integer,
  data jsonb,
  PRIMARY KEY (run_id, seq)
);

-- One row for each append, deleted once it was published: the table is nearly empty and very hot.
CREATE TABLE run_outbox (
  shard smallint NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1),
  run_id text COLLATE "C" NOT NULL,
  from_seq integer NOT NULL,
  to_seq integer NOT NULL,
  PRIMARY KEY (shard, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);

-- One row for each unfinished run: when the relay must look at it next.
CREATE TABLE dispatches (
  run_id text COLLATE "C" PRIMARY KEY,
  shard smallint NOT NULL,
  task text NOT NULL,
  queue text COLLATE "C" NOT NULL,
  priority smallint NOT NULL,
  state text NOT NULL CONSTRAINT dispatches_state CHECK (state IN ('waiting', 'sent', 'running')),
  due_at timestamptz NOT NULL,
  reason text NOT NULL,
  attempts integer NOT NULL DEFAULT 0
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);
CREATE INDEX dispatches_waiting ON dispatches (queue, priority, due_at) WHERE state = 'waiting';
CREATE INDEX dispatches_out ON dispatches (due_at) WHERE state <> 'waiting';

CREATE TABLE queues (
  name text COLLATE "C" PRIMARY KEY,
  paused_at timestamptz
);

-- What was given up on, kept for a person to look at.
CREATE TABLE dead_letters (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  kind text NOT NULL,
  run_id text COLLATE "C" NOT NULL,
  reason text NOT NULL,
  message jsonb NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
