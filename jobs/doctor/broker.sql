-- Questions of the checks of the broker. They write nothing.

-- name: known_runs
-- Of these run ids, list those that this database has.
SELECT run_id FROM {schema}.runs WHERE run_id = ANY(%(ids)s)
