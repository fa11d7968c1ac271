-- Statements of the session in which a chore is done.

-- name: limit_session
-- Have Postgres end the session of a frozen process soon, and no step wait for a lock for long.
-- If the process freezes, what it has locked is free again: the rows of a step and the
-- chore itself.
SELECT set_config('idle_in_transaction_session_timeout', %(free)s, false),
       set_config('idle_session_timeout', %(free)s, false),
       set_config('lock_timeout', %(wait)s, false)

-- name: take
-- Take the lock of a chore, unless another relay has it.
SELECT pg_try_advisory_lock({chore_key}, %(place)s)
