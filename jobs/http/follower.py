"""The state of a viewer, and the effect of each thing that happens. Does no I/O."""

import json
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import httpx2

from beatless.cursors import TailPlace, parse_event_id, parse_tail_id
from beatless.errors import BadRequest, HistoryChanged, JobsError, WaitTimeout
from beatless.http.wire import AGAIN, error_of, path_of, pause_of
from beatless.orchestrator.events import Event
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.times import problem_with_seconds
from beatless.streams.tailed import TailedEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY = Backoff(initial=0.1, cap=5.0, jitter=0.5)
"""After Trigger.dev's client: for ever, with a low cap and much jitter."""

STALL_S = 40.0
"""Seconds without a byte after which a connection counts as dead: more than two heartbeats."""

FRAME_LIMIT = 64 * 1024 * 1024

KNOWN_RUNS = 100_000
"""Runs of which a tailer knows the last event, as a tail in the app does."""


class Interrupted(JobsError):
    """The connection brought an impossible answer, or a server that is not ready: retry."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason, pause)
        self.reason = reason
        self.pause = pause

    def __str__(self) -> str:
        return self.reason


class TimeIsUp(JobsError):
    """The time of a tail is over."""


class Viewer(ABC, Generic[T]):
    """A viewer of a stream, who comes again after each loss.

    Only an event resets the back-off: a server that accepts connections and sends nothing is not
    well.
    """

    def __init__(self, path: str, *, timeout: float | None, backoff: Backoff) -> None:
        """Raises BadRequest for a timeout that is no time."""
        if timeout is not None and (problem := problem_with_seconds(timeout)):
            raise BadRequest("timeout", problem)
        self.path = path
        self.deadline = None if timeout is None else monotonic() + timeout
        self.ended = False
        """True when nothing more follows."""
        self._backoff = backoff
        self._failures = 0
        self._retry = 2.0

    @property
    @abstractmethod
    def headers(self) -> dict[str, str]:
        """Of the next request."""

    @property
    def query(self) -> Mapping[str, Any]:
        """Of the next request."""
        return {}

    @abstractmethod
    def feed(self, frame: httpx2.ServerSentEvent) -> T | None:
        """The event of a frame, if it is a new one. Raises Interrupted and HistoryChanged."""

    @abstractmethod
    def too_late(self) -> JobsError:
        """The error at the end of the timeout."""

    @property
    @abstractmethod
    def _followed(self) -> dict[str, Any]:
        """What is followed, and how far, for log lines."""

    def accept(self, response: httpx2.Response) -> bool:
        """Whether events follow; False if there is nothing to come any more.

        Raises Interrupted for an answer that may be another in a moment, and the error that any
        other answer names.
        """
        if response.status_code == 204:
            return False
        if response.status_code in AGAIN:
            raise Interrupted(f"the API answered {response.status_code}", pause_of(response))
        if response.status_code != 200:
            raise error_of(response)
        return True

    def closed(self) -> float:
        """The server has ended the stream in order: how long to wait before coming again."""
        return self._within(min(self._retry, self._backoff.cap))

    def failed(self, error: Exception) -> float:
        """The connection was lost: how long to wait. Raises `too_late` if that is too long."""
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        if isinstance(error, Interrupted):
            # More than was asked for, so that not all come back at once.
            delay += error.pause
        logger.warning(
            "stream was interrupted, will reconnect",
            extra={
                "action": "stream_interrupted",
                **self._followed,
                "failures": self._failures,
                "reason": str(error) or type(error).__name__,
            },
        )
        return self._within(delay, error)

    def _within(self, delay: float, cause: Exception | None = None) -> float:
        if (left := self.left()) is not None and left <= delay:
            raise self.too_late() from cause
        return delay

    def left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - monotonic())

    def patience(self, stall: float) -> float:
        """Seconds that the next connection may bring no byte."""
        left = self.left()
        return stall if left is None else max(0.001, min(stall, left))

    def _hear(self, frame: httpx2.ServerSentEvent) -> None:
        if frame.retry is not None:
            self._retry = frame.retry / 1000


class Follower(Viewer[Event]):
    """The state of one followed run.

    Events that a connection brought twice, in pieces or with a hole are dropped or requested again
    from the last event, so each comes once and in order.
    """

    def __init__(
        self,
        run_id: str,
        after: int,
        *,
        timeout: float | None,
        on_reset: Callable[[], None] | None,
        backoff: Backoff,
    ) -> None:
        """Raises BadRequest for a timeout that is no time."""
        super().__init__(path_of("runs", run_id, "stream"), timeout=timeout, backoff=backoff)
        self.run_id = run_id
        self.seq = after
        self._timeout = timeout or 0.0
        self._on_reset = on_reset
        self._epoch: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        cursor = str(self.seq) if self._epoch is None else f"{self._epoch}.{self.seq}"
        return {"Accept": "text/event-stream", "Last-Event-ID": cursor}

    @property
    def _followed(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "seq": self.seq}

    def feed(self, frame: httpx2.ServerSentEvent) -> Event | None:
        """The event of a frame, if it is the next one. Raises Interrupted and HistoryChanged."""
        self._hear(frame)
        try:
            epoch, _ = parse_event_id(frame.id, "id")
        except BadRequest as error:
            raise Interrupted(f"a frame came with the id {frame.id!r}") from error
        if frame.event == "reset":
            self._reset(epoch)
        if self._epoch is None:
            self._epoch = epoch
        if frame.event in ("message", "reset"):
            return None
        if epoch != self._epoch:
            raise Interrupted("an event of another history came")
        event = _event_of(frame)
        if event.seq <= self.seq:
            return None
        if event.seq != self.seq + 1:
            raise Interrupted(f"event {event.seq} came after {self.seq}")
        self.seq = event.seq
        self.ended = event.final
        self._failures = 0
        return event

    def _reset(self, epoch: str | None) -> None:
        if self._on_reset is None:
            raise HistoryChanged(self.run_id, self.seq)
        self._on_reset()
        self._epoch, self.seq = epoch, 0

    def too_late(self) -> WaitTimeout:
        return WaitTimeout(self.run_id, self._timeout, "unfinished", self.seq)


class Tailer(Viewer[TailedEvent]):
    """The state of one tail of all runs.

    Who comes again is given the last events before once more, and what came while it was away: by
    their seqs those that it has are dropped.
    """

    def __init__(
        self,
        query: Mapping[str, Any],
        *,
        timeout: float | None,
        on_reset: Callable[[], None] | None,
        backoff: Backoff,
    ) -> None:
        """Raises BadRequest for a timeout that is no time."""
        super().__init__(path_of("stream"), timeout=timeout, backoff=backoff)
        self._query = query
        self._on_reset = on_reset
        self._last_id = ""
        self._place: TailPlace | None = None
        self._seqs: OrderedDict[str, int] = OrderedDict()

    @property
    def begun(self) -> bool:
        """Whether the tail has begun: from then on no event is missed."""
        return self._place is not None

    @property
    def headers(self) -> dict[str, str]:
        known = {"Last-Event-ID": self._last_id} if self._last_id else {}
        return {"Accept": "text/event-stream", **known}

    @property
    def query(self) -> Mapping[str, Any]:
        return self._query

    @property
    def _followed(self) -> dict[str, Any]:
        return {"place": self._last_id}

    def feed(self, frame: httpx2.ServerSentEvent) -> TailedEvent | None:
        """The event of a frame, if it has not come before. Raises Interrupted, HistoryChanged."""
        self._hear(frame)
        if not frame.id and frame.event == "message":
            return None  # the first frame before a reset
        try:
            place = parse_tail_id(frame.id, "id")
        except BadRequest as error:
            raise Interrupted(f"a frame came with the id {frame.id!r}") from error
        if frame.event == "reset":
            if self._on_reset is None:
                raise HistoryChanged(None, 0)
            self._on_reset()
            self._seqs.clear()
        elif self._place is not None and place.epoch != self._place.epoch:
            raise Interrupted("an event of another history came")
        found = None
        if frame.event not in ("message", "reset"):
            found = self._new(frame)
        # Behind the event: one that cannot be read is asked for again.
        self._last_id, self._place = frame.id, place
        return found

    def _new(self, frame: httpx2.ServerSentEvent) -> TailedEvent | None:
        event = _event_of(frame)
        self._failures = 0
        if event.seq <= self._seqs.get(event.run_id, 0):
            return None
        self._seqs[event.run_id] = event.seq
        self._seqs.move_to_end(event.run_id)
        if len(self._seqs) > KNOWN_RUNS:
            self._seqs.popitem(last=False)
        plan = json.loads(frame.data).get("plan")
        return TailedEvent(plan=str(plan), event=event)

    def too_late(self) -> TimeIsUp:
        return TimeIsUp()


def _event_of(frame: httpx2.ServerSentEvent) -> Event:
    """Raises Interrupted."""
    try:
        return Event.from_json(frame.data)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Interrupted("an event came that cannot be read") from error
