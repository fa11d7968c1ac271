-- Events up to `pruned_seq` were removed after the retention time; `pruned_at` comes with the last.
-- Both change only after the end of a run, so that the updates of a living one stay HOT.
ALTER TABLE runs
  ADD COLUMN IF NOT EXISTS pruned_seq integer NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS pruned_at timestamptz;
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_pruned ON runs (pruned_at) WHERE pruned_at IS NOT NULL;

-- One entry for each ended run that has its events: what is due next is the first one.
CREATE INDEX CONCURRENTLY IF NOT EXISTS run_events_finished ON run_events (ts) WHERE type = 'RunFinished';

-- What retention removes is used again soon, and not only after a fifth of a large table is gone.
ALTER TABLE run_events SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE runs SET (autovacuum_vacuum_scale_factor = 0.02);
