"""Carries task messages to their publisher in a thread of its own, one batch at a time."""

import queue
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from beatless.outbox.clock import monotonic
from beatless.outbox.errors import PublishRefused
from beatless.outbox.message import TaskMessage
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.publishers import TaskPublisher
from beatless.outbox.threads import LastingThread


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A batch to be published."""

    messages: Sequence[TaskMessage]
    unclaimed: Sequence[TaskMessage] = ()
    """Sent before and claimed by nobody: sent again if the message before is lost."""
    out: Mapping[str, int] = field(default_factory=dict)
    """How many messages of each of their queues are out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What has become of a batch."""

    messages: Sequence[TaskMessage]
    """What the publisher has accepted, whatever became of the rest."""
    error: BaseException | None
    """Why the others were not accepted; None if there are none but what was refused."""
    kept: Sequence[TaskMessage] = ()
    """Not sent, because their last messages are in the broker still."""
    lost: Sequence[TaskMessage] = ()
    """Not sent, though their last messages are lost: another of the same plan is sent first."""
    refused: Sequence[tuple[Sequence[TaskMessage], PublishRefused]] = ()
    """The messages of each queue that the broker will not have."""


class Courier:
    """A broker that hangs for its whole timeout delays no event, because it has its own thread.

    Used by one thread, which sends, waits a moment, and takes back; `on_return` is called in the
    courier's thread when a batch that is not waited for any more has found its end.
    """

    def __init__(
        self,
        publisher: TaskPublisher,
        on_return: Callable[[], None],
        *,
        observer: Observer = ignore,
    ) -> None:
        self._publisher = publisher
        self._on_return = on_return
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._deliveries: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._returned: Delivery | None = None
        self._refused: set[str] = set()
        """Queues that were not accepted when last tried: each is sent by itself."""
        self._observer = observer
        self._thread: LastingThread | None = None
        self.away = False
        """A batch was sent and not taken back: send no other."""
        self._sent_at = 0.0

    @property
    def away_for(self) -> float:
        """Seconds since the batch was sent that is away; 0 if none is."""
        return monotonic() - self._sent_at if self.away else 0.0

    @property
    def alive(self) -> bool:
        """Whether its thread is still at a batch."""
        return self._thread is not None and self._thread.is_alive()

    def send(
        self,
        messages: Sequence[TaskMessage],
        *,
        unclaimed: Sequence[TaskMessage] = (),
        out: Mapping[str, int] | None = None,
    ) -> None:
        """Let this batch be published, and of the unclaimed ones those that are lost.

        `out` is how many messages of each of their queues are out.
        """
        if self._thread is None:
            thread = LastingThread("courier", self._run, observer=self._observer)
            thread.start()
            self._thread = thread
        self.away, self._sent_at = True, monotonic()
        self._orders.put(Order(messages=messages, unclaimed=unclaimed, out=out or {}))

    def wait(self, seconds: float | None) -> bool:
        """Wait for the batch that is away; False if its fate is still unknown then."""
        if self.away and self._returned is None:
            try:
                self._returned = self._deliveries.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def take_back(self) -> Delivery | None:
        """What has become of the batch; None if none was sent, or it is still on its way."""
        if not self.away or not self.wait(0):
            return None
        delivery, self._returned, self.away = self._returned, None, False
        return delivery

    @property
    def returned(self) -> bool:
        """Whether there is something to take back."""
        return self.away and (self._returned is not None or not self._deliveries.empty())

    def close(self) -> None:
        """End the thread. One that hangs in its publisher ends after it, and is not awaited."""
        self._orders.put(None)

    def _run(self, thread: LastingThread) -> None:
        while (order := self._orders.get()) is not None:
            try:
                delivery = self._carry(order)
            except BaseException as error:
                # Whatever it is: the relay waits for its batch, and does not know this thread.
                delivery = Delivery(messages=(), error=error)
            self._deliveries.put(delivery)
            self._on_return()
            thread.works()

    def _carry(self, order: Order) -> Delivery:
        again, seen = self._look(order)
        return replace(
            _together([seen, self._publish([*order.messages, *again])]),
            kept=seen.kept,
            lost=seen.lost,
        )

    def _look(self, order: Order) -> tuple[list[TaskMessage], Delivery]:
        """The unclaimed messages that are to be sent again, and what is so of the others.

        Nobody can ask a broker for one message. But when it holds fewer of a queue than are out,
        the oldest are lost, or were dropped by a worker that does not have their plan: one of each
        plan is sent again, and the others after that one was claimed.
        """
        again, kept, lost = list[TaskMessage](), list[TaskMessage](), list[TaskMessage]()
        refused: list[tuple[Sequence[TaskMessage], PublishRefused]] = []
        for messages in _by_queue(order.unclaimed):
            name = messages[0].queue
            try:
                missing = max(0, order.out[name] - self._publisher.waiting(name))
            except PublishRefused as refusal:
                refused.append((messages, refusal))
                continue
            except BaseException as error:
                return again, Delivery(
                    messages=(), error=error, kept=kept, lost=lost, refused=refused
                )
            kept += messages[missing:]
            plans: dict[str, list[TaskMessage]] = defaultdict(list)
            for message in messages[:missing]:
                if message.reason == "lease":
                    again.append(message)
                elif message.reason == "broker_lost":
                    lost.append(message)
                else:
                    plans[message.task].append(message)
            for first, *rest in plans.values():
                again.append(first)
                lost += rest
        return again, Delivery(messages=(), error=None, kept=kept, lost=lost, refused=refused)

    def _publish(self, messages: Sequence[TaskMessage]) -> Delivery:
        """One bad queue must not hold up the rest of the batch, nor let it be sent twice.

        A batch that was refused may have arrived in part, and is sent again queue by queue: nobody
        says which part, and the claim drops what comes twice. From then on a bad queue is sent by
        itself, until it is accepted.
        """
        known = [message for message in messages if message.queue in self._refused]
        others = [message for message in messages if message.queue not in self._refused]
        parts = [others] if others else []
        return _together([self._try(part) for part in [*parts, *_by_queue(known)]])

    def _try(self, messages: Sequence[TaskMessage]) -> Delivery:
        try:
            self._publisher.publish(messages)
        except PublishRefused as refusal:
            parts = _by_queue(messages)
            if len(parts) == 1 and refusal.of_message:
                parts = [[message] for message in messages]
            if len(parts) > 1:
                return _together([self._try(part) for part in parts])
            self._refused.add(messages[0].queue)
            return Delivery(messages=(), error=None, refused=((messages, refusal),))
        except BaseException as error:
            return Delivery(messages=(), error=error)
        self._refused.difference_update(message.queue for message in messages)
        return Delivery(messages=messages, error=None)


def _by_queue(messages: Sequence[TaskMessage]) -> list[list[TaskMessage]]:
    queues: dict[str, list[TaskMessage]] = {}
    for message in messages:
        queues.setdefault(message.queue, []).append(message)
    return list(queues.values())


def _together(parts: Sequence[Delivery]) -> Delivery:
    return Delivery(
        messages=[message for part in parts for message in part.messages],
        error=next((part.error for part in parts if part.error), None),
        refused=[refused for part in parts for refused in part.refused],
    )
