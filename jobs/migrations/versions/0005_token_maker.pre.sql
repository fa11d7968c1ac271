-- Which token made this one, for a single stream: it is good no longer than that.
ALTER TABLE api_tokens ADD COLUMN IF NOT EXISTS maker text COLLATE "C";
