"""Small steps of Celery's worker: set-up of its processes, pool repair, signs of life, metrics."""

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self
from wsgiref.simple_server import WSGIServer

from billiard.common import REMAP_SIGTERM
from celery import bootsteps, signals

from beatless.observe.logs import enable_own_loggers
from beatless.observe.metrics import Metrics
from beatless.observe.systemd import ServiceManager
from beatless.settings import Settings
from beatless.worker.celery_app import warn_of_foreign
from beatless.worker.executors import Executors

READY_FILE_TOUCH_INTERVAL_S = 5.0


class ProcessSetup(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Report variables of other projects, and enable loggers that Celery's set-up silenced.

    It comes after `worker_init`, in which Celery's fix-up sets Django up, with its own logging.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._celery = worker.app
        signals.worker_process_init.connect(self._in_child)
        enable_own_loggers()
        warn_of_foreign(os.environ, worker.app.conf.broker_url)

    def start(self, worker: Any) -> None:
        """Celery has just installed its handlers: SIGTERM lets steps end, whatever it has read."""
        if REMAP_SIGTERM and threading.current_thread() is threading.main_thread():
            from celery.apps.worker import install_worker_term_handler  # heavy: not for clients

            install_worker_term_handler(worker, how="Warm", callback=None, exitcode=0)

    def stop(self, _worker: Any) -> None:
        signals.worker_process_init.disconnect(self._in_child)

    terminate = stop

    def _in_child(self, **_: Any) -> None:
        enable_own_loggers()
        self._celery.set_default()  # a prefork child forgets how this app does it


class GroupLimit(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Tells how many runs a message may bring: of the places that the worker has for messages.

    One where Celery counts them: a task is a run there.
    """

    requires = frozenset({"celery.worker.components:Timer"})
    executors: ClassVar[Executors]

    @classmethod
    def of(cls, executors: Executors) -> type[Self]:
        """The step of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"executors": executors})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        from celery.concurrency.solo import TaskPool as Solo  # not for clients

        self.executors.places = 1 if worker.pool_cls is Solo else worker.concurrency
        if worker.max_tasks_per_child:
            self.executors.max_group_runs = 1
            self.executors.goes_on = False


class FastPoolRepair(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Puts a new child in the place of a dead one within a second. Celery looks every five.

    Steps that are ended by force end their process, so a death is nothing rare here.
    """

    requires = frozenset({"celery.worker.components:Pool"})

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called by Celery when it has made its event loop: only with the prefork pool."""
        maintain = getattr(getattr(worker.pool, "_pool", None), "maintain_pool", None)
        if maintain is not None:
            hub.call_repeatedly(1.0, maintain)


class SystemdWatchdog(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Reports to systemd that the main process takes messages, if it asks: prefork only."""

    requires = frozenset({"celery.worker.components:Pool"})

    def register_with_event_loop(self, _worker: Any, hub: Any) -> None:
        """As in `FastPoolRepair`."""
        supervisor = ServiceManager()
        if supervisor.interval_s:
            hub.call_repeatedly(supervisor.interval_s, supervisor.alive)


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
        from beatless.observe.exposition import listen  # prometheus_client is for who is scraped

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


class ReadyFile(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """A file that is there while the worker takes runs, and young while its event loop turns.

    The command that starts the worker makes it when the worker is ready.
    """

    requires = frozenset({"celery.worker.components:Timer"})
    path: ClassVar[Path]

    @classmethod
    def of(cls, path: Path) -> type[Self]:
        """The step of one worker: Celery takes classes. Bodies may change the directory later."""
        return type(cls.__name__, (cls,), {"path": path.absolute()})

    def start(self, worker: Any) -> None:
        self.path.unlink(missing_ok=True)  # of one that was killed
        worker.timer.call_repeatedly(READY_FILE_TOUCH_INTERVAL_S, self._touch)
        signals.worker_shutting_down.connect(self._gone)

    def stop(self, _worker: Any) -> None:
        signals.worker_shutting_down.disconnect(self._gone)
        self._gone()

    terminate = stop

    def _touch(self) -> None:
        with suppress(FileNotFoundError):  # it went when the worker was asked to stop
            os.utime(self.path)

    def _gone(self, **_: Any) -> None:
        self.path.unlink(missing_ok=True)
