"""Publishes task messages in a thread of its own, one batch at a time."""

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
class Batch:
    """Task messages to publish together. True unless it is empty."""

    messages: Sequence[TaskMessage]
    unclaimed: Sequence[TaskMessage] = ()
    """Sent before and not claimed: sent again if the message before is lost."""
    out: Mapping[str, int] = field(default_factory=dict)
    """How many messages of each of their queues are out."""

    def __bool__(self) -> bool:
        return bool(self.messages or self.unclaimed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """The fate of a batch."""

    accepted: Sequence[TaskMessage]
    """Messages that the broker has accepted."""
    error: BaseException | None
    """The error for which others were not accepted; None if there are only refused ones."""
    kept: Sequence[TaskMessage] = ()
    """Not sent, because their last messages are in the broker still."""
    lost: Sequence[TaskMessage] = ()
    """Not sent, though their last messages are lost: another of the same plan is sent first."""
    refused: Sequence[tuple[Sequence[TaskMessage], PublishRefused]] = ()
    """The messages of each queue that the broker will not have."""


class AsyncTaskPublisher:
    """Keeps a broker that hangs for its whole timeout from delaying events, by a thread for it.

    Used by one thread, which sends a batch, waits a moment, and collects the result; `on_result` is
    called in the publishing thread when a batch has found its end.
    """

    def __init__(
        self,
        publisher: TaskPublisher,
        on_result: Callable[[], None],
        *,
        observer: Observer = ignore,
    ) -> None:
        self._publisher = publisher
        self._on_result = on_result
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BatchResult] = queue.SimpleQueue()
        self._result: BatchResult | None = None
        self._refused: set[str] = set()
        """Queues that were not accepted when last tried: each is sent by itself."""
        self._observer = observer
        self._thread: LastingThread | None = None
        self.in_flight = False
        """A batch was sent and its result not collected: send no other."""
        self._sent_at = 0.0

    @property
    def in_flight_s(self) -> float:
        """Seconds since the batch in flight was sent; 0 if none is."""
        return monotonic() - self._sent_at if self.in_flight else 0.0

    @property
    def alive(self) -> bool:
        """Whether its thread has not ended."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_result(self) -> bool:
        """Whether there is a result to collect."""
        return self.in_flight and (self._result is not None or not self._results.empty())

    def send(self, batch: Batch) -> None:
        """Let these messages be published, and of the unclaimed ones those that are lost."""
        if self._thread is None:
            thread = LastingThread("courier", self._run, observer=self._observer)
            thread.start()
            self._thread = thread
        self.in_flight, self._sent_at = True, monotonic()
        self._batches.put(batch)

    def wait(self, seconds: float | None) -> bool:
        """Wait for the batch in flight; False if its fate is still unknown then."""
        if self.in_flight and self._result is None:
            try:
                self._result = self._results.get(timeout=seconds)
            except queue.Empty:
                return False
        return True

    def collect_result(self) -> BatchResult | None:
        """Take the result of the batch; None if none was sent, or it is still in flight."""
        if not self.in_flight or not self.wait(0):
            return None
        result, self._result, self.in_flight = self._result, None, False
        return result

    def close(self) -> None:
        """End the thread. One that hangs in its publisher ends after it, and is not awaited."""
        self._batches.put(None)

    def _run(self, thread: LastingThread) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                result = self._process(batch)
            except BaseException as error:
                # Any error: the relay waits for its batch, and does not know this thread.
                result = BatchResult(accepted=(), error=error)
            self._results.put(result)
            self._on_result()
            thread.works()

    def _process(self, batch: Batch) -> BatchResult:
        again, counted = self._count_missing(batch)
        return replace(
            _together([counted, self._publish([*batch.messages, *again])]),
            kept=counted.kept,
            lost=counted.lost,
        )

    def _count_missing(self, batch: Batch) -> tuple[list[TaskMessage], BatchResult]:
        """Find the unclaimed messages that are to be sent again, and the fate of the others.

        No broker can be asked for one message. But when it holds fewer of a queue than are out,
        the oldest are lost, or were dropped by a worker that does not have their plan: one of each
        plan is sent again, and the others after that one was claimed.
        """
        again, kept, lost = list[TaskMessage](), list[TaskMessage](), list[TaskMessage]()
        refused: list[tuple[Sequence[TaskMessage], PublishRefused]] = []
        for messages in _by_queue(batch.unclaimed):
            name = messages[0].queue
            try:
                missing = max(0, batch.out[name] - self._publisher.waiting(name))
            except PublishRefused as refusal:
                refused.append((messages, refusal))
                continue
            except BaseException as error:
                return again, BatchResult(
                    accepted=(), error=error, kept=kept, lost=lost, refused=refused
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
        return again, BatchResult(accepted=(), error=None, kept=kept, lost=lost, refused=refused)

    def _publish(self, messages: Sequence[TaskMessage]) -> BatchResult:
        """Publish them so that one bad queue neither holds up the others nor has them sent twice.

        A batch that was refused may have arrived in part, and is sent again queue by queue: the
        part is not known, and the claim drops duplicates. From then on a bad queue is sent by
        itself, until it is accepted.
        """
        known = [message for message in messages if message.queue in self._refused]
        others = [message for message in messages if message.queue not in self._refused]
        parts = [others] if others else []
        return _together([self._try(part) for part in [*parts, *_by_queue(known)]])

    def _try(self, messages: Sequence[TaskMessage]) -> BatchResult:
        try:
            self._publisher.publish(messages)
        except PublishRefused as refusal:
            parts = _by_queue(messages)
            if len(parts) == 1 and refusal.of_message:
                parts = [[message] for message in messages]
            if len(parts) > 1:
                return _together([self._try(part) for part in parts])
            self._refused.add(messages[0].queue)
            return BatchResult(accepted=(), error=None, refused=((messages, refusal),))
        except BaseException as error:
            return BatchResult(accepted=(), error=error)
        self._refused.difference_update(message.queue for message in messages)
        return BatchResult(accepted=messages, error=None)


def _by_queue(messages: Sequence[TaskMessage]) -> list[list[TaskMessage]]:
    queues: dict[str, list[TaskMessage]] = {}
    for message in messages:
        queues.setdefault(message.queue, []).append(message)
    return list(queues.values())


def _together(parts: Sequence[BatchResult]) -> BatchResult:
    return BatchResult(
        accepted=[message for part in parts for message in part.accepted],
        error=next((part.error for part in parts if part.error), None),
        refused=[refused for part in parts for refused in part.refused],
    )
