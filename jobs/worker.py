"""Celery workers: their configuration, and the executors inside their processes.

The broker holds what waits, the lease holds what runs, Postgres knows both. So messages are
acknowledged early, nothing is prefetched, and whatever the broker loses is sent again.
"""

import logging
import mmap
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self
from wsgiref.simple_server import WSGIServer

import psycopg
import sqlalchemy
from billiard.common import _should_have_exited
from billiard.process import current_process
from celery import Celery, bootsteps, signals
from celery.platforms import isatty
from celery.worker import state as worker_state
from kombu import Queue

from beatless import postgres
from beatless.celery_app import warn_of_foreign
from beatless.errors import BadRequest
from beatless.observe.counters import WorkerCounters
from beatless.observe.logs import Format, enable_own_loggers
from beatless.observe.metrics import Metrics, listen
from beatless.observe.systemd import Supervisor
from beatless.orchestrator.board import SLOTS, Board
from beatless.orchestrator.executor import Executor, Scope, ShownError, no_scope
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Heartbeat, Leases
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.queues import PRESENCE_INTERVAL_S, Presence, QueueStatements
from beatless.orchestrator.watchdog import Watchdog
from beatless.outbox import forks
from beatless.outbox.backoff import BACKOFF_CAP_S, BACKOFF_RESET_S, Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.faults import CrashPoints
from beatless.outbox.observer import Observer, fan_out
from beatless.outbox.publishers import worker_queue
from beatless.outbox.sockets import readable
from beatless.outbox.threads import LastingThread
from beatless.settings import Settings

logger = logging.getLogger(__name__)

REDIS_OPTIONS: dict[str, Any] = {
    # No unacked hash and no visibility timeout: a running task is never delivered a second time.
    "ack_emulation": False,
    "socket_timeout": 15,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "retry_on_timeout": False,
    "priority_steps": [0],
    "client_name": "beatless",
}


def celery_settings(settings: Settings, plans: Iterable[Plan]) -> dict[str, Any]:
    """The configuration of the Celery app; each line avoids a pitfall named in docs/workers.md."""
    broker = settings.redis_broker
    on_redis = broker is not None
    reached: dict[str, Any] = (
        {"broker_url": settings.broker_url} if broker is None else broker.broker()
    )
    # Whoever publishes fails at once and backs off: by default kombu tries for seconds, on RabbitMQ
    # for ever, and the relay's other door would wait with it.
    options: dict[str, Any] = {"max_retries": 0}
    if on_redis:
        options |= {"global_keyprefix": f"{settings.prefix}:", **REDIS_OPTIONS}
        options |= reached["broker_transport_options"]
    names = sorted({"default", *(plan.queue for plan in plans)})
    return {
        **reached,
        "broker_transport_options": options,
        "result_backend": None,
        "task_ignore_result": True,
        "task_acks_late": not on_redis,
        "task_reject_on_worker_lost": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": on_redis,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 5,
        "broker_channel_error_retry": True,
        "broker_pool_limit": 10,
        "task_queues": [worker_queue(settings.prefix, name) for name in names],
        "task_default_queue": f"{settings.prefix}.default",
        "task_default_exchange": f"{settings.prefix}.default",
        "task_default_routing_key": f"{settings.prefix}.default",
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        # Names of our own: the prefix of a Redis broker has no counterpart on other brokers.
        "event_exchange": f"{settings.prefix}.celeryev",
        "event_queue_prefix": f"{settings.prefix}.celeryev",
        "control_exchange": f"{settings.prefix}.control",
        "event_serializer": "json",
        "enable_utc": True,
        "timezone": "UTC",
        "worker_proc_alive_timeout": 60,
        # A killed child keeps its place in the pool so long, for a result that nobody reads here.
        "worker_lost_wait": 0.5,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
    }


FAREWELL = 5.0
"""Seconds after the grace in which a worker ends, whatever hangs in it."""

SHUTDOWN_LOOK_S = 0.25
"""Between two looks, while a worker waits, whether it is to end."""

TOUCH_EVERY = 5.0
"""Seconds between two touches of the ready file."""


def queues_of(settings: Settings, names: Sequence[str]) -> list[Queue]:
    """The broker's queues for our queue names."""
    return [worker_queue(settings.prefix, name) for name in names]


