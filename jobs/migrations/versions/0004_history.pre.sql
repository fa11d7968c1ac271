-- The runs that ended in a way, by the time of their end. On their events, which never change: an
-- index on `runs.state` would cost each run two updates that are not HOT.
CREATE INDEX CONCURRENTLY IF NOT EXISTS run_events_outcome ON run_events ((data ->> 'outcome'), ts) WHERE type = 'RunFinished';

-- Whether a run was retried. Written with the run, and never changed.
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_retries ON runs (retry_of) WHERE retry_of IS NOT NULL;
