-- The decision of an approval travels with its signal: `wait` (the occurrence), `by`, `at`, `link`.
ALTER TABLE signals ADD COLUMN IF NOT EXISTS decision jsonb;

-- An approval is decided once: the key is what the second of two transactions waits at.
CREATE TABLE IF NOT EXISTS decisions (
  run_id text COLLATE "C" NOT NULL,
  occurrence text COLLATE "C" NOT NULL,
  data jsonb NOT NULL,
  decided_by text NOT NULL,
  link text COLLATE "C",
  decided_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (run_id, occurrence)
);

-- Links by which one person may decide one approval. Only a hash of the token of each is kept.
CREATE TABLE IF NOT EXISTS approval_links (
  id text COLLATE "C" PRIMARY KEY,
  hash bytea NOT NULL UNIQUE,
  run_id text COLLATE "C" NOT NULL,
  occurrence text COLLATE "C" NOT NULL,
  decided_by text NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires_at timestamptz NOT NULL,
  revoked_at timestamptz
);
CREATE INDEX CONCURRENTLY IF NOT EXISTS approval_links_run ON approval_links (run_id);