class Draining(threading.Event):
    """Tells all children of a worker to give their runs back at the next boundary.

    One byte of memory shared across fork, and a pipe that nobody reads for who waits in another
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


def leaving() -> bool:
    """Whether Celery ends this process by what it raises in the main thread, perhaps in a body."""
    if threading.current_thread() is not threading.main_thread():
        return False
    told = (worker_state.should_stop, worker_state.should_terminate)
    return _should_have_exited[0] or any(status not in (None, False) for status in told)


class Executors:
    """Gives each thread of each worker process its executor, opened after fork."""

    def __init__(
        self,
        *,
        settings: Settings,
        journal: Journal,
        leases: Leases,
        engine: sqlalchemy.Engine,
        faults: CrashPoints,
        counts: WorkerCounters,
        scope: Scope = no_scope,
        observer: Observer | None = None,
        on_process: Callable[[], None] | None = None,
        shown_error: ShownError | None = None,
    ) -> None:
        """`engine` is for transactional steps.

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
        self._faults = faults
        self._mutex = threading.Lock()
        self._pid = 0
        self._worker = ""
        self._threads = threading.local()
        self._heartbeat: Heartbeat | None = None
        self._watchdog: Watchdog | None = None
        self._closed = threading.Event()
        self.draining = Draining()
        self.board = Board()
        forks.watch(self)

    def after_fork(self) -> None:
        # Its threads are in the parent, and one of them may have held the lock.
        self._mutex = threading.Lock()
        self._threads = threading.local()
        self._closed = threading.Event()
        self._heartbeat = self._watchdog = None
        self._pid = 0

    def __call__(self) -> Executor:
        with self._mutex:
            if self._pid != os.getpid():
                self._begin()
                if self._on_process is not None:
                    self._on_process()
        executor: Executor | None = getattr(self._threads, "executor", None)
        if executor is None:
            executor = self.new()
            self._threads.executor = executor
        return executor

    def _begin(self) -> None:
        self._threads = threading.local()
        # Only a child of the prefork pool has nothing but its run to lose.
        pool_child = current_process().name != "MainProcess"
        place = getattr(current_process(), "index", 0)
        self.counts.counts.take(place)
        if pool_child:
            # Or the bodies could not start processes with multiprocessing.
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        slots = [place % SLOTS] if pool_child else range(SLOTS)
        self._heartbeat = Heartbeat(
            self._leases, self.connect, board=self.board, slots=slots, observer=self.counts
        )
        self._watchdog = Watchdog(
            self._leases, self.connect, own_process=pool_child, observer=self.counts
        )
        if self.draining.prepared:
            end = partial(self._end_of_grace, self._watchdog)
            LastingThread("grace", end, observer=self.counts).start()
        # Never the host name alone: a restarted container has the name of the one that died.
        self._worker = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._pid = os.getpid()

    def _end_of_grace(self, watchdog: Watchdog, _thread: LastingThread) -> None:
        self.draining.announced()
        # A process whose runs all end before has ended with them.
        if not self._closed.wait(self._settings.grace_seconds):
            watchdog.stop_all()

    def new(self, *, observer: Observer | None = None, **options: Any) -> Executor:
        """An executor of its own, for a caller that looks after it."""
        if self._heartbeat is None:
            self._begin()
        assert self._heartbeat is not None  # noqa: S101 - set by _begin
        assert self._watchdog is not None  # noqa: S101 - set by _begin
        return Executor(
            journal=self._journal,
            leases=self._leases,
            connect=self.connect,
            engine=self._engine,
            heartbeat=self._heartbeat,
            worker=self._worker,
            stopping=self.draining,
            leaving=leaving,
            limit=self._watchdog.call,
            faults=self._faults,
            observer=fan_out(self._observer, observer),
            scope=self._scope,
            shown_error=self._shown_error,
            redispatch_s=self._settings.redispatch_seconds,
            **options,
        )

    def close(self) -> None:
        """Stop this process's threads. Its executors close their own connections."""
        self._closed.set()
        if self._heartbeat is not None and self._pid == os.getpid():
            self._heartbeat.stop()
        if self._watchdog is not None and self._pid == os.getpid():
            self._watchdog.stop()

    def connect(self) -> psycopg.Connection[Any]:
        """An autocommit connection of a worker."""
        return postgres.connect(self._settings, "beatless worker")


