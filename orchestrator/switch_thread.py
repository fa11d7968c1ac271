"""A thread that has many calls in hand: each is a greenlet, which waits while others go on.

So the work on hundreds of runs, each with its body elsewhere, needs one thread and one connection.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import copy_context
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from beatless.outbox.clock import monotonic
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
        self._acting: greenlet | None = None
        """The call that has the thread."""
        self._names: dict[greenlet, str] = {}
        self._pauses: list[tuple[float, int, Future[None]]] = []
        self._numbers = count()
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
            self._acting = None
            self._hub.switch()
        self._acting = current
        return future.result()

    def wait_for(self, future: Future[Any], seconds: float | None) -> None:
        """Return when a future is done, or after so many seconds. Other calls go on meanwhile."""
        either: Future[None] = Future()

        def ring(_done: Future[Any]) -> None:
            with suppress(InvalidStateError):  # the other one was first
                either.set_result(None)

        future.add_done_callback(ring)
        if seconds is None:
            self.wait(either)
            return
        alarm: Future[None] = Future()
        alarm.add_done_callback(ring)
        pause = (monotonic() + seconds, next(self._numbers), alarm)
        heappush(self._pauses, pause)
        self.wait(either)
        if not alarm.done():  # else it would be kept for as long: for days, perhaps
            self._pauses.remove(pause)
            heapify(self._pauses)

    def pause(self, seconds: float) -> None:
        """Wait for so long. Other calls go on meanwhile."""
        future: Future[None] = Future()
        heappush(self._pauses, (monotonic() + seconds, next(self._numbers), future))
        self.wait(future)

    def name(self, name: str) -> None:
        """Name the call that this one is made in, for `acting`."""
        if self._acting is not None:
            self._names[self._acting] = name

    @property
    def acting(self) -> str:
        """The name of the call that has the thread now; from any thread."""
        call = self._acting
        return "" if call is None else self._names.get(call, "")

    @property
    def thread(self) -> int | None:
        """The thread's identity."""
        return self._thread.ident

    def soon(self, act: Callable[[], Any]) -> None:
        """Have the thread do this between two calls; from any thread."""
        self._ready.put(act)

    def stop(self) -> None:
        """Return when all calls have ended."""
        self._closing.set()
        self.soon(lambda: None)
        self._thread.end()

    def _call(self, call: Callable[[], Any]) -> None:
        self.calls += 1
        self._acting = made = getcurrent()
        try:
            call()
        except Exception:  # this one's alone: the others go on
            logger.exception("a call failed", extra={"action": "call_failed"})
        finally:
            self.calls -= 1
            self._acting = None
            self._names.pop(made, None)

    def _run(self, thread: LastingThread) -> None:
        self._hub = getcurrent()
        while self.calls or not self._ready.empty() or not self._closing.is_set():
            patience: float | None = None
            self._end_pauses()
            if self._ready.empty():
                patience = self._when_idle()
            if self._pauses:
                left = max(0.0, self._pauses[0][0] - monotonic())
                patience = left if patience is None else min(left, patience)
            try:
                go_on = self._ready.get(timeout=patience)
            except queue.Empty:
                continue
            go_on()
            thread.works()

    def _end_pauses(self) -> None:
        while self._pauses and self._pauses[0][0] <= monotonic():
            heappop(self._pauses)[2].set_result(None)
