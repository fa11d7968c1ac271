-- Where the relay finds the runs that are past their deadline, whoever does not take them. It never
-- changes while the run waits: `dispatches` has no row of a run that has ended.
ALTER TABLE dispatches ADD COLUMN IF NOT EXISTS deadline_at timestamptz;
CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_deadline ON dispatches (deadline_at) WHERE deadline_at IS NOT NULL;
