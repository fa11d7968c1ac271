"""Threads of ours that last as long as their process, through any error."""

import logging
import threading
from collections.abc import Callable

from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import Observer, ThreadFailed, ThreadRecovered, ignore

logger = logging.getLogger(__name__)

AGAIN_S = 1.0
"""The pause of a thread after an unexpected error."""


class LastingThread(threading.Thread):
    """Does its work until it returns, or again after anything that it raises.

    The work is given the thread, and reports errors that it survives: `failed`, then `works`.
    The observer hears of each failure (`ThreadFailed`), and when it is over (`ThreadRecovered`).
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
            except BaseException:  # an unrequested end would go unnoticed
                logger.critical(
                    "a thread failed, it begins again",
                    extra={"action": "thread_failed", "which": self._what, "retry_in": AGAIN_S},
                    exc_info=True,
                )
                self.failed()
            if self._ending.wait(AGAIN_S):
                return

    def failed(self) -> None:
        """Something went wrong, and the thread goes on."""
        first, self.failing = not self.failing, True
        self._observer(ThreadFailed(thread=self._what, first=first))

    def works(self) -> None:
        """It works again."""
        if self.failing:
            self.failing = False
            self._observer(ThreadRecovered(thread=self._what))

    def end(self, timeout: float | None = None) -> None:
        """Wait for its end; its work was asked to stop before."""
        self._ending.set()
        self.join(timeout)
