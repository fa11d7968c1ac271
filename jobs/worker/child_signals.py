"""Children of a prefork worker leave the signals that end a worker to its main process.

dumb-init, supervisor's `stopasgroup` and systemd's `KillMode=control-group` send SIGTERM to every
process of the worker. A child that obeyed would end in the middle of its step, without the grace
that the main process gives it.
"""

import mmap
import os
import signal
from types import FrameType
from typing import Any, ClassVar, Self

from billiard.common import _shutdown_cleanup
from celery import bootsteps, signals

LEFT_TO_MAIN_PROCESS = (signal.SIGTERM, signal.SIGHUP)
"""Beside SIGINT, which Celery's children ignore."""

MAX_REMEMBERED_PIDS = 1024

EVERY_CHILD = 1
"""No child has this number."""


class TerminatedChildren:
    """The children that the main process has ended, in memory that they share with it."""

    def __init__(self) -> None:
        self._pids = memoryview(mmap.mmap(-1, MAX_REMEMBERED_PIDS * 8)).cast("Q")
        self._next = 0

    def add(self, pid: int) -> None:
        """By the main process, before it sends a signal to this child."""
        self._pids[self._next % MAX_REMEMBERED_PIDS] = pid
        self._next += 1

    def __contains__(self, pid: int) -> bool:
        return not {pid, EVERY_CHILD}.isdisjoint(self._pids.tolist())


class IgnoredSignal:
    """The handler of a child: does nothing, unless the main process means this child.

    A function and not SIG_IGN, which programs that a step starts would inherit. It is equal to
    SIG_IGN all the same, for so billiard leaves it in its place.
    """

    __hash__ = None  # type: ignore[assignment]  # not needed

    def __init__(self, terminated: TerminatedChildren) -> None:
        self._terminated = terminated
        self._pid = os.getpid()

    def __eq__(self, other: object) -> bool:
        return other is signal.SIG_IGN or other is self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that a step has forked: signals are its own
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._pid in self._terminated:
            _shutdown_cleanup(number, frame)


class ChildSignals(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Has children leave signals to the main process, and marks those meant for them."""

    requires = frozenset({"celery.worker.components:Pool"})
    terminated: ClassVar[TerminatedChildren]

    @classmethod
    def of(cls, terminated: TerminatedChildren) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"terminated": terminated})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._main = os.getpid()
        signals.worker_process_init.connect(self._in_child)

    def start(self, worker: Any) -> None:
        end = getattr(worker.pool, "terminate_job", None)
        if getattr(worker.pool, "uses_semaphore", False) and end is not None:

            def terminate_job(pid: int, signal: Any = None) -> None:
                self.terminated.add(pid)
                end(pid, signal)

            worker.pool.terminate_job = terminate_job

    def stop(self, _worker: Any) -> None:
        signals.worker_process_init.disconnect(self._in_child)

    def terminate(self, worker: Any) -> None:
        self.terminated.add(EVERY_CHILD)
        self.stop(worker)

    def _in_child(self, **_: Any) -> None:
        if os.getpid() == self._main:
            return  # the solo pool reports it in the main process
        for number in LEFT_TO_MAIN_PROCESS:
            signal.signal(number, IgnoredSignal(self.terminated))
