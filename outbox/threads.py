"""Background threads that last as long as their process, whatever goes wrong in them."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import Observer, ThreadFailed, ThreadRecovered, ignore

logger = logging.getLogger(__name__)

T = TypeVar("T")

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


def submitted(pool: Executor, act: Callable[..., T], *arguments: object) -> Future[T]:
    """Have a pool of threads do this; raises RuntimeError if it cannot, and then it never does.

    `submit` leaves what it has no new thread for in the queue of the pool: whoever was told that it
    failed would have it done all the same, by the next thread.
    """
    future: Future[T] = Future()
    try:
        pool.submit(_do, future, act, *arguments)
    except RuntimeError:
        if future.cancel():
            raise
    return future


def _do(future: Future[T], act: Callable[..., T], *arguments: object) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(act(*arguments))
    except BaseException as error:  # of whoever waits for it
        future.set_exception(error)
        del future  # its traceback refers to this frame: no circle for the garbage collector
