"""Reconnects of a worker to its broker: their causes and pauses."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self

from celery import bootsteps
from celery.worker import state as worker_state

from beatless.outbox.backoff import BACKOFF_CAP_S, BACKOFF_RESET_S, Backoff
from beatless.outbox.clock import monotonic
from beatless.worker.shutdown import Draining

logger = logging.getLogger("beatless.worker")

SHUTDOWN_CHECK_INTERVAL_S = 0.25
"""Between two looks, while a worker waits, whether it is to end."""

UNREADABLE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""Raised by kombu for anything in the broker's list that it did not write."""


class UnreadableMessages(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Reconnects after an unreadable message, as after a lost connection: it must end no worker.

    It is out of the list already when kombu raises. Active runs continue.
    """

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.connection_errors = (*parent.connection_errors, *UNREADABLE_ERRORS)


CONNECTION_ERROR_HOOKS = (
    "on_connection_error_before_connected",
    "on_connection_error_after_connected",
)
"""The hook that Celery's consumer calls before it reconnects."""


class ReconnectBackoff(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """The pauses of a worker between attempts to reach its broker: those of a relay.

    Celery lets up to 30 s pass before it notices that a broker is back. And it has no back-off from
    one that accepts the connection and then refuses, as a read-only replica does.
    """

    draining: ClassVar[Draining]

    @classmethod
    def of(cls, draining: Draining) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"draining": draining})

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._backoff = Backoff(cap=BACKOFF_CAP_S)
        self._failures = 0
        self._connected_at = monotonic()
        self._connect = parent.ensure_connected
        parent.ensure_connected = self.connect
        for name in CONNECTION_ERROR_HOOKS:
            setattr(parent, name, partial(self.lost, getattr(parent, name)))

    def connect(self, connection: Any) -> Any:
        """In the place of the consumer's `ensure_connected`."""
        connection.ensure_connection = partial(
            connection.ensure_connection,
            interval_start=1,
            interval_step=1,
            interval_max=BACKOFF_CAP_S,
        )
        connected = self._connect(connection)
        self._connected_at = monotonic()
        return connected

    def lost(self, tell: Callable[[Exception], None], error: Exception) -> None:
        """In the place of the consumer's `CONNECTION_ERROR_HOOKS`, of which `tell` is one."""
        tell(error)
        delay = self.delay(error, monotonic() - self._connected_at)
        if self._failures > 1:
            logger.warning(
                "the broker accepts connections and ends them, will retry",
                extra={"action": "broker_refuses", "retry_in": delay, "reason": str(error)},
            )
        until = monotonic() + delay
        while (left := until - monotonic()) > 0:
            worker_state.maybe_shutdown()
            if self.draining.wait(min(left, SHUTDOWN_CHECK_INTERVAL_S)):
                return

    def delay(self, error: Exception, lasted: float) -> float:
        """Seconds until the next try after a connection that lasted for so many."""
        if isinstance(error, UNREADABLE_ERRORS) or lasted > BACKOFF_RESET_S:
            self._failures = 0
        if isinstance(error, UNREADABLE_ERRORS):
            return 0.0  # it is out of the list: the next message is another one
        self._failures += 1
        return self._backoff.delay(self._failures)
