-- Of the runs of a plan and a namespace with one `dedupe_key` one is unfinished, and one more, their
-- successor, waits for its end. A dispatch exists only while its run is unfinished: there the key,
-- behind the name of its namespace, is unique.
ALTER TABLE runs ADD COLUMN IF NOT EXISTS dedupe_key text;

ALTER TABLE dispatches
  ADD COLUMN IF NOT EXISTS dedupe_key text,
  ADD COLUMN IF NOT EXISTS dedupe_next boolean NOT NULL DEFAULT false;

-- The key of a run that has ended, and of a successor that was stored: the note `next`.
ALTER TABLE wakes
  ADD COLUMN IF NOT EXISTS plan text,
  ADD COLUMN IF NOT EXISTS dedupe_key text;

CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS dispatches_dedupe ON dispatches (task, dedupe_key, dedupe_next) WHERE dedupe_key IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_next ON dispatches (run_id) WHERE dedupe_next;
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_dedupe ON runs (namespace, dedupe_key, created_at) WHERE dedupe_key IS NOT NULL;

-- Whatever ends a run deletes its dispatch: statements of every process, also of those that know no
-- such keys. Always noted, for a successor may be stored in a transaction that is still open. It only
-- inserts, and rings the relay as the statements of the code do.
CREATE OR REPLACE FUNCTION note_next() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
  INSERT INTO wakes (shard, run_id, reason, plan, dedupe_key)
  VALUES (OLD.shard, OLD.run_id, 'next', OLD.task, OLD.dedupe_key); PERFORM
    CASE WHEN NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, OLD.shard)
         THEN pg_notify('beatless_' || TG_TABLE_SCHEMA, OLD.shard::text) END; RETURN NULL; END $$;

CREATE OR REPLACE TRIGGER dispatches_end AFTER DELETE ON dispatches FOR EACH ROW
  WHEN (OLD.dedupe_key IS NOT NULL AND NOT OLD.dedupe_next)
  EXECUTE FUNCTION note_next();
