"""Shutdown of a worker: its children stop, runs are released, hanging threads are left."""

import logging
import mmap
import os
import threading
from typing import Any, ClassVar, Self

from billiard.common import _should_have_exited
from celery import bootsteps, signals
from celery.worker import state as worker_state

from beatless.orchestrator.board import Board
from beatless.outbox.clock import monotonic
from beatless.outbox.sockets import readable
from beatless.settings import Settings

logger = logging.getLogger("beatless.worker")

HANGING_STEP_S = 5.0
"""After the grace a worker ends within this time, also with a step that hangs."""

HANGING_BROKER_S = 5.0
"""A worker that holds no lease any more ends within this time, also with a broker that hangs."""

LEASES_CHECK_INTERVAL_S = 0.25
"""Between two looks for leases of a worker that stops."""


class Draining(threading.Event):
    """Asks all children of a worker to release their runs at the next boundary.

    One byte of memory shared across fork, and a pipe without a reader for waits in another
    process: nothing that a killed child could leave locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shared = mmap.mmap(-1, 1)
        self._pipe: tuple[int, int] | None = None

    @property
    def prepared(self) -> bool:
        return self._pipe is not None

    def prepare(self) -> None:
        """Before the fork: from now on `announced` can be waited for."""
        if self._pipe is None:
            self._pipe = os.pipe()

    def announced(self) -> None:
        """Return when it is set, in whichever process of this worker."""
        if self._pipe is not None:
            readable([self._pipe[0]], None)

    def set(self) -> None:
        if self._pipe is not None and not self.is_set():
            os.write(self._pipe[1], b"!")
        self._shared[0] = 1
        super().set()

    def is_set(self) -> bool:
        return self._shared[0] == 1

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else monotonic() + timeout
        while not self.is_set() and (deadline is None or monotonic() < deadline):
            left = 0.1 if deadline is None else min(0.1, max(0.0, deadline - monotonic()))
            super().wait(left)
        return self.is_set()


def is_exiting() -> bool:
    """Whether Celery ends this process by an exception in the main thread, perhaps in a body."""
    if threading.current_thread() is not threading.main_thread():
        return False
    told = (worker_state.should_stop, worker_state.should_terminate)
    return _should_have_exited[0] or any(status not in (None, False) for status in told)


class GracefulShutdown(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Ends a worker within its grace: runs are given back, at a boundary or in a step.

    1. asked to stop: children release their runs when the step in flight has ended
    2. after the grace: each process ends its steps, as the watchdog does, and gives the runs back
    3. `HANGING_STEP_S` later, if a thread or a child still hangs: the process ends all the same
    4. or before, `HANGING_BROKER_S` after its last lease, if Celery still takes leave of a broker
       that accepts connections and answers nothing: each of its questions would take 15 s
    """

    requires = frozenset({"celery.worker.components:Timer"})
    draining: ClassVar[Draining]
    board: ClassVar[Board]
    settings: ClassVar[Settings]

    @classmethod
    def of(cls, draining: Draining, board: Board, settings: Settings) -> type[Self]:
        """The step of one app: Celery takes classes."""
        parts = {"draining": draining, "board": board, "settings": settings}
        return type(cls.__name__, (cls,), parts)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.draining.prepare()
        self._worker = worker
        self._ended = threading.Event()
        self._consumer_stopped = threading.Event()

    def start(self, _worker: Any) -> None:
        signals.worker_shutting_down.connect(self._give_back)
        signals.worker_shutdown.connect(self._end)

    def stop(self, _worker: Any) -> None:
        """Celery's consumer has stopped before: it is the last of a worker's steps."""
        self._consumer_stopped.set()
        signals.worker_shutting_down.disconnect(self._give_back)

    terminate = stop

    def close(self, _worker: Any) -> None:
        """Stopped by a control command, as from Flower: no signal was sent."""
        if threading.current_thread() is threading.main_thread():  # not one embedded in a test
            self._give_back()

    def _give_back(self, **_: Any) -> None:
        if self.draining.is_set():
            return
        self.draining.set()
        logger.info("worker stops, runs are released", extra={"action": "worker_stops"})
        # A daemon: nothing hangs if the process ends before.
        threading.Thread(target=self._bound, name="beatless-shutdown", daemon=True).start()

    def _end(self, sender: Any, **_: Any) -> None:
        """Nothing hung: a caller that ran the worker in its own process continues."""
        if sender is self._worker:
            self._ended.set()

    def _bound(self) -> None:
        try:
            if not self.hangs():
                return
        except BaseException:
            os._exit(1)  # the process must not outlive what bounds it
        os._exit(0)  # a hanging step is fenced, or its lease runs out

    def hangs(self) -> bool:
        """True when the process must end now, False once it ends by itself."""
        last = monotonic() + self.settings.grace_seconds + HANGING_STEP_S
        idle_since = monotonic()
        while not self._ended.wait(LEASES_CHECK_INTERVAL_S):
            now = monotonic()
            if now >= last:
                logger.warning("worker ends: a step still hangs", extra={"action": "worker_ends"})
                return True
            if self._consumer_stopped.is_set() or any(True for _ in self.board.read()):
                idle_since = now
            elif now - idle_since >= HANGING_BROKER_S:
                logger.warning(
                    "worker ends: its broker does not answer, and it holds no lease",
                    extra={"action": "worker_ends"},
                )
                return True
        return False
