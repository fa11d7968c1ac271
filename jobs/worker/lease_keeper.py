"""A process that extends a worker's leases while a body holds the interpreter lock."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Self

from celery import bootsteps, platforms
from celery.concurrency.prefork import TaskPool

from beatless.observe.counters import WorkerCounters
from beatless.orchestrator.board import Board
from beatless.orchestrator.keeper import Keeper, keep_for_parent
from beatless.orchestrator.lease import Connection, Leases
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.lease_keeper")

ENDS_WITH_THE_WORKER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals to the whole process group are for the main one, which has its leases still."""


class LeaseKeeper(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Runs a `Keeper` beside the processes that execute runs.

    In the prefork pool that is a thread of the main process. In the others bodies run in the main
    process itself: there it is a process of its own, forked before anything else has begun.
    """

    requires = frozenset({"celery.worker.components:Timer"})
    make: ClassVar[partial[Keeper]]
    counts: ClassVar[WorkerCounters]

    @classmethod
    def of(
        cls,
        board: Board,
        leases: Leases,
        connect: Callable[[], Connection],
        counts: WorkerCounters,
    ) -> type[Self]:
        """The step of one app: Celery takes classes."""
        make = partial(Keeper, board, leases, connect)
        return type(cls.__name__, (cls,), {"make": make, "counts": counts})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._stopping = threading.Event()
        self._child: tuple[int, int] | None = None
        # One that is embedded in a test has another's process.
        embedded = threading.current_thread() is not threading.main_thread()
        if not issubclass(worker.pool_cls, TaskPool) and not embedded:
            self._fork()

    def start(self, _worker: Any) -> None:
        run = self.make(self._stopping).run if self._child is None else self._watch
        LastingThread("keeper", run, observer=self.counts).start()

    def _watch(self, thread: LastingThread) -> None:
        """Notice that the process has ended: no other one can be forked safely."""
        if (child := self._child) is None:
            return
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, child[0], os.WEXITED | os.WNOWAIT)
        if not self._stopping.is_set():
            thread.failed()
            logger.error(
                "the process that keeps leases has ended: restart this worker",
                extra={"action": "keeper_ended"},
            )

    def stop(self, _worker: Any) -> None:
        self._stopping.set()
        if self._child is not None:
            pid, end = self._child
            self._child = None
            os.close(end)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    terminate = stop

    def _fork(self) -> None:
        end, ours = os.pipe()
        pid = os.fork()
        if pid:
            os.close(end)
            self._child = pid, ours
            return
        os.close(ours)
        platforms.set_pdeathsig("SIGKILL")
        for number in ENDS_WITH_THE_WORKER:
            signal.signal(number, signal.SIG_IGN)
        keep_for_parent(self.make(self._stopping), end)
