-- The statements over the versions of plans: the order of their steps.

-- name: store
-- Note the order of the steps of versions that are not known yet. What is stored never changes.
INSERT INTO {schema}.plan_versions (plan, version, steps)
SELECT plan, version, steps
  FROM jsonb_to_recordset(%(orders)s::jsonb) AS i(plan text, version text, steps jsonb)
 ORDER BY plan, version
ON CONFLICT DO NOTHING

-- name: steps
-- Read the order of the steps of one version of a plan.
SELECT steps FROM {schema}.plan_versions WHERE plan = %(plan)s AND version = %(plan_version)s

-- name: known
-- List the versions of plans.
-- Reads in whole: plan_versions.
SELECT plan, version, steps FROM {schema}.plan_versions
