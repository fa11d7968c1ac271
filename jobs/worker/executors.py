"""The executors inside of a worker's processes, with their heartbeat and watchdog."""

import gc
import multiprocessing
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import sqlalchemy
from billiard.process import current_process

from beatless import postgres
from beatless.observe.counters import WorkerCounters
from beatless.orchestrator.board import SLOTS, Board, slots_of
from beatless.orchestrator.concurrent import FURTHER_RUNS, ConcurrentExecutor
from beatless.orchestrator.executor import Executor
from beatless.orchestrator.fleet_watch import WORKER
from beatless.orchestrator.group import GroupExecutor, GroupGuard, uncollected
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Leases
from beatless.orchestrator.loop_thread import END_S, LoopThread
from beatless.orchestrator.output_thread import OutputThread
from beatless.orchestrator.pace import Pace
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.roster import Roster
from beatless.orchestrator.run_report import ShownError
from beatless.orchestrator.scope import Scope, no_scope
from beatless.orchestrator.step_transaction import Transactions
from beatless.orchestrator.turnstile import Turnstile
from beatless.orchestrator.watchdog import Watchdog
from beatless.outbox import forks
from beatless.outbox.faults import CrashPoints
from beatless.outbox.observer import Observer, fan_out
from beatless.outbox.threads import LastingThread
from beatless.settings import Settings
from beatless.worker.shutdown import Draining, is_exiting

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

E = TypeVar("E", bound=Executor)


