-- Signals that were sent to runs and are not in their journals yet. The sender only inserts, and so
-- holds no row of a run until its commit; whoever holds the lease takes them into the journal.
CREATE TABLE IF NOT EXISTS signals (
  run_id text COLLATE "C" NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY,
  name text NOT NULL,
  key text NOT NULL,
  data jsonb,
  PRIMARY KEY (run_id, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);

-- Runs at which the relay must look: one that waits, and leaves its worker as the row is written,
-- becomes due. Deleted as soon as it was looked at.
CREATE TABLE IF NOT EXISTS wakes (
  shard smallint NOT NULL,
  id bigint GENERATED ALWAYS AS IDENTITY,
  run_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (shard, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);
