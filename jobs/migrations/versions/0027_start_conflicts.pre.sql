-- A start in REPEATABLE READ or SERIALIZABLE that has lost a race for its dedupe key fails with a
-- serialization failure, as one for its key does: by that code callers try again. Only Postgres sees the
-- row that the snapshot does not, and says so of a conflict that is not to be an error. The function
-- stands whole in 0022.
DO $$
DECLARE
  before text;
  after text;
BEGIN
  SELECT pg_get_functiondef(p.oid) INTO before FROM pg_proc p
   WHERE p.pronamespace = current_schema()::regnamespace AND p.proname = 'start_run';
  after = replace(before, $text$
        FROM u
    )
    SELECT u.run_id INTO existing FROM u;
    IF FOUND THEN
$text$, $text$
        FROM u
      ON CONFLICT DO NOTHING
      RETURNING run_id
    )
    SELECT u.run_id, d.run_id AS dispatched INTO existing FROM u LEFT JOIN d ON true;
    IF FOUND THEN
      IF existing.dispatched IS NULL THEN
        RAISE serialization_failure USING
          MESSAGE = concat('another run with the dedupe key ', quote_literal(start_run.dedupe_key), ' was started meanwhile'),
          HINT = 'Roll back, and try the whole transaction again.';
      END IF;
$text$);
  IF after <> before THEN
    EXECUTE after;
  END IF;
END $$;
