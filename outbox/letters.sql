-- Statements over dead letters. Whatever a letter holds, it must not have the others fail that it
-- stands among.

-- fragment: shard
-- The shard in a message; NULL unless it is a number, and one of a shard.
CASE WHEN (CASE jsonb_typeof(message -> 'shard')
             WHEN 'number' THEN message ->> 'shard' END)::numeric BETWEEN 0 AND {last_shard}
     THEN (CASE jsonb_typeof(message -> 'shard')
             WHEN 'number' THEN message ->> 'shard' END)::numeric::int END

-- fragment: from_seq
-- The first seq in a message; NULL unless it is a number, and fits an integer.
CASE WHEN (CASE jsonb_typeof(message -> 'from_seq')
             WHEN 'number' THEN message ->> 'from_seq' END)::numeric
          BETWEEN -2147483648 AND 2147483647
     THEN (CASE jsonb_typeof(message -> 'from_seq')
             WHEN 'number' THEN message ->> 'from_seq' END)::numeric::int END

-- fragment: to_seq
-- The last seq in a message; NULL unless it is a number, and fits an integer.
CASE WHEN (CASE jsonb_typeof(message -> 'to_seq')
             WHEN 'number' THEN message ->> 'to_seq' END)::numeric
          BETWEEN -2147483648 AND 2147483647
     THEN (CASE jsonb_typeof(message -> 'to_seq')
             WHEN 'number' THEN message ->> 'to_seq' END)::numeric::int END

-- fragment: fit
-- Whether a message can be put back.
{shard} IS NOT NULL AND {from_seq} IS NOT NULL AND {to_seq} IS NOT NULL

-- fragment: put_back
-- Insert what was taken from the letters into the outbox, and wake the relays.
INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq)
SELECT {shard}, run_id, {from_seq}, {to_seq} FROM gone ORDER BY {from_seq}
RETURNING run_id, pg_notify(%(channel)s, '')

-- name: list
-- Read a page of letters, oldest first.
SELECT id, run_id, reason, coalesce({from_seq}, 0), coalesce({to_seq}, 0), created_at
  FROM {schema}.dead_letters WHERE id > %(after)s ORDER BY id LIMIT %(limit)s

-- name: requeue
-- Put the message of one letter back into the outbox.
WITH gone AS (DELETE FROM {schema}.dead_letters WHERE id = %(id)s AND {fit} RETURNING run_id, message)
{put_back}

-- name: requeue_some
-- Put the messages of letters with this in their reason back into the outbox, oldest first.
WITH gone AS (DELETE FROM {schema}.dead_letters WHERE id IN (
  SELECT id FROM {schema}.dead_letters
   WHERE strpos(lower(reason), lower(%(reason)s)) > 0 AND {fit}
   ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED) AND {fit} RETURNING run_id, message)
{put_back}

-- name: discard
-- Delete one letter: its events stay in the journal.
DELETE FROM {schema}.dead_letters WHERE id = %(id)s RETURNING id
