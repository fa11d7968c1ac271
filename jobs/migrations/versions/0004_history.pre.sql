-- The runs that ended in a way, by the time of their end. On their events, which never change: an
-- index on `runs.state` would cost each run two updates that are not HOT.
CREATE INDEX CONCURRENTLY IF NOT EXISTS run_events_outcome ON run_events ((data ->> 'outcome'), ts) WHERE type = 'RunFinished';

-- Whether a run was retried. Written with the run, and never changed.
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_retries ON runs (retry_of) WHERE retry_of IS NOT NULL;

-- Each new token looks for old ones, of streams above all, and each call without one whether there is
-- any other.
CREATE INDEX CONCURRENTLY IF NOT EXISTS api_tokens_expiry ON api_tokens (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS api_tokens_kept ON api_tokens (created_at) WHERE run_id IS NULL;
