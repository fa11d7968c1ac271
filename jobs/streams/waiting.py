"""Waits of a stream: until its caller's timeout, and between reads that Postgres refuses."""

import logging

from sqlalchemy import exc

from beatless.errors import WaitTimeout
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.transactions import first_line

logger = logging.getLogger("beatless.stream")

POSTGRES_AWAY = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)
"""The journal cannot be read now: Postgres is gone or full, or the pool has no connection left."""

GAP_PAUSE_S = 1.0
"""How long the journal is not read again for an event that it did not have: whoever may publish on
the channel can invent any number of them."""


class Timeout:
    """The time that the caller of a stream gives it, from now on; None is without end."""

    def __init__(self, run_id: str, seconds: float | None) -> None:
        self.run_id = run_id
        self._seconds = seconds
        self._deadline = None if seconds is None else monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds that are left, negative afterwards; None if there is no end."""
        return None if self._deadline is None else self._deadline - monotonic()

    @property
    def over(self) -> bool:
        left = self.left
        return left is not None and left <= 0

    def cap(self, seconds: float) -> float:
        """So many seconds, or those that are left."""
        left = self.left
        return seconds if left is None else max(0.0, min(seconds, left))

    def error(self, state: str, seq: int) -> WaitTimeout:
        """The error to raise at the timeout, with the known state of the run."""
        return WaitTimeout(self.run_id, self._seconds or 0, state, seq)


class JournalRetry:
    """The pauses between reads of the journal that fail because Postgres is away."""

    def __init__(self, timeout: Timeout) -> None:
        self._timeout = timeout
        self._backoff = Backoff(initial=0.1, cap=2.0)
        self._failures = 0

    def delay(self, error: Exception, seq: int) -> float:
        """Seconds until the next read. Raises WaitTimeout if the stream's time is over by then."""
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        logger.warning(
            "journal cannot be read, stream waits",
            extra={
                "action": "stream_waits",
                "run_id": self._timeout.run_id,
                "reason": first_line(error),
            },
        )
        left = self._timeout.left
        if left is not None and left <= delay:
            raise self._timeout.error("unknown", seq) from error
        return delay

    def succeeded(self) -> None:
        """A read has succeeded: the next failure is the first again."""
        self._failures = 0
