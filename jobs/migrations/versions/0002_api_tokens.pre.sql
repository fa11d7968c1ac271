-- Only a hash of each token is kept. A token with a run_id may follow that run and nothing else.
CREATE TABLE IF NOT EXISTS api_tokens (
  id text COLLATE "C" PRIMARY KEY,
  hash bytea NOT NULL UNIQUE,
  namespace text COLLATE "C" NOT NULL,
  scopes text[] NOT NULL,
  run_id text COLLATE "C",
  note text,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires_at timestamptz
);
