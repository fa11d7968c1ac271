"""Task messages of a test's app, taken from the broker one by one as a worker takes them."""

import threading
from collections.abc import Callable
from typing import Any

from celery.worker.request import Request
from kombu import Connection, Queue
from kombu.message import Message

from beatless.app import App
from beatless.outbox.publishers import worker_queue
from beatless.outbox.queries import Caller, execute
from beatless.transactions import transact_by_driver


class TaskInbox:
    """The queues of one app. Threads may share it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._broker: Connection | None = None
        self._channel: Any = None
        self._queues: dict[str, Queue] = {}
        self._alone = threading.Lock()  # a channel is for one thread at a time

    def take(self) -> Message | None:
        """The next message of the app's queues, which are asked in the order of their names."""
        celery = self._app.celery
        with self._alone:
            if self._broker is None:
                self._broker = celery.connection_for_read()
            channel = self._broker.default_channel
            # Without a transaction, which would be two of three round trips.
            names = transact_by_driver(
                self._app.engine, self._queues_of_runs, twice=True, each_statement=True
            )
            for name in sorted(queue_names(self._app) | {name for (name,) in names}):
                message = self._queue(name, channel).get(accept=celery.conf.accept_content)
                if message is not None:
                    return message
            return None

    def _queues_of_runs(self, connection: Caller) -> list[Any]:
        schema = self._app.settings.schema
        return execute(connection, f"SELECT DISTINCT queue FROM {schema}.runs", {})

    def _queue(self, name: str, channel: Any) -> Queue:
        """The queue, declared once by each connection to Redis.

        RabbitMQ refuses the next message of a queue that `obliterate` has deleted.
        """
        if channel is not self._channel or self._app.settings.redis_broker is None:
            self._channel, self._queues = channel, {}
        if name not in self._queues:
            queue = worker_queue(self._app.settings.prefix, name)(channel)
            queue.declare()
            self._queues[name] = queue
        return self._queues[name]

    def acknowledge(self, message: Message) -> None:
        """Acknowledge the message to the broker."""
        with self._alone:
            message.ack()

    def execute_task(self, message: Message) -> None:
        """Execute an ordinary task as a worker would; its failure is logged.

        Raises AssertionError for a task that the app does not have.
        """
        name = message.headers.get("task")
        task = self._app.celery.tasks.get(name)
        if task is None:
            raise AssertionError(
                f"a message for the task {name!r} waits, which this app does not have: import the "
                "module that registers it with app.celery, or do not send it in this test"
            )
        Request(
            message,
            app=self._app.celery,
            task=task,
            on_ack=self._answering(message.ack_log_error),
            on_reject=self._answering(message.reject_log_error),
        ).execute()

    def release(self) -> None:
        """Drop the connection: a broker that waits for acknowledgements delivers again."""
        with self._alone:
            if self._broker is not None:
                self._broker.release()
                self._broker = self._channel = None

    def _answering(self, answer: Callable[..., Any]) -> Callable[..., None]:
        """Answers the broker while no other thread uses the channel."""

        def call(*arguments: Any) -> None:
            with self._alone:
                answer(*arguments)

        return call


def queue_names(app: App) -> set[str]:
    """The queues that a worker of this app takes messages of, without those that a run named."""
    return {"default", *(plan.queue for plan in app.plans.values())}
