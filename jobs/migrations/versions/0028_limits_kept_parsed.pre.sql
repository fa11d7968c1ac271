-- The functions of 0018 and 0025 that each claim calls. A session parses and plans the statements of plpgsql
-- once; before Postgres 18, those of a function in SQL that is not inlined, as it sets the search path, at each
-- call.

CREATE OR REPLACE FUNCTION limits_of(given jsonb) RETURNS TABLE (id text, at_once integer) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
BEGIN
  RETURN QUERY
  SELECT l ->> 'id', coalesce((SELECT s.at_once FROM limit_settings s
                                WHERE s.name = split_part(l ->> 'id', ':', 1)), (l ->> 'at_once')::int)
    FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) l
   WHERE l ->> 'at_once' ~ '^[1-9][0-9]{0,4}$';
END $$;

CREATE OR REPLACE FUNCTION rates_of(given jsonb) RETURNS TABLE (id text, starts integer, period_s double precision) LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
BEGIN
  IF NOT coalesce(given @? '$[*].starts', false) THEN
    RETURN;
  END IF;
  RETURN QUERY
  SELECT l ->> 'id', coalesce(s.starts, (l ->> 'starts')::int),
         coalesce(s.period_s, (l ->> 'period_s')::float8)
    FROM jsonb_array_elements(CASE jsonb_typeof(given) WHEN 'array' THEN given END) l
    LEFT JOIN rate_settings s ON s.name = split_part(l ->> 'id', ':', 1)
   WHERE l ->> 'starts' ~ '^[1-9][0-9]{0,6}$' AND l ->> 'period_s' ~ '^[1-9][0-9]{0,5}(\.[0-9]+)?$';
END $$;

-- Takes a token of each of these rates, or none; the rate that has none. Most runs have no rate.
CREATE OR REPLACE FUNCTION missing_token(wanted jsonb) RETURNS text LANGUAGE plpgsql SET search_path FROM CURRENT SET enable_seqscan TO off AS $$
DECLARE
  each record;
BEGIN
  IF NOT coalesce(wanted @? '$[*].starts', false) THEN
    RETURN NULL;
  END IF;
  FOR each IN SELECT * FROM rates_of(wanted) l ORDER BY l.id LOOP
    LOOP
      PERFORM FROM limit_rates r WHERE r.limit_id = each.id FOR NO KEY UPDATE;
      EXIT WHEN FOUND;
      INSERT INTO limit_rates (limit_id, full_at) VALUES (each.id, clock_timestamp())
      ON CONFLICT DO NOTHING;
    END LOOP;
    IF tokens_of(each.id, each.starts, each.period_s) < 1 THEN
      RETURN each.id;
    END IF;
  END LOOP;
  UPDATE limit_rates r
     SET full_at = greatest(r.full_at, clock_timestamp())
                   + make_interval(secs => l.period_s / l.starts)
    FROM rates_of(wanted) l WHERE r.limit_id = l.id;
  RETURN NULL;
END $$;

-- Our tables before temporary ones of the session, as in 0020: a start calls them.
DO $$
DECLARE
  each regprocedure;
BEGIN
  FOR each IN
    SELECT p.oid::regprocedure FROM pg_proc p
     WHERE p.pronamespace = current_schema()::regnamespace
       AND p.proname IN ('limits_of', 'rates_of')
  LOOP
    EXECUTE concat('ALTER FUNCTION ', each, ' SET search_path TO ', quote_ident(current_schema()), ', pg_temp');
  END LOOP;
END $$;
