"""How a committed fact leaves Postgres: messages, the doorbell, the relay and its two doors."""

from beatless.outbox.backoff import Backoff
from beatless.outbox.errors import (
    DirectConnectionRequired,
    OutboxError,
    PublishFailed,
    PublishRefused,
    SchemaMissing,
)
from beatless.outbox.faults import CrashPoints, SimulatedCrash
from beatless.outbox.message import EventMessage, TaskMessage
from beatless.outbox.publishers import (
    CeleryTaskPublisher,
    EventPublisher,
    RedisEventPublisher,
    TaskPublisher,
)
from beatless.outbox.relay import Relay

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
