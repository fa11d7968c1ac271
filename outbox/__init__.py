"""How a committed fact leaves Postgres: messages, the doorbell, the relay and its two doors."""

from outbox.backoff import Backoff
from outbox.errors import (
    DirectConnectionRequired,
    OutboxError,
    PublishFailed,
    PublishRefused,
    SchemaMissing,
)
from outbox.faults import CrashPoints, SimulatedCrash
from outbox.message import EventMessage, TaskMessage
from outbox.publishers import (
    CeleryTaskPublisher,
    EventPublisher,
    RedisEventPublisher,
    TaskPublisher,
)
from outbox.relay import Relay

__all__ = [
    "Backoff",
    "CeleryTaskPublisher",
    "CrashPoints",
    "DirectConnectionRequired",
    "EventMessage",
    "EventPublisher",
    "OutboxError",
    "PublishFailed",
    "PublishRefused",
    "RedisEventPublisher",
    "Relay",
    "SchemaMissing",
    "SimulatedCrash",
    "TaskMessage",
    "TaskPublisher",
]
