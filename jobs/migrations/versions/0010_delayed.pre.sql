-- A run that is due later is `delayed`: a relay walks the queues of those that wait, and finds these
-- by their time. To a relay of the version before they are rows of dispatches_out that become due.
ALTER TABLE dispatches
  DROP CONSTRAINT IF EXISTS dispatches_state,
  ADD CONSTRAINT dispatches_state
    CHECK (state IN ('waiting', 'delayed', 'sent', 'running')) NOT VALID;
ALTER TABLE dispatches VALIDATE CONSTRAINT dispatches_state;

-- How many messages of a queue are out, without reading what runs.
CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_sent ON dispatches (queue) WHERE state = 'sent';
