-- The statement over rows that no relay can act on.

-- name: some
-- List some of the unfit rows, with the promise that each breaks.
-- Reads in whole: dispatches. For a person who asks.
SELECT * FROM ({unfit}) AS unfit LIMIT %(limit)s
