-- Whether the caller of a start named no queue, no input: then the plan's defaults of that time are in
-- the row, and another start with the same key is the same whatever they are by now.
ALTER TABLE runs ADD COLUMN IF NOT EXISTS default_queue boolean;
ALTER TABLE runs ADD COLUMN IF NOT EXISTS default_input boolean;
