"""The state of a viewer of a run, and the effect of each thing that happens. Does no I/O."""

import json
import logging
from collections.abc import Callable

import httpx2

from beatless.cursors import parse_event_id
from beatless.errors import BadRequest, HistoryChanged, JobsError, WaitTimeout
from beatless.http.wire import AGAIN, error_of, pause_of
from beatless.orchestrator.events import Event
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.times import problem_with_seconds

logger = logging.getLogger(__name__)

RETRY = Backoff(initial=0.1, cap=5.0, jitter=0.5)
"""After Trigger.dev's client: for ever, with a low cap and much jitter."""

STALL_S = 40.0
"""Seconds without a byte after which a connection counts as dead: more than two heartbeats."""

FRAME_LIMIT = 64 * 1024 * 1024


class Interrupted(JobsError):
    """The connection brought an impossible answer, or a server that is not ready: retry."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason, pause)
        self.reason = reason
        self.pause = pause

    def __str__(self) -> str:
        return self.reason


class Follower:
    """The state of one followed run.

    Only an event resets the back-off: a server that accepts connections and sends nothing is not
    well. Events that a connection brought twice, in pieces or with a hole are dropped or requested
    again from the last event, so each comes once and in order.
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
        if timeout is not None and (problem := problem_with_seconds(timeout)):
            raise BadRequest("timeout", problem)
        self.run_id = run_id
        self.seq = after
        self.deadline = None if timeout is None else monotonic() + timeout
        self._timeout = timeout or 0.0
        self._on_reset = on_reset
        self._backoff = backoff
        self._epoch: str | None = None
        self._failures = 0
        self._retry = 2.0

    @property
    def headers(self) -> dict[str, str]:
        """Of the next request."""
        cursor = str(self.seq) if self._epoch is None else f"{self._epoch}.{self.seq}"
        return {"Accept": "text/event-stream", "Last-Event-ID": cursor}

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

    def feed(self, frame: httpx2.ServerSentEvent) -> Event | None:
        """The event of a frame, if it is the next one. Raises Interrupted and HistoryChanged."""
        if frame.retry is not None:
            self._retry = frame.retry / 1000
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
        try:
            event = Event.from_json(frame.data)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Interrupted("an event came that cannot be read") from error
        if event.seq <= self.seq:
            return None
        if event.seq != self.seq + 1:
            raise Interrupted(f"event {event.seq} came after {self.seq}")
        self.seq = event.seq
        self._failures = 0
        return event

    def _reset(self, epoch: str | None) -> None:
        if self._on_reset is None:
            raise HistoryChanged(self.run_id, self.seq)
        self._on_reset()
        self._epoch, self.seq = epoch, 0

    def closed(self) -> float:
        """The server has ended the stream in order: how long to wait before coming again."""
        return self._within(min(self._retry, self._backoff.cap))

    def failed(self, error: Exception) -> float:
        """The connection was lost: how long to wait. Raises WaitTimeout if that is too long."""
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        if isinstance(error, Interrupted):
            # More than was asked for, so that not all come back at once.
            delay += error.pause
        logger.warning(
            "stream was interrupted, will reconnect",
            extra={
                "action": "stream_interrupted",
                "run_id": self.run_id,
                "seq": self.seq,
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

    def too_late(self) -> WaitTimeout:
        """The error at the end of the timeout."""
        return WaitTimeout(self.run_id, self._timeout, "unfinished", self.seq)
