-- The token of a lease whose process is known to have died; -1 after a claim that has found a lease
-- run out of which nobody knew that.
ALTER TABLE runs ADD COLUMN IF NOT EXISTS dead_token bigint;

-- The token that has made a link over HTTP: the link is good no longer than that. '' is whoever made
-- one while there was no token.
ALTER TABLE approval_links ADD COLUMN IF NOT EXISTS maker text COLLATE "C";
