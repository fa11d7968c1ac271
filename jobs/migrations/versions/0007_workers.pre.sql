-- Which workers take runs of which queue now: each tells it every ten seconds.
CREATE TABLE IF NOT EXISTS workers (
  worker text COLLATE "C" PRIMARY KEY,
  hostname text NOT NULL,
  queues text[] NOT NULL,
  processes integer NOT NULL,
  version text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
