"""A thread that has many calls in hand: each is a greenlet, which waits while others go on.

So the work on hundreds of runs, each with its body elsewhere, needs one thread and one connection.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.orchestrator.executor")

T = TypeVar("T")


class SwitchThread:
    """The thread. `wait` is for its calls, the rest for any thread.

    1. let each call go on that may: one that is new, or whose future is done
    2. when none may, call `when_idle`, which may have more of them go on
    3. sleep until one may, or for as long as `when_idle` has said
    """

    def __init__(
        self, when_idle: Callable[[], float | None], *, observer: Observer = ignore
    ) -> None:
        """`when_idle` returns the seconds until it is to be called again; None: no need."""
        self._when_idle = when_idle
        self._ready: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._hub: greenlet | None = None
        self.calls = 0
        """Those that have begun and not ended."""
        self._closing = threading.Event()
        self._thread = LastingThread("runs", self._run, observer=observer)

    def start(self) -> None:
        self._thread.start()

    def spawn(self, call: Callable[[], Any]) -> None:
        """Make a call in a greenlet of its own, in a copy of the context of this thread."""
        context = copy_context()

        def begin() -> None:
            made = greenlet(self._call)
            made.gr_context = context
            made.switch(call)

        self._ready.put(begin)

    def wait(self, future: Future[T]) -> T:
        """The result of a future. Other calls go on meanwhile."""
        current = getcurrent()
        assert self._hub is not None  # noqa: S101 - one of its calls waits
        future.add_done_callback(lambda _: self._ready.put(current.switch))
        while not future.done():
            self._hub.switch()
        return future.result()

    def stop(self) -> None:
        """Return when all calls have ended."""
        self._closing.set()
        self._ready.put(lambda: None)
        self._thread.end()

    def _call(self, call: Callable[[], Any]) -> None:
        self.calls += 1
        try:
            call()
        except Exception:  # this one's alone: the others go on
            logger.exception("a call failed", extra={"action": "call_failed"})
        finally:
            self.calls -= 1

    def _run(self, thread: LastingThread) -> None:
        self._hub = getcurrent()
        while self.calls or not self._ready.empty() or not self._closing.is_set():
            patience: float | None = None
            if self._ready.empty():
                patience = self._when_idle()
            try:
                go_on = self._ready.get(timeout=patience)
            except queue.Empty:
                continue
            go_on()
            thread.works()
