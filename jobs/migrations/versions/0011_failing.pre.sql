-- Which threads of a worker have failed, and not worked since: for doctor.
ALTER TABLE workers ADD COLUMN IF NOT EXISTS failing text[] NOT NULL DEFAULT '{}';
