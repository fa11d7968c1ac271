-- Statements over the tokens of the HTTP API.

-- fragment: grants
-- Whether a token `t` is good now: it has not expired, and neither has the one that made it.
(t.expires_at IS NULL OR t.expires_at > clock_timestamp()) AND {maker_is_good}

-- name: create
-- Store a token, and delete some that expired long ago.
WITH old AS (
  DELETE FROM {schema}.api_tokens WHERE id = ANY(ARRAY(
    SELECT id FROM {schema}.api_tokens
     WHERE expires_at < (SELECT clock_timestamp() - interval '1 day')
     ORDER BY expires_at LIMIT {sweep} FOR UPDATE SKIP LOCKED)))
INSERT INTO {schema}.api_tokens (id, hash, namespace, scopes, run_id, note, maker, expires_at)
VALUES (%(id)s, %(hash)s, %(namespace)s, %(scopes)s, %(run_id)s, %(note)s, %(maker)s,
        clock_timestamp() + make_interval(secs => %(seconds)s))

-- name: find
-- Read what a token grants, by the hash of its secret.
SELECT t.namespace, t.scopes, t.run_id, t.id, t.maker FROM {schema}.api_tokens t
 WHERE t.hash = %(hash)s AND {grants}

-- name: good
-- List those of these tokens that are good; '' is, while there is none.
SELECT t.id FROM {schema}.api_tokens t WHERE t.id = ANY(%(ids)s) AND {grants}
UNION ALL SELECT '' WHERE '' = ANY(%(ids)s) AND NOT {any_token}

-- name: any
-- Find out whether everybody needs a token.
SELECT {any_token}

-- name: list
-- List the tokens that are not for a single stream, oldest first.
SELECT id, namespace, scopes, note, created_at, expires_at FROM {schema}.api_tokens
 WHERE run_id IS NULL ORDER BY created_at

-- name: revoke
-- Delete a token.
DELETE FROM {schema}.api_tokens WHERE id = %(id)s RETURNING id
