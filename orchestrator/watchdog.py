"""Ends attempts of steps in time, also of bodies that hang. Decides nothing about the outcome."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import psycopg

from beatless.orchestrator.errors import LeaseLost, RunCancelled, WorkerStops
from beatless.orchestrator.lease import Connection, Lease, Leases
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

INTERRUPT_GRACE_S = 1.0
"""Seconds that a body has to leave by itself after it was interrupted."""

CANCEL_CHECK_INTERVAL_S = 0.5
"""Seconds between two checks for a cancel, while a step runs that a cancel shall end."""

STUCK_AFTER_S = 10.0
"""Seconds after which a process ends in which even the watchdog's thread cannot run."""

NEVER = float("inf")

HANDLED = (signal.SIGALRM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""The signals by which a worker and its watchdog end a body: their handlers are not a body's."""

RETRY_INTERVAL_S = 1.0
"""Seconds until the next try to record an end, while Postgres is away."""


class Task(Protocol):
    """A body that runs in an event loop."""

    def cancel(self) -> None:
        """Have it cancelled; called from another thread."""

    def stack(self) -> list[str]:
        """The lines of code at which it stands, the outermost first."""


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """One call of a step's body, and the run's outcome if it must be ended."""

    lease: Lease
    ends_at: float | None
    """By the monotonic clock."""
    late: Exception | None
    """The reason for ending it then."""
    terminate_on_cancel: bool
    interruptible: bool
    """An exception may be raised anywhere in the body: not within a transaction."""
    settle: Callable[[Connection, Exception], bool]
    """Commit the end of the attempt under its lease; False if the lease is gone.

    Raises psycopg.errors.LockNotAvailable, soon, if another transaction holds the run's row.
    """
    thread: int = 0
    """Of the call."""
    task: Task | None = None
    """The body, if it is async: it is cancelled instead of interrupted."""
    taken_s: float = 0.0
    """Seconds that the body took, without our own work around it: among many threads that takes
    longer than the body."""
    reason: Exception | None = None
    inside: bool = False
    interrupted: bool = False
    over: bool = False
    fenced: bool = False
    row_locked: bool = False
    """Another transaction held the run's row when its end was to be committed."""
    check_at: float = 0.0
    """When to check for a cancel next, by the monotonic clock."""
    force_at: float | None = None
    """When to end the attempt by force; None before it was interrupted, and after its end."""
    mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def watched(self) -> bool:
        return self.ends_at is not None or self.terminate_on_cancel

    def runs_as(self, task: Task) -> None:
        """The body is this task from now on."""
        with self.mutex:
            self.task = task
            if self.reason is not None:
                task.cancel()

    def stack(self) -> list[str]:
        """The last lines of code at which the body stands."""
        if self.task is not None:
            return self.task.stack()[-3:]
        frame = sys._current_frames().get(self.thread)
        return [] if frame is None else traceback.format_stack(frame)[-3:]


class Watchdog:
    """A thread that ends attempts that are late, or cancelled and marked for it.

    1. sleep until an attempt is late, or until it is time to check for a cancel
    2. in a process of its own: raise an exception in the body, which may clean up for a second;
       an async body's task is cancelled, in any process, and may do the same
    3. commit the end of the attempt under its lease: from then on the body can write nothing
    4. in a process of its own: end the process. A thread cannot be ended; it goes on, fenced

    `stop_all` ends every attempt in the same way, watched or not: the worker's grace has ended.

    In a process of its own a body leaves neither timers (`signal.alarm`, faulthandler's) nor
    handlers of these signals to the next one, which they would end.

    A body that holds the interpreter's lock for ever ends its process too, by a timer in C; that
    attempt counts as a crash.
    """

    def __init__(
        self,
        leases: Leases,
        connect: Callable[[], Connection],
        *,
        own_process: bool,
        observer: Observer = ignore,
    ) -> None:
        """`own_process`: nothing else runs in this process, so it may be ended."""
        self._leases = leases
        self._connect = connect
        self._own_process = own_process
        self._attempts: list[Attempt] = []
        self._changed = threading.Condition()
        self._observer = observer
        self._thread: LastingThread | None = None
        self._stopping = False
        self._ending = False
        self._connection: Connection | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        """Those of signals in this process, before the first body."""

    def call(self, attempt: Attempt, body: Callable[[], Any]) -> Any:
        """Call the body and return its result.

        Raises its exception, the reason if it was interrupted, and LeaseLost if its end has
        already been committed.
        """
        outcome: Any = None
        error: BaseException | None = None
        alone = self._begin(attempt)
        try:
            try:
                attempt.inside = True
                outcome = body()
            finally:
                attempt.inside = False  # from here on no exception strikes
        except BaseException as raised:
            error = raised
        finally:
            self._end(attempt, alone=alone)
        if attempt.fenced:
            raise LeaseLost(attempt.lease.run.run_id, attempt.lease.token) from error
        if attempt.reason is not None and error is not attempt.reason:
            raise attempt.reason from error
        if error is not None:
            raise error
        return outcome

    def stop_all(self) -> None:
        """End every attempt now, because its worker stops; its run is given back."""
        with self._changed:
            self._ending = True
            attempts = [attempt for attempt in self._attempts if attempt.reason is None]
        for attempt in attempts:
            try:
                self._interrupt(attempt, WorkerStops(attempt.lease.run.run_id))
            except Exception as error:  # the others end all the same
                self._postpone(attempt, error)
        with self._changed:
            self._wake()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def _begin(self, attempt: Attempt) -> bool:
        """Have the attempt watched; whether signals of this process are handled in its thread."""
        attempt.thread = threading.get_ident()
        if attempt.watched or self._ending:
            with self._changed:
                self._wake()  # before anything else: it may be that no thread can be started
        alone = self._own_process and threading.current_thread() is threading.main_thread()
        if alone and not self._handlers:
            self._handlers = {each: signal.getsignal(each) for each in HANDLED}
        attempt.interruptible &= alone
        if attempt.interruptible:

            def interrupt(_number: int, _frame: Any) -> None:
                if attempt.reason is not None and attempt.inside and not attempt.interrupted:
                    attempt.interrupted = True
                    raise attempt.reason

            signal.signal(signal.SIGALRM, interrupt)
        if self._own_process and attempt.ends_at is not None:
            left = max(0.0, attempt.ends_at - monotonic())
            faulthandler.dump_traceback_later(
                left + INTERRUPT_GRACE_S + STUCK_AFTER_S, exit=True, file=2
            )
        attempt.check_at = monotonic() + CANCEL_CHECK_INTERVAL_S
        with self._changed:
            self._attempts.append(attempt)
            if self._ending:
                attempt.reason, attempt.force_at = (
                    WorkerStops(attempt.lease.run.run_id),
                    monotonic(),
                )
            if self._thread is not None and (attempt.watched or self._ending):
                self._changed.notify()
        return alone

    def _wake(self) -> None:
        if self._thread is None:
            thread = LastingThread("watchdog", self._run, observer=self._observer)
            thread.start()
            self._thread = thread  # one that could not be started is started with the next
        else:
            self._changed.notify()

    def _end(self, attempt: Attempt, *, alone: bool) -> None:
        if alone:
            signal.setitimer(signal.ITIMER_REAL, 0)  # one of the body's would end the process later
        with attempt.mutex:  # waits for an end that is just being committed
            attempt.over = True
        with self._changed:
            self._attempts.remove(attempt)
        if alone or (self._own_process and attempt.ends_at is not None):
            faulthandler.cancel_dump_traceback_later()  # or one of the body's
        for number, handler in self._handlers.items() if alone else ():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler or signal.SIG_DFL)

    def _run(self, thread: LastingThread) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    break
                due = min((_due(attempt) for attempt in self._attempts), default=NEVER)
                if not self._attempts:
                    thread.works()
                if due > monotonic():
                    self._changed.wait(None if due == NEVER else due - monotonic())
                    continue
                late = [attempt for attempt in self._attempts if _due(attempt) <= monotonic()]
            # Those whose rows were held the last time have cost time already.
            late.sort(key=lambda attempt: attempt.row_locked)
            for attempt in late:
                try:
                    self._attend(attempt)
                    thread.works()
                except Exception as error:
                    thread.failed()
                    self._postpone(attempt, error)
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def _attend(self, attempt: Attempt) -> None:
        now = monotonic()
        if attempt.reason is None:
            if attempt.late is not None and attempt.ends_at is not None and attempt.ends_at <= now:
                self._interrupt(attempt, attempt.late)
            else:
                attempt.check_at = now + CANCEL_CHECK_INTERVAL_S
                self._leases.inspect(self._connected(), attempt.lease, 0)
                if attempt.lease.cancelled:
                    self._interrupt(attempt, RunCancelled(attempt.lease.run.run_id))
        elif attempt.force_at is not None and attempt.force_at <= now:
            self._force(attempt, attempt.reason)

    def _interrupt(self, attempt: Attempt, reason: Exception) -> None:
        with attempt.mutex:
            if attempt.over:
                return  # its outcome stands, and no code expects the signal any more
            attempt.reason = reason
            attempt.force_at = monotonic()
            if attempt.task is not None:
                attempt.force_at += INTERRUPT_GRACE_S
                attempt.task.cancel()
            elif attempt.interruptible:
                attempt.force_at += INTERRUPT_GRACE_S
                signal.pthread_kill(attempt.thread, signal.SIGALRM)

    def _force(self, attempt: Attempt, reason: Exception) -> None:
        with attempt.mutex:
            if attempt.over:
                return
            if not attempt.row_locked:
                reason.add_note("it was here:\n" + "".join(attempt.stack()))
            attempt.settle(self._connected(), reason)
            attempt.fenced = attempt.lease.lost = True
            attempt.force_at = None
            logger.warning(
                "step ended by force",
                extra={
                    "action": "step_ended",
                    "run_id": attempt.lease.run.run_id,
                    "reason": str(reason),
                    "process_ends": self._own_process,
                },
            )
            self._end_process()

    def _postpone(self, attempt: Attempt, error: Exception) -> None:
        """The write failed. The process ends all the same: its lease runs out.

        Not while another transaction holds the row: then the write is tried again a little later.
        """
        attempt.row_locked = isinstance(error, psycopg.errors.LockNotAvailable)
        logger.warning(
            "watchdog could not write, will retry",
            extra={
                "action": "watchdog_failed",
                "run_id": attempt.lease.run.run_id,
                "reason": str(error),
            },
            exc_info=None if isinstance(error, psycopg.Error) else error,
        )
        if self._connection is not None and not attempt.row_locked:
            self._connection.close()
        attempt.check_at = monotonic() + RETRY_INTERVAL_S
        if attempt.force_at is not None:
            attempt.force_at = monotonic() + RETRY_INTERVAL_S
            if attempt.row_locked:
                return
            with attempt.mutex:
                if not attempt.over:
                    self._end_process()

    def _end_process(self) -> None:
        if self._own_process:
            os.kill(os.getpid(), signal.SIGKILL)


def no_limit(_attempt: Attempt, body: Callable[[], Any]) -> Any:
    """The time limit of an executor that cannot end a step: none."""
    return body()


def _due(attempt: Attempt) -> float:
    """The time at which the watchdog must check an attempt again."""
    if attempt.reason is not None:
        return NEVER if attempt.force_at is None else attempt.force_at
    ends = NEVER if attempt.ends_at is None else attempt.ends_at
    return min(ends, attempt.check_at) if attempt.terminate_on_cancel else ends
