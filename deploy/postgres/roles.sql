-- Three roles for the schema `beatless`. Run once, as a superuser, in the database of your app:
--   psql -d app -f roles.sql, then \password beatless_owner and so on for each.
-- To repeat it is harmless. For another schema replace the word in quotes.
DO $$
DECLARE
  role text;
BEGIN
  FOREACH role IN ARRAY ARRAY['beatless_owner', 'beatless_app', 'beatless_monitor'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
      EXECUTE format('CREATE ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION', role);
    END IF;
  END LOOP;
END $$;

-- Owns the tables: for `beatless migrate` and for nothing else.
CREATE SCHEMA IF NOT EXISTS "beatless" AUTHORIZATION beatless_owner;

-- Everything that runs: relay, worker, API, your own processes. Rows, and no tables. All of them
-- need the same role: a relay may have to end the sessions of another one that is frozen.
GRANT USAGE ON SCHEMA "beatless" TO beatless_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA "beatless" TO beatless_app;
ALTER DEFAULT PRIVILEGES FOR ROLE beatless_owner IN SCHEMA "beatless"
  GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO beatless_app;

-- Looks, and sees no input, result, event or token: monitor.sql grants it after the first migration.
GRANT USAGE ON SCHEMA "beatless" TO beatless_monitor;
