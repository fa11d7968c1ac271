"""Spaces the calls of a publisher that fails. Makes no call and waits for nothing itself."""

import logging

from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import BatchFailed, Observer, PublisherName

logger = logging.getLogger(__name__)


class CircuitBreaker:
    """One publisher and its back-off: the other publisher is called while this one rests."""

    def __init__(self, name: PublisherName, backoff: Backoff, observer: Observer) -> None:
        self.name = name
        self.failures = 0
        """In a row."""
        self._backoff = backoff
        self._observer = observer
        self._retry_at = 0.0

    @property
    def allows_call(self) -> bool:
        """Whether the publisher has not failed, or its back-off is over."""
        return monotonic() >= self._retry_at

    @property
    def retry_in_s(self) -> float:
        """Seconds until the next call is allowed."""
        return max(0.0, self._retry_at - monotonic())

    def allow_now(self) -> None:
        """End the back-off: another publisher's success shows that the server may be back."""
        self._retry_at = 0.0

    def record_success(self) -> bool:
        """Note a success; True if it ended a series of failures, which is logged."""
        failures, self.failures, self._retry_at = self.failures, 0, 0.0
        if failures:
            logger.info(
                "publishes again",
                extra={
                    "action": "publish_recovered",
                    "publisher": self.name,
                    "failures": failures,
                },
            )
        return failures > 0

    def record_failure(self, error: Exception) -> None:
        """Note a failure, log it, and allow no call until the back-off is over."""
        self.failures += 1
        delay = self._backoff.delay(self.failures)
        self._retry_at = monotonic() + delay
        self._observer(BatchFailed(publisher=self.name, failures=self.failures))
        logger.warning(
            "publish failed, will retry",
            extra={
                "action": "publish_failed",
                "publisher": self.name,
                "retry_in": delay,
                "reason": str(error),
            },
            # The same line every two seconds would bury the others in the log.
            exc_info=error if self.failures == 1 else None,
        )
