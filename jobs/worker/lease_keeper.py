"""A process beside a worker: it keeps leases of busy processes, and ends those of dead ones."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, NoReturn, Self

from celery import bootsteps, platforms

from beatless.observe.counters import WorkerCounters
from beatless.observe.counts import MAX_PROCESSES
from beatless.orchestrator.board import Board
from beatless.orchestrator.death_watch import DeathWatch
from beatless.orchestrator.fleet_watch import FleetWatch
from beatless.orchestrator.keeper import Keeper
from beatless.orchestrator.lease import Connection, Leases
from beatless.orchestrator.roster import Roster
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.lease_keeper")

ENDS_WITH_THE_WORKER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals to all processes of a worker are for the main one, which has its leases still."""

PLACE = MAX_PROCESSES - 2
"""The place of the keeper in the counts of the worker; the last one is the main process's."""


class LeaseKeeper(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Runs a `DeathWatch` with its `Keeper` in a process that is forked before anything has begun.

    It outlives every other process of the worker, and leads a session of its own: what is sent to
    the worker's group does not end it. A worker that is embedded in a thread of another program
    forks nothing: there a thread keeps leases, and those of the dead end by their time.
    """

    requires = frozenset({"celery.worker.components:Timer"})
    keeper: ClassVar[partial[Keeper]]
    watch: ClassVar[partial[DeathWatch]]
    fleet: ClassVar[partial[FleetWatch] | None]
    roster: ClassVar[Roster]
    counts: ClassVar[WorkerCounters]

    @classmethod
    def of(
        cls,
        board: Board,
        roster: Roster,
        leases: Leases,
        connect: Callable[[], Connection],
        counts: WorkerCounters,
        *,
        fleet: partial[FleetWatch] | None,
    ) -> type[Self]:
        """The step of one app: Celery takes classes. `fleet` makes what watches over others."""
        parts = (board, leases, connect)
        return type(
            cls.__name__,
            (cls,),
            {
                "keeper": partial(Keeper, *parts),
                "watch": partial(DeathWatch, *parts, roster=roster, observer=counts),
                "fleet": fleet,
                "roster": roster,
                "counts": counts,
            },
        )

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._stopping = threading.Event()
        self._child: int | None = None
        # One that is embedded in a test has another's process.
        if threading.current_thread() is threading.main_thread():
            self._fork()

    def start(self, _worker: Any) -> None:
        run = self.keeper(self._stopping).run if self._child is None else self._await_end
        LastingThread("keeper", run, observer=self.counts).start()

    def _await_end(self, thread: LastingThread) -> None:
        """Notice that the process has ended: no other one can be forked safely."""
        if (child := self._child) is None:
            return
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        if not self._stopping.is_set():
            thread.failed()
            logger.error(
                "the process that keeps leases has ended: restart this worker",
                extra={"action": "keeper_ended"},
            )

    def stop(self, _worker: Any) -> None:
        self._stopping.set()
        if self._child is not None:
            pid, self._child = self._child, None
            self.roster.end()
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    terminate = stop

    def _fork(self) -> None:
        self.roster.prepare()
        main = os.getpid()
        pid = os.fork()
        if pid:
            self._child = pid
        else:
            self._keep(main)

    def _keep(self, main: int) -> NoReturn:
        """In the process that was forked."""
        try:
            os.setsid()
            for number in ENDS_WITH_THE_WORKER:
                signal.signal(number, signal.SIG_IGN)
            self.counts.counts.take(PLACE)
            fleet = self.fleet and self.fleet(worker=self.roster.worker, observer=self.counts)
            self.watch(keeper=self.keeper(self._stopping), main=_death_of(main), fleet=fleet).run()
            os._exit(0)
        except BaseException:
            logger.critical(
                "the process that keeps leases fails",
                extra={"action": "keeper_failed"},
                exc_info=True,
            )
        finally:
            os._exit(1)


def _death_of(main: int) -> int:
    """A descriptor that is readable once the main process, which has forked this one, has died."""
    try:
        descriptor = os.pidfd_open(main)
    except (AttributeError, OSError) as error:
        # A descriptor that never becomes readable: then this process ends with the other.
        platforms.set_pdeathsig("SIGKILL")
        descriptor, _ = os.pipe()
        logger.warning(
            "the system has no pidfds: runs of dead processes go on when their leases run out",
            extra={"action": "no_pidfd", "reason": str(error)},
        )
    if os.getppid() != main:  # it has died already, and another may have its pid
        os._exit(0)
    return descriptor
