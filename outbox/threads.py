"""Background threads that last as long as their process, whatever goes wrong in them."""

import logging
import threading
from collections.abc import Callable

from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import Observer, ThreadFailed, ThreadRecovered, ignore

logger = logging.getLogger(__name__)

RESTART_S = 1.0
"""How long a thread or task that failed unexpectedly rests before it starts over."""


class LastingThread(threading.Thread):
    """Does its work until it returns, restarted after any error.

    The work receives the thread, and reports to it errors that it handles itself: `failed`, and
    `works` once it succeeds again. The observer receives `ThreadFailed` for each error, and
    `ThreadRecovered`.
    """

    def __init__(
        self, name: str, work: Callable[["LastingThread"], None], *, observer: Observer = ignore
    ) -> None:
        super().__init__(name=f"beatless-{name}", daemon=True)
        self.failing = False
        self._what = name
        self._work = work
        self._observer = observer
        self._ending = threading.Event()

    def run(self) -> None:
        while True:
            try:
                self._work(self)
                return
            except SimulatedCrash:
                raise  # its process "has died"
            except BaseException:  # an unexpected end would go unnoticed
                logger.critical(
                    "a thread failed, it is restarted",
                    extra={"action": "thread_failed", "which": self._what, "retry_in": RESTART_S},
                    exc_info=True,
                )
                self.failed()
            if self._ending.wait(RESTART_S):
                return

    def failed(self) -> None:
        """Report an error after which the thread continues."""
        first, self.failing = not self.failing, True
        self._observer(ThreadFailed(thread=self._what, first=first))

    def works(self) -> None:
        """Report a success."""
        if self.failing:
            self.failing = False
            self._observer(ThreadRecovered(thread=self._what))

    def end(self, timeout: float | None = None) -> None:
        """Wait for its end; its work was asked to stop before."""
        self._ending.set()
        self.join(timeout)
