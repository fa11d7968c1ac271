-- Statements over the links by which a person decides an approval.

-- name: create
-- Store a link.
INSERT INTO {schema}.approval_links (id, hash, run_id, occurrence, decided_by, maker,
                                     expires_at)
VALUES (%(id)s, %(hash)s, %(run_id)s, %(occurrence)s, %(by)s, %(maker)s,
        clock_timestamp() + make_interval(secs => %(seconds)s))
RETURNING expires_at

-- name: find
-- Read a link and its state, by the hash of its token.
SELECT t.id, t.run_id, r.namespace, r.plan, t.occurrence, t.decided_by, t.expires_at,
       t.revoked_at IS NOT NULL OR NOT {maker_is_good}, t.expires_at <= clock_timestamp(),
       r.state IN ('completed', 'failed', 'cancelled') OR r.cancel_requested_at IS NOT NULL,
       d.decided_by, d.decided_at, d.link = t.id,
       EXISTS (SELECT FROM {schema}.run_events e WHERE e.run_id = t.run_id
                  AND e.type = 'WaitStarted' AND e.step = t.occurrence)
  FROM {schema}.approval_links t
  JOIN {schema}.runs r ON r.run_id = t.run_id
  LEFT JOIN {schema}.decisions d ON d.run_id = t.run_id AND d.occurrence = t.occurrence
 WHERE t.hash = %(hash)s

-- name: revoke
-- Revoke a link of a run of this namespace.
UPDATE {schema}.approval_links l SET revoked_at = coalesce(l.revoked_at, clock_timestamp())
 WHERE l.id = %(id)s AND EXISTS (
   SELECT FROM {schema}.runs r WHERE r.run_id = l.run_id AND r.namespace = %(namespace)s)
RETURNING l.id
