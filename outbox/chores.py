"""Background work beside the drains, in small steps, by one relay at a time."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import psycopg

from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.observer import ChoreFailed, ChoreRested, ChoreStepped, ChoreTaken, Observer
from beatless.outbox.queries import Queries
from beatless.outbox.sessions import prepare_to_drain
from beatless.outbox.statements import statements
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

MAX_REST_S = 3600.0
"""Seconds of the longest rest: after failures, or while another relay does the chore."""

IDLE_TIMEOUT_S = 10.0
"""Seconds after which Postgres ends the session of a frozen process, and takes its step back: a
chore sends its statements at shorter intervals."""

LOCK_TIMEOUT_S = 1.0
"""Seconds that a step waits for a lock while it holds others: it is tried again later."""

CLOSE_SESSION_ABOVE_S = 1.0
"""Seconds of rest above which the chore's session is closed meanwhile."""


class Chore(Protocol):
    """Periodic work in steps, each of which may be repeated."""

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Do a little on an autocommit connection; seconds until the next step is worth while.

        Between two statements the connection may rest for less than `IDLE_TIMEOUT_S`.
        """


class Chores:
    """A thread with a session of its own, so that a step on a slow disk delays no drain.

    1. rest; a relay that has just started has better things to do
    2. take the chore's lock, or rest for an hour: another relay is at it
    3. do steps, with the pauses they ask for; before a long one, close the session
    """

    def __init__(
        self,
        chores: Sequence[Chore],
        *,
        queries: Queries,
        connect: Callable[[], DirectConnection],
        observer: Observer,
        after: float,
    ) -> None:
        """`after` is how many seconds the first step waits."""
        self._chores = chores
        self._sql = statements(__file__, queries.schema)
        self._connect = connect
        self._observer = observer
        self._backoff = Backoff(initial=1.0, cap=MAX_REST_S)
        self._failures = 0
        self._due = [monotonic() + after] * len(chores)
        self._stopping = threading.Event()
        self._thread: LastingThread | None = None

    def start(self) -> None:
        """Begin, unless it has begun or there is nothing to do."""
        if self._chores and self._thread is None:
            thread = LastingThread("chores", lambda _: self.run(), observer=self._observer)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Finish the current step and return."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.end()

    def run(self) -> None:
        """Work until `stop()`."""
        while not self._stopping.wait(max(0.0, min(self._due) - monotonic())):
            index = self._due.index(min(self._due))
            self._due[index] = monotonic() + self.once(index)

    def once(self, index: int) -> float:
        """Do one chore until it asks for a long rest; seconds until then."""
        try:
            with self._connect() as connection:
                prepare_to_drain(connection)
                connection.execute(
                    self._sql["limit_session"],
                    {"free": f"{IDLE_TIMEOUT_S:g}s", "wait": f"{LOCK_TIMEOUT_S:g}s"},
                )
                if not self._lock(connection, index):
                    return MAX_REST_S
                while (rest := self._chores[index].step(connection)) <= CLOSE_SESSION_ABOVE_S:
                    self._observer(ChoreStepped(rest_s=rest))
                    if self._stopping.wait(rest):
                        break
        except Exception as error:
            # Any error: the drains go on, and so will this.
            self._failures += 1
            rest = self._backoff.delay(self._failures)
            logger.warning(
                "a chore of the relay failed, will retry",
                extra={"action": "chore_failed", "retry_in": rest, "reason": str(error)},
            )
            self._observer(ChoreFailed(error=str(error)))
        else:
            self._failures = 0
            self._observer(ChoreRested(rest_s=rest))
        return rest

    def _lock(self, connection: DirectConnection, index: int) -> bool:
        row = connection.execute(self._sql["take"], {"place": index}).fetchone()
        if row and row[0]:
            return True
        self._observer(ChoreTaken())
        return False