class Surroundings(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """What others left in the worker's processes: variables are named, silenced loggers speak.

    It comes after `worker_init`, in which Celery's fix-up sets Django up, with its own logging.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._celery = worker.app
        signals.worker_process_init.connect(self._in_child)
        enable_own_loggers()
        warn_of_foreign(os.environ, worker.app.conf.broker_url)

    def stop(self, _worker: Any) -> None:
        signals.worker_process_init.disconnect(self._in_child)

    terminate = stop

    def _in_child(self, **_: Any) -> None:
        enable_own_loggers()
        self._celery.set_default()  # a prefork child forgets how this app does it


UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)
"""Raised by kombu for anything in the broker's list that it did not write."""


class Unreadable(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """What is no message ends no worker: it connects anew, as after a lost connection.

    It is out of the list already when kombu raises. What runs goes on.
    """

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        parent.connection_errors = (*parent.connection_errors, *UNREADABLE)


LOST = ("on_connection_error_before_connected", "on_connection_error_after_connected")
"""What Celery's consumer calls at once before it connects anew."""


class Reconnects(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """How soon a worker tries its broker again: as soon as a relay, and never without a pause.

    Celery lets up to 30 s pass before it notices that a broker is back. And it has no back-off from
    one that accepts the connection and then refuses, as a read-only replica does.
    """

    draining: ClassVar[Draining]

    @classmethod
    def of(cls, draining: Draining) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"draining": draining})

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._backoff = Backoff(cap=BACKOFF_CAP_S)
        self._failures = 0
        self._connected_at = monotonic()
        self._connect = parent.ensure_connected
        parent.ensure_connected = self.connect
        for name in LOST:
            setattr(parent, name, partial(self.lost, getattr(parent, name)))

    def connect(self, connection: Any) -> Any:
        """In the place of the consumer's `ensure_connected`."""
        connection.ensure_connection = partial(
            connection.ensure_connection,
            interval_start=1,
            interval_step=1,
            interval_max=BACKOFF_CAP_S,
        )
        connected = self._connect(connection)
        self._connected_at = monotonic()
        return connected

    def lost(self, tell: Callable[[Exception], None], error: Exception) -> None:
        """In the place of the consumer's methods named in `LOST`, of which `tell` is one."""
        tell(error)
        delay = self.delay(error, monotonic() - self._connected_at)
        if self._failures > 1:
            logger.warning(
                "the broker accepts connections and ends them, will retry",
                extra={"action": "broker_refuses", "retry_in": delay, "reason": str(error)},
            )
        until = monotonic() + delay
        while (left := until - monotonic()) > 0:
            worker_state.maybe_shutdown()
            if self.draining.wait(min(left, SHUTDOWN_LOOK_S)):
                return

    def delay(self, error: Exception, lasted: float) -> float:
        """Seconds until the next try after a connection that lasted for so many."""
        if isinstance(error, UNREADABLE) or lasted > BACKOFF_RESET_S:
            self._failures = 0
        if isinstance(error, UNREADABLE):
            return 0.0  # it is out of the list: the next message is another one
        self._failures += 1
        return self._backoff.delay(self._failures)


class Replacements(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Puts a new child in the place of a dead one within a second. Celery looks every five.

    Steps that are ended by force end their process, so a death is nothing rare here.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called by Celery when it has made its event loop: only with the prefork pool."""
        maintain = getattr(getattr(worker.pool, "_pool", None), "maintain_pool", None)
        if maintain is not None:
            hub.call_repeatedly(1.0, maintain)


class Alive(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Tells systemd that the main process takes messages, if it wants to know: prefork only."""

    requires = frozenset({"celery.worker.components:Pool"})

    def register_with_event_loop(self, _worker: Any, hub: Any) -> None:
        """As `Replacements`."""
        supervisor = Supervisor()
        if supervisor.interval:
            hub.call_repeatedly(supervisor.interval, supervisor.alive)


class Farewell(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Ends a worker within its grace: runs are given back, at a boundary or in a step.

    1. told to stop: children give their runs back when the step in flight has ended
    2. after the grace: each process ends its steps, as the watchdog does, and gives the runs back
    3. `FAREWELL` seconds later, if a thread or a child still hangs: the process ends all the same
    """

    requires = frozenset({"celery.worker.components:Timer"})
    draining: ClassVar[Draining]
    settings: ClassVar[Settings]

    @classmethod
    def of(cls, draining: Draining, settings: Settings) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"draining": draining, "settings": settings})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.draining.prepare()
        self._worker = worker
        self._last = threading.Timer(self.settings.grace_seconds + FAREWELL, self._leave)
        self._last.daemon = True  # nothing hangs if the process ends before

    def start(self, _worker: Any) -> None:
        signals.worker_shutting_down.connect(self._give_back)
        signals.worker_shutdown.connect(self._ended)

    def stop(self, _worker: Any) -> None:
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
        logger.info("worker stops, runs are given back", extra={"action": "worker_stops"})
        self._last.start()

    def _ended(self, sender: Any, **_: Any) -> None:
        """Nothing hung: whoever ran the worker in a process of theirs may go on."""
        if sender is self._worker:
            self._last.cancel()

    def _leave(self) -> None:
        try:
            logger.warning("worker ends: a step still hangs", extra={"action": "worker_ends"})
        finally:
            os._exit(0)  # what hangs is fenced, or its lease runs out


class Announcement(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Tells Postgres which queues this worker consumes, as long as it does."""

    requires = frozenset({"celery.worker.components:Pool"})
    statements: ClassVar[QueueStatements]
    settings: ClassVar[Settings]
    executors: ClassVar[Executors]

    @classmethod
    def of(cls, executors: Executors, settings: Settings) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(
            cls.__name__,
            (cls,),
            {
                "statements": QueueStatements(settings.schema),
                "settings": settings,
                "executors": executors,
            },
        )

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._worker = worker
        self._name = f"{worker.hostname}:{secrets.token_hex(4)}"
        self._version = metadata.version("beatless")
        self._stopping = threading.Event()
        self._thread: LastingThread | None = None

    def start(self, _worker: Any) -> None:
        self._thread = LastingThread("announcement", self._run, observer=self.executors.counts)
        self._thread.start()

    def stop(self, _worker: Any) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.end(1.0)  # it is no more than forgotten later

    terminate = stop

    def _run(self, thread: LastingThread) -> None:
        while not self._stopping.is_set():
            self._tell(self.statements.announce, thread)
            self._stopping.wait(PRESENCE_INTERVAL_S)
        self._tell(self.statements.withdraw, thread)

    def _tell(
        self, tell: Callable[[psycopg.Connection[Any], Presence], None], thread: LastingThread
    ) -> None:
        prefix = f"{self.settings.prefix}."
        names = list(self._worker.app.amqp.queues.consume_from)
        try:
            # A connection for each time: the main process forks, and has no other.
            with forks.without_forks(), self.executors.connect() as connection:
                tell(
                    connection,
                    Presence(
                        worker=self._name,
                        hostname=self._worker.hostname,
                        queues=[name.removeprefix(prefix) for name in names],
                        processes=self._worker.concurrency or 1,
                        version=self._version,
                        failing=self.executors.counts.failing(),
                    ),
                )
            thread.works()
        except Exception as error:
            thread.failed()
            logger.warning(
                "the worker could not tell which queues it consumes",
                extra={"action": "announcement_failed", "reason": str(error)},
            )


class ReadyFile(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """A file that is there while the worker takes runs, and young while its event loop turns.

    Whoever starts the worker makes it when the worker is ready.
    """

    requires = frozenset({"celery.worker.components:Timer"})
    path: ClassVar[Path]

    @classmethod
    def of(cls, path: Path) -> type[Self]:
        """The step of one worker: Celery takes classes."""
        return type(cls.__name__, (cls,), {"path": path})

    def start(self, worker: Any) -> None:
        self.path.unlink(missing_ok=True)  # of one that was killed
        worker.timer.call_repeatedly(TOUCH_EVERY, self._touch)
        signals.worker_shutting_down.connect(self._gone)

    def stop(self, _worker: Any) -> None:
        signals.worker_shutting_down.disconnect(self._gone)
        self._gone()

    terminate = stop

    def _touch(self) -> None:
        with suppress(FileNotFoundError):  # it went when the worker was told to stop
            os.utime(self.path)

    def _gone(self, **_: Any) -> None:
        self.path.unlink(missing_ok=True)


class WeightedCycle:
    """In which order a worker asks for its queues: each gets its share of what the worker takes.

    Stride scheduling (Waldspurger and Weihl, 1995): a queue moves on by 1 / weight when a run of it
    was taken, and who is least far on is asked first. One that had nothing does not save up.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._reached = dict.fromkeys(weights, 0.0)
        self._active: list[str] = []

    def update(self, queues: Iterable[str]) -> None:
        """The queues that are consumed from now."""
        self._active = list(queues)

    def consume(self, count: int) -> list[str]:
        """All queues, the one to look at first at the front."""
        return sorted(self._active, key=lambda queue: self._reached.get(queue, 0.0))[:count]

    def rotate(self, last_used: str) -> str:
        """A message of this queue was taken: those before it in the order had none."""
        reached = self._reached.get(last_used, 0.0)
        for queue, other in self._reached.items():
            self._reached[queue] = max(other, reached)
        self._reached[last_used] = reached + 1 / self._weights.get(last_used, 1)
        return last_used


class QueueOrder(dict[str, int]):
    """Weights by queue, as the transport's `queue_order_strategy`, which makes a cycle of them.

    It is JSON: a worker tells the options of its transport to whoever inspects it.
    """

    def __call__(self) -> WeightedCycle:
        return WeightedCycle(self)


class MetricsListener(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Serves a worker's metrics from its main process, if the settings name a port."""

    requires = frozenset({"celery.worker.components:Pool"})
    metrics: ClassVar[Metrics]
    settings: ClassVar[Settings]

    @classmethod
    def of(cls, metrics: Metrics, settings: Settings) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"metrics": metrics, "settings": settings})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._server: WSGIServer | None = None

    def include_if(self, _worker: Any) -> bool:
        return self.settings.metrics_port is not None

    def start(self, _worker: Any) -> None:
        self.metrics.worker.active = True
        self._server = listen(
            self.metrics.registry, self.settings.metrics_host, self.settings.metrics_port or 0
        )
        signals.worker_process_init.connect(self._in_child)

    def stop(self, _worker: Any) -> None:
        signals.worker_process_init.disconnect(self._in_child)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    terminate = stop

    def _in_child(self, **_: Any) -> None:
        # Or the port of a killed worker would be taken until the last of its children is gone.
        if self._server is not None:
            self._server.socket.close()


def run_worker(
    celery: Celery,
    settings: Settings,
    *,
    queues: Mapping[str, int] | None = None,
    concurrency: int | None = None,
    ready_file: Path | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Run a Celery worker in this process until it is told to stop; its exit status.

    `queues` have weights. Raises BadRequest for weights that differ on another broker than Redis,
    which itself decides what a worker gets next.
    """
    if queues:
        celery.conf.task_queues = queues_of(settings, list(queues))
        if len(set(queues.values())) > 1:
            if settings.redis_broker is None:
                raise BadRequest("--queues", "has weights, which only a Redis broker can give")
            weights = {f"{settings.prefix}.{name}": weight for name, weight in queues.items()}
            celery.conf.broker_transport_options = {
                **celery.conf.broker_transport_options,
                "queue_order_strategy": QueueOrder(weights),
            }
    if ready_file is not None:
        celery.steps["worker"].add(ReadyFile.of(ready_file))
    argv = ["worker", "--without-gossip", "--without-mingle"]
    if settings.log_format == Format.JSON:
        # Celery's banner and what its signal handlers say are for people, past all logging.
        argv.insert(0, "--quiet")
        vars(sys)["__stdout__"] = None
    elif os.environ.get("NO_COLOR"):
        argv.insert(0, "--no-color")
    argv += ["--hostname", f"beatless-{os.getpid()}@%h"]
    if concurrency is not None:
        argv += ["--concurrency", str(concurrency)]
    workers: list[Any] = []
    told: list[str] = []

    def begins(sender: Any, **_: Any) -> None:
        workers.append(sender)

    def stops(how: str, **_: Any) -> None:
        told.append(how)

    main, before, hung_up = os.getpid(), signal.getsignal(signal.SIGHUP), []

    def hangs_up(number: int, _frame: object) -> None:
        if os.getpid() == main and not told:
            # Whose terminal has gone does not come back behind it.
            if not isatty(sys.stdin):
                hung_up.append(number)
            os.kill(main, signal.SIGTERM)

    def ready(**_: Any) -> None:
        # Celery's own starts what `sys.argv` says, which is not always what was started.
        signal.signal(signal.SIGHUP, before if before == signal.SIG_IGN else hangs_up)

    signals.worker_init.connect(begins)
    signals.worker_shutting_down.connect(stops)
    signals.worker_ready.connect(ready)
    try:
        celery.worker_main([*argv, *arguments])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        signals.worker_init.disconnect(begins)
        signals.worker_shutting_down.disconnect(stops)
        signals.worker_ready.disconnect(ready)
    if hung_up:
        logger.info("worker starts again", extra={"action": "worker_restarts"})
        logging.shutdown()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
    if "Warm" in told:
        return 0
    # Celery keeps to itself that it could not go on.
    return int(next((worker.exitcode or 0 for worker in workers), 0))