class Executors:
    """Gives each thread of each worker process its executor, opened after fork."""

    def __init__(
        self,
        *,
        settings: Settings,
        journal: Journal,
        leases: Leases,
        engine: sqlalchemy.Engine,
        new_async_engine: Callable[[], "AsyncEngine"],
        faults: CrashPoints,
        counts: WorkerCounters,
        scope: Scope = no_scope,
        observer: Observer | None = None,
        on_process: Callable[[], None] | None = None,
        shown_error: ShownError | None = None,
        plans: Mapping[str, Plan],
    ) -> None:
        """`engine` is for transactional steps; `new_async_engine` makes one for async ones.

        Runs of `plans` may be children, and in groups.

        `on_process` is called in each process that Celery executes runs in, before the first.
        """
        self._observer = fan_out(counts, observer)
        self._on_process = on_process
        self._shown_error = shown_error
        self.counts = counts
        self._scope = scope
        self._settings = settings
        self._journal = journal
        self._leases = leases
        self._engine = engine
        self._new_async_engine = new_async_engine
        self._async_engine: AsyncEngine | None = None
        self._faults = faults
        self.plans = plans
        self.max_group_runs = settings.worker_group_runs
        self.goes_on = True
        """Whether the task of a message also executes runs that the end of its run has claimed."""
        self.places = 1
        """How many messages this worker executes at once, in all of its processes."""
        self._mutex = threading.Lock()
        self._pid = 0
        self._worker = ""
        self._slots = 1
        self._pool_child = False
        self._threads = threading.local()
        self._heartbeat: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._guard: GroupGuard | None = None
        self._outputs = self._new_outputs()
        self._concurrent: ConcurrentExecutor | None = None
        self._pace = Pace()
        self._turnstile = Turnstile()
        self._loop = LoopThread(observer=counts)
        self._closed = threading.Event()
        self.draining = Draining()
        self.board = Board()
        self.roster = Roster()
        forks.watch(self)

    def after_fork(self) -> None:
        # Its threads are in the parent, and one of them may have held the lock.
        self._mutex = threading.Lock()
        self._threads = threading.local()
        self._turnstile = Turnstile()
        self._closed = threading.Event()
        self._outputs = self._new_outputs()
        self._heartbeat = self._watchdog = self._guard = self._concurrent = None
        self._async_engine = None
        self._pid = 0

    def _new_outputs(self) -> OutputThread:
        return OutputThread(GroupCommit(self._journal.schema), observer=self.counts)

    def __call__(self) -> GroupExecutor | ConcurrentExecutor:
        self._enter_process()
        if self._concurrent is not None:
            return self._concurrent
        found: GroupExecutor | None = getattr(self._threads, "executor", None)
        if found is None:
            found = self._threads.executor = self.new_group_executor()
        return found

    def begin_concurrent(self) -> ConcurrentExecutor:
        """Have one executor for all threads of this process, which executes many runs at once."""
        self._enter_process()
        self._concurrent = self._made(
            ConcurrentExecutor, further_runs=min(FURTHER_RUNS, self.max_group_runs - 1)
        )
        return self._concurrent

    def _enter_process(self) -> None:
        with self._mutex:
            if self._pid != os.getpid():
                self._begin()
                if self._on_process is not None:
                    self._on_process()

    def _begin(self) -> None:
        self._threads = threading.local()
        # Only a child of the prefork pool has nothing but its run to lose.
        pool_child = self._pool_child = current_process().name != "MainProcess"
        place = getattr(current_process(), "index", 0)
        self.counts.counts.take(place)
        if pool_child:
            allow_processes()
            gc.freeze()  # what was imported stays: no collection looks at it again
        slots = slots_of(place) if pool_child else range(SLOTS)
        self._slots = len(slots)
        self._heartbeat = Heartbeat(
            self._leases,
            self.connect,
            board=self.board,
            slots=slots,
            life=self.roster.announce(),
            observer=self.counts,
        )
        self._watchdog = Watchdog(
            self._leases, self.connect, own_process=pool_child, observer=self.counts
        )
        self._guard = GroupGuard(self.connect, observer=self.counts)
        if self.draining.prepared:
            end = partial(self._end_of_grace, self._watchdog)
            LastingThread("grace", end, observer=self.counts).start()
        # Never the host name alone: a restarted container has the name of the one that died.
        suffix = self.roster.worker or secrets.token_hex(4)
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{suffix}"
        self._pid = os.getpid()

    def _end_of_grace(self, watchdog: Watchdog, _thread: LastingThread) -> None:
        self.draining.announced()
        # A process whose runs all end before has ended with them.
        if not self._closed.wait(self._settings.grace_seconds):
            watchdog.stop_all()

    def new(self, *, observer: Observer | None = None, **options: Any) -> Executor:
        """An executor of its own, for a caller that looks after it."""
        return self._made(Executor, observer=observer, **options)

    def _made(self, kind: type[E], *, observer: Observer | None = None, **options: Any) -> E:
        if self._heartbeat is None:
            self._begin()
        assert self._heartbeat is not None  # noqa: S101 - set by _begin
        assert self._watchdog is not None  # noqa: S101 - set by _begin
        return kind(
            journal=self._journal,
            leases=self._leases,
            connect=self.connect,
            transactions=Transactions(self._engine, self._engine_of_loop, self._loop),
            heartbeat=self._heartbeat,
            outputs=self._outputs,
            worker=self._worker,
            plans=self.plans,
            stopping=self.draining,
            leaving=is_exiting,
            limit=self._watchdog.call,
            faults=self._faults,
            observer=fan_out(self._observer, observer),
            scope=self._scope,
            shown_error=self._shown_error,
            redispatch_s=self._settings.redispatch_seconds,
            pace=self._pace,
            loop=self._loop,
            **options,
        )

    def new_group_executor(self, *, observer: Observer | None = None) -> GroupExecutor:
        """The same, for a caller that lets runs be claimed that wait beside that of a message."""
        executor = self.new(observer=observer)
        assert self._guard is not None  # noqa: S101 - set by _begin
        return GroupExecutor(
            executor,
            self.plans,
            max_runs=min(self.max_group_runs, self._slots),
            goes_on=self.goes_on,
            places=self.places,
            guard=self._guard,
            turnstile=self._turnstile,
            # Where other threads have bodies meanwhile, the collector works for them.
            own_work=uncollected if self._pool_child else nullcontext,
        )

    def close(self) -> None:
        """Stop this process's threads. Its executors close their own connections."""
        self._closed.set()
        if self._heartbeat is not None and self._pid == os.getpid():
            self._heartbeat.stop()
        if self._watchdog is not None and self._pid == os.getpid():
            self._watchdog.stop()
        if self._guard is not None and self._pid == os.getpid():
            self._guard.stop()
        self._leave_loop()
        if self._pid == os.getpid():
            self._outputs.stop()

    def _engine_of_loop(self) -> "AsyncEngine":
        with self._mutex:
            if self._async_engine is None:
                self._async_engine = self._new_async_engine()
            return self._async_engine

    def _leave_loop(self) -> None:
        """Stop the loop, whose connections are closed in it."""
        with self._mutex:
            engine, self._async_engine = self._async_engine, None
        if engine is not None:
            with suppress(TimeoutError):  # a body may block it
                self._loop.submit(engine.dispose).result(END_S)
        self._loop.stop()

    def connect(self) -> psycopg.Connection[Any]:
        """An autocommit connection of a worker."""
        return postgres.connect(self._settings, f"{WORKER}{self.roster.worker}".rstrip())


def allow_processes() -> None:
    """Let bodies in a child of Celery's pool start processes with multiprocessing, in any way.

    The child is a daemon, and its key for connections is of a type of billiard's, which refuses to
    go to a process that multiprocessing spawns.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["daemon"] = False
    config["authkey"] = AuthenticationString(bytes(config["authkey"]))
