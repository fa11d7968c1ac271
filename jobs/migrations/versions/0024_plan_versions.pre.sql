-- The order of the steps in each version of a plan, written by deploys and by workers as they start. A run's
-- row names the version that it was started with. Older processes write none, and read none.
CREATE TABLE IF NOT EXISTS plan_versions (
  plan text COLLATE "C" NOT NULL,
  version text COLLATE "C" NOT NULL,
  steps jsonb NOT NULL,
  PRIMARY KEY (plan, version)
);
