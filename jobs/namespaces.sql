-- Statements over the namespaces that have runs.

-- name: beside
-- List two namespaces that have runs beside this one: the next in each direction of the index.
(SELECT namespace FROM {schema}.runs WHERE namespace < %(namespace)s
  ORDER BY namespace DESC LIMIT 1)
UNION ALL
(SELECT namespace FROM {schema}.runs WHERE namespace > %(namespace)s
  ORDER BY namespace LIMIT 1)
