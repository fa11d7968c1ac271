"""The transactional outbox: messages, the doorbell, the relay and its two publishers."""
