-- A child knows its parent, its number there, and the root of its tree; a detached one begins a tree
-- of its own. `children_started` is the highest number that a parent has given.
ALTER TABLE runs
  ADD COLUMN IF NOT EXISTS parent_id text COLLATE "C",
  ADD COLUMN IF NOT EXISTS child_no integer,
  ADD COLUMN IF NOT EXISTS root_id text COLLATE "C",
  ADD COLUMN IF NOT EXISTS children_started integer NOT NULL DEFAULT 0;

-- The unfinished children of a run are among the dispatches. A run that waits for children is woken
-- when at most `children_left` are unfinished, or one has failed.
ALTER TABLE dispatches
  ADD COLUMN IF NOT EXISTS parent_id text COLLATE "C",
  ADD COLUMN IF NOT EXISTS child_no integer,
  ADD COLUMN IF NOT EXISTS children_left integer,
  ADD COLUMN IF NOT EXISTS wakes_on_failure boolean;

-- Why a run was noted: null for a signal, `child` if one of its children has ended, `cancel` if its
-- unfinished children are to be cancelled: all but detached ones, or those with these numbers.
ALTER TABLE wakes
  ADD COLUMN IF NOT EXISTS reason text,
  ADD COLUMN IF NOT EXISTS failed boolean,
  ADD COLUMN IF NOT EXISTS first_child integer,
  ADD COLUMN IF NOT EXISTS last_child integer;

CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS runs_children ON runs (parent_id, child_no) WHERE parent_id IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS runs_failed_children ON runs (parent_id, child_no) WHERE parent_id IS NOT NULL AND error IS NOT NULL;
CREATE INDEX CONCURRENTLY IF NOT EXISTS dispatches_children ON dispatches (parent_id, child_no) WHERE parent_id IS NOT NULL;

-- Whatever ends a child or takes it away tells its parent; whatever ends or cancels a parent has its
-- children cancelled: statements of every process, also of those that know no children. It only
-- inserts, and rings the relay as the statements of the code do.
CREATE OR REPLACE FUNCTION note_children() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
  bell integer; ends boolean; BEGIN
  ends = OLD.finished_at IS NULL AND (TG_OP = 'DELETE' OR NEW.finished_at IS NOT NULL); FOR bell IN
  WITH noted AS (
    INSERT INTO wakes (shard, run_id, reason, failed)
    SELECT d.shard, d.run_id, 'child', TG_OP = 'DELETE' OR NEW.error IS NOT NULL
      FROM dispatches d WHERE ends AND d.run_id = OLD.parent_id
    UNION ALL
    SELECT abs(hashtext(OLD.run_id) % 16), OLD.run_id, 'cancel', NULL
     WHERE OLD.children_started > 0
       AND (ends OR TG_OP = 'UPDATE' AND OLD.cancel_requested_at IS NULL
                    AND NEW.cancel_requested_at IS NOT NULL)
       AND EXISTS (SELECT FROM dispatches d WHERE d.parent_id = OLD.run_id)
    RETURNING shard
  ) SELECT shard FROM noted
  LOOP
    PERFORM CASE WHEN NOT pg_try_advisory_xact_lock_shared('run_outbox'::regclass::oid::int4, bell)
                 THEN pg_notify('beatless_' || TG_TABLE_SCHEMA, bell::text) END; END LOOP; RETURN NULL; END $$;

CREATE OR REPLACE TRIGGER runs_end AFTER UPDATE OF finished_at, cancel_requested_at ON runs FOR EACH ROW
  WHEN ((OLD.parent_id IS NOT NULL OR OLD.children_started > 0)
        AND ((OLD.finished_at IS NULL) <> (NEW.finished_at IS NULL)
             OR (OLD.cancel_requested_at IS NULL) <> (NEW.cancel_requested_at IS NULL)))
  EXECUTE FUNCTION note_children();

CREATE OR REPLACE TRIGGER runs_removed AFTER DELETE ON runs FOR EACH ROW
  WHEN ((OLD.parent_id IS NOT NULL OR OLD.children_started > 0) AND OLD.finished_at IS NULL)
  EXECUTE FUNCTION note_children();
