-- The statements over the plans that a deploy registers, for starts from SQL.

-- name: declare
-- Store the plans of an app as it declares them, and mark those that it declares no more: their names.
-- One deploy after the other: the second waits for the rows of the first.
WITH input AS (
  SELECT * FROM jsonb_to_recordset(%(registered)s::jsonb) AS i(
    name text, version text, queue text, default_input jsonb, limits jsonb, refused text)
), stored AS (
  INSERT INTO {schema}.declared_plans AS p (name, app, version, queue, default_input, limits, refused,
                                            max_event_bytes)
  SELECT name, %(app)s, version, queue, default_input, limits, refused, %(max_event_bytes)s
    FROM input ORDER BY name
  ON CONFLICT (name, app) DO UPDATE
     SET declared = true, version = excluded.version, queue = excluded.queue,
         default_input = excluded.default_input, limits = excluded.limits,
         refused = excluded.refused, max_event_bytes = excluded.max_event_bytes,
         declared_at = excluded.declared_at
), gone AS (
  UPDATE {schema}.declared_plans SET declared = false
   WHERE app = %(app)s AND declared AND name NOT IN (SELECT name FROM input)
  RETURNING name
)
SELECT name FROM gone ORDER BY name
