-- Statements over the queues in which a namespace has unfinished runs.
--
-- The ids of a namespace begin with its name and a `~`; those of the default one have none.

-- name: of_default
-- List the queues of the namespace `default`.
-- Reads in whole: dispatches, at most once a minute, and for a start that names a queue.
SELECT DISTINCT queue FROM {schema}.dispatches WHERE strpos(run_id, '~') = 0

-- name: of_namespace
-- List the queues of another namespace, whose ids have this prefix.
SELECT DISTINCT queue FROM {schema}.dispatches WHERE run_id > %(prefix)s AND run_id < %(end)s
