-- Each filter of the lists of runs has its index, in the order of the lists. On columns that never
-- change, or that change at an end without success only: the updates of a living run stay HOT, and
-- so does the one that completes it.
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_plan ON runs (namespace, plan, created_at);
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_queue ON runs (namespace, queue, created_at);

-- A run without tags costs it nothing.
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_tags ON runs USING gin (tags jsonb_path_ops) WHERE tags <> '{}';

-- A run has an error if it has failed or was cancelled. The expression tells which: only what is
-- described of an exception has a traceback, whatever the name of its class.
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_error ON runs (namespace, (CASE WHEN error ->> 'type' = 'RunCancelled' AND NOT error ? 'traceback' THEN 'cancelled' ELSE 'failed' END), created_at) WHERE error IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_error_plan ON runs (namespace, (CASE WHEN error ->> 'type' = 'RunCancelled' AND NOT error ? 'traceback' THEN 'cancelled' ELSE 'failed' END), plan, created_at) WHERE error IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_error_queue ON runs (namespace, (CASE WHEN error ->> 'type' = 'RunCancelled' AND NOT error ? 'traceback' THEN 'cancelled' ELSE 'failed' END), queue, created_at) WHERE error IS NOT NULL;

-- How many stored runs have ended, by queue: a relay counts them now and then.
CREATE TABLE IF NOT EXISTS ended_runs (
  queue text COLLATE "C" PRIMARY KEY,
  completed bigint NOT NULL,
  failed bigint NOT NULL,
  cancelled bigint NOT NULL
);
