"""Celery's events about tasks, which a worker sends only while somebody listens.

Each is a command to Redis that the main process waits for, three a run: over half of its time
under load. Redis answers a PUBLISH with the number of its receivers, and kombu drops the answer.
Nobody else knows of listeners: Flower asks for events and never takes that back, and `celery
events` does not even ask (ADR 0059).
"""

from typing import Any

from celery.app.events import Events
from celery.events import group_from
from celery.events.dispatcher import EventDispatcher
from kombu.transport import redis

from beatless.outbox.clock import monotonic

UNHEARD_S = 0.25
"""Seconds without another event after one that nobody has received."""


class HeardDispatcher(EventDispatcher):  # type: ignore[misc]  # Celery has no types
    """Sends events as Celery's, and none about tasks right after one that nobody received.

    The first one after `UNHEARD_S` finds out whether there is a listener by now. So a worker that
    is idle sends each event, and a listener misses those of its first quarter of a second at most.
    Every event is sent to another broker than Redis, which does not tell.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._silent_until = 0.0
        self._counted: Any = None
        """The channel whose publications are counted."""
        self._answers: list[int] = []
        """How many have received the event that is published now, as Redis says."""
        super().__init__(*arguments, **options)

    def send(self, type: str, *arguments: Any, **fields: Any) -> Any:
        if group_from(type) == "task" and monotonic() < self._silent_until:
            return None
        return super().send(type, *arguments, **fields)

    def _publish(self, event: Any, producer: Any, routing_key: str, **options: Any) -> Any:
        if producer is not None:
            self._count_receivers(producer)
        self._answers.clear()
        super()._publish(event, producer, routing_key, **options)
        # Listeners of other events, as workers that gossip, hear nothing of tasks.
        if self._answers and routing_key.startswith("task."):
            self._silent_until = 0.0 if any(self._answers) else monotonic() + UNHEARD_S

    def _count_receivers(self, producer: Any) -> None:
        try:
            channel = producer.channel
        except Exception:
            return  # as Celery, which keeps its events until the broker can be reached again
        if channel is self._counted or not isinstance(channel, redis.Channel):
            return
        new_client = channel.Client

        def counting(**options: Any) -> Any:
            client = new_client(**options)
            client.set_response_callback("PUBLISH", self._note)
            return client

        channel.Client, self._counted = counting, channel

    def _note(self, receivers: int, **_: Any) -> int:
        self._answers.append(receivers)
        return receivers


class HeardEvents(Events):  # type: ignore[misc]  # Celery has no types
    """Celery's events with this dispatcher."""

    dispatcher_cls = f"{__name__}:{HeardDispatcher.__qualname__}"
