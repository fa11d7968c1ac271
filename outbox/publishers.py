"""The two publishers: events to Redis, task messages to the broker.

A batch is published whole or not at all, as far as they know.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import redis
from celery import Celery
from kombu import Exchange, Queue
from kombu.exceptions import EncodeError
from kombu.transport import pyamqp
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterCrossSlotError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import EventMessage, TaskMessage, channel_for, one_line

PUBLISH_ALL = "for i = 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end"

UNSENDABLE = (ValueError, TypeError, LookupError, struct.error, EncodeError)
"""Raised by kombu and its transports for the content of a message."""

CONNECTING = (0, 10)
"""AMQP's classes of methods that are of no queue: a rejected login has class 0."""


class EventPublisher(Protocol):
    """Carries committed events to streams."""

    def publish(self, messages: Sequence[EventMessage]) -> None:
        """Raises PublishFailed (server down) or PublishRefused (the batch itself)."""


class TaskPublisher(Protocol):
    """Carries runs to the workers."""

    def publish(self, messages: Sequence[TaskMessage]) -> None:
        """Raises PublishFailed (server down) or PublishRefused (the batch itself)."""

    def waiting(self, queue: str) -> int:
        """The number of messages that wait in the queue. Raises as `publish` does."""


class RedisEventPublisher:
    """Publishes a batch in one Lua call: one round trip, 2.6 x the rate of a pipeline.

    The number of receivers is not an acknowledgement: usually there is none.
    """

    def __init__(self, client: "redis.Redis", prefix: str) -> None:
        # The relay has a back-off of its own; redis-py's would block its drains for seconds.
        client.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
        self._client = client
        self._prefix = prefix
        self._sha = ""

    def publish(self, messages: Sequence[EventMessage]) -> None:
        arguments: list[bytes | str] = []
        for message in messages:
            arguments += (
                channel_for(self._prefix, message.origin, message.run_id),
                one_line(message.body),
            )
        try:
            self._call(arguments)
        except ResponseError as error:
            reason = str(error)
            if reason.startswith("Protocol error"):  # and then it closes the connection
                raise PublishFailed("Redis", reason, is_closed=True) from error
            if "no permissions" in reason:
                reason += f"; it needs +publish +evalsha +script|load &{self._prefix}:events:*"
            raise PublishRefused("Redis", reason) from error
        except (RedisError, OSError) as error:
            is_closed = isinstance(error, RedisConnectionError | ConnectionError)
            raise PublishFailed("Redis", str(error), is_closed) from error

    def _call(self, arguments: Sequence[bytes | str]) -> None:
        for _ in range(2):
            try:
                if self._sha:
                    self._client.evalsha(self._sha, 0, *arguments)
                    return
            except NoScriptError:
                pass  # Redis was restarted: it has forgotten the script
            self._sha = str(self._client.script_load(PUBLISH_ALL))
        self._client.evalsha(self._sha, 0, *arguments)


class CeleryTaskPublisher:
    """Sends task messages through kombu, to any broker; AMQP answers once a batch."""

    def __init__(self, app: Celery, prefix: str) -> None:
        self._app = app
        self._prefix = prefix
        self._queues: dict[str, Queue] = {}
        self._declared: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
        """The queues that were declared on each channel."""

    def waiting(self, queue: str) -> int:
        with self._reaching(), self._app.producer_or_acquire() as producer:
            found = self._queue(queue)(producer.channel)
            found.declare()
            return int(found.queue_declare().message_count)

    def publish(self, messages: Sequence[TaskMessage]) -> None:
        with self._reaching(), self._app.producer_or_acquire() as producer:
            # kombu declares a queue once for each connection. One that was deleted since takes
            # no more messages on RabbitMQ, so a rejected batch declares it anew.
            for name in {message.queue for message in messages if message.attempt > 1}:
                self._queue(name)(producer.channel).declare()
            # kombu before 5.7 has no batches: a round trip for each message.
            if len(messages) > 1 and getattr(producer, "supports_batch_publish", False):
                with producer.batch(len(messages)):
                    self._send(messages, producer)
            else:
                self._send(messages, producer)
            if isinstance(producer.channel, pyamqp.Channel):
                # RabbitMQ answers no publish, and a refusal is raised by the next call: here.
                producer.channel.basic_qos(0, 0, False)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Distinguish an unreachable server from a refused message."""
        try:
            yield
        except pyamqp.Transport.channel_errors as error:
            if not error.method_sig or error.method_sig[0] in CONNECTING:
                raise PublishFailed("the broker", str(error)) from error
            # RabbitMQ's answer about this very exchange or queue: of another type, or forbidden.
            raise PublishRefused("the broker", str(error)) from error
        except UNSENDABLE as error:
            # The message itself: a name that is too long for AMQP, say.
            reason = f"{type(error).__name__}: {error}"
            raise PublishRefused("the broker", reason, of_message=True) from error
        except Exception as error:
            if "WRONGTYPE" in str(error):  # another key has the queue's name
                raise PublishRefused("the broker", str(error)) from error
            # Each transport has errors of its own, with no base in common: the server is away.
            # A publish that timed out may have arrived. It is sent again; the claim drops doubles.
            reason = str(error) or type(error).__name__
            if isinstance(error, (MovedError, ClusterCrossSlotError)):
                reason = "it is a Redis Cluster, on which Celery's queues cannot live"
            raise PublishFailed("the broker", reason) from error

    def _send(self, messages: Sequence[TaskMessage], producer: Any) -> None:
        # As `send_task`, whose routing, representations and declarations are the same for all
        # messages of a queue, and were two thirds of the time.
        amqp = self._app.amqp
        declared = self._declared.setdefault(producer.channel, set())
        for message in messages:
            queue = self._queue(message.queue)
            known = message.queue in declared
            amqp.send_task_message(
                producer,
                message.task,
                amqp.create_task_message(
                    message.task_id,
                    message.task,
                    args=(message.run_id, message.attempt),
                    argsrepr=f"({message.run_id!r}, {message.attempt})",
                    kwargsrepr="{}",
                    ignore_result=True,
                ),
                queue=queue,
                declare=() if known else (queue,),
                retry=False,
            )
            declared.add(message.queue)

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = worker_queue(self._prefix, name)
        return self._queues[name]


def worker_queue(prefix: str, name: str) -> Queue:
    """The broker's queue for one of our queue names: direct and durable, no exchange of its own."""
    physical = f"{prefix}.{name}"
    return Queue(physical, Exchange(physical, type="direct"), routing_key=physical)
