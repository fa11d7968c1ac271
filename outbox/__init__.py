"""How a committed fact leaves Postgres: messages, the doorbell, the relay and its two doors."""
