-- One row. What pg_dump copies of it is another row, in another table: see `outbox.queries.origin`.
CREATE TABLE IF NOT EXISTS history (token text NOT NULL);
INSERT INTO history SELECT gen_random_uuid()::text WHERE NOT EXISTS (SELECT FROM history);
