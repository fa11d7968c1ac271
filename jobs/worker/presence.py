"""The announcement of a worker's queues, in Postgres while it consumes them."""

import logging
import secrets
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any, ClassVar, Self

import psycopg
from celery import bootsteps

from beatless.orchestrator.plan_versions import PlanVersions
from beatless.orchestrator.queues import PRESENCE_INTERVAL_S, Presence, QueueStatements
from beatless.outbox import forks
from beatless.outbox.threads import LastingThread
from beatless.settings import Settings
from beatless.transactions import first_line
from beatless.worker.executors import Executors

logger = logging.getLogger("beatless.worker")


class PresenceReport(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery has no types
    """Announces the queues that this worker consumes, as long as it does.

    The first time it stores the versions of its plans, for workers with others.
    """

    requires = frozenset({"celery.worker.components:Pool"})
    statements: ClassVar[QueueStatements]
    versions: ClassVar[PlanVersions]
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
                "versions": PlanVersions(settings.schema),
                "settings": settings,
                "executors": executors,
            },
        )

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._worker = worker
        self._name = f"{worker.hostname}:{secrets.token_hex(4)}"
        self._version = metadata.version("beatless")
        self._stored_versions = False
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
            self._tell(self._announce, thread)
            self._stopping.wait(PRESENCE_INTERVAL_S)
        self._tell(self.statements.withdraw, thread)

    def _announce(self, connection: psycopg.Connection[Any], presence: Presence) -> None:
        if not self._stored_versions:
            self.versions.store(connection, self.executors.plans.values())
            self._stored_versions = True
        self.statements.announce(connection, presence)

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
                "the worker could not announce its queues",
                extra={"action": "announcement_failed", "reason": first_line(error)},
            )
