"""Writes under the lease of a run, however often Postgres goes away meanwhile.

Only the owner of a lease writes as a worker. So a commit whose answer was lost has happened if the
journal has grown by an event of a worker; that it happens later is ruled out by a new token.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import psycopg

from beatless.orchestrator.errors import LeaseLost, StepEnded
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.held_rows import GIVES_WAY, HELD_ROW_WAIT_S, RowHeld
from beatless.orchestrator.lease import Connection, Lease, Leases
from beatless.orchestrator.lease_status import LeaseStatus
from beatless.orchestrator.records import Appended
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.step_output import Portion, StepOutput
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic

logger = logging.getLogger("beatless.orchestrator.executor")

T = TypeVar("T")

Find = Callable[[Connection], Appended | None]
"""Looks whether a write whose answer was lost has been committed."""

BETWEEN_TRIES = Backoff(initial=0.05, cap=5.0)
"""Seconds between tries to reach Postgres."""

AWAY = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction)
"""Postgres cannot take a write now: gone, full, or a primary no more. Worth trying again."""

NEVER = (psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex)
"""Operational errors to psycopg that no waiting will change."""


def may_be_committed(error: Exception) -> bool:
    """Whether what a statement was to write may be there: Postgres has not said that it is not."""
    refused = isinstance(error, psycopg.Error) and not isinstance(error, AWAY)
    return not refused and not isinstance(error, NEVER)


class SureWriter:
    """Writes once, and finds out whether it was written."""

    def __init__(
        self,
        lease: Lease,
        *,
        leases: Leases,
        heartbeat: Heartbeat,
        connection: Callable[[], Connection],
        disconnect: Callable[[], None],
        stopping: threading.Event,
    ) -> None:
        self._lease = lease
        self._run_id = lease.run.run_id
        self._leases = leases
        self._heartbeat = heartbeat
        self._connection = connection
        self._disconnect = disconnect
        self._stopping = stopping
        self._last_seq = lease.run.last_seq
        """Of the last event that is known to be committed."""
        self._writing = threading.RLock()
        """Held by the one thread that writes: the steps of a run may have many."""
        self._outputs: dict[int, StepOutput] = {}
        """Of the attempts whose threads may write now, by their identities: what one has emitted is
        written before its next event."""
        self._never = threading.Event()
        """Not set: threads wait at it for the doubt of others to end."""
        self._doubtful: object = None
        """What was to be written when an answer was lost and somebody had the row, until it is
        known whether it was."""
        self.asked_s = 0.0
        """Seconds that the threads of steps have spent here."""

    def _write(
        self,
        write: Callable[[Connection], Appended | None],
        intended: RunState,
        *,
        what: object,
        tried: bool = False,
        find: Find | None = None,
    ) -> Appended:
        """Write once, whatever happens to the connection. Raises LeaseLost, and RowHeld.

        A commit whose answer was lost may have happened: `find` looks for it in the journal before
        the next try; default: for any event of a worker. So after a RowHeld the same is to be
        written next: `what` it is.
        """
        tried = tried or (self._doubtful is not None and self._doubtful == what)

        def act(connection: Connection) -> Appended | None:
            nonlocal tried
            if tried:
                self._doubtful = what
                self._renew(connection)
                found = find(connection) if find else self._find_any(connection, intended)
                self._doubtful = None
                if found is not None:
                    return found
            tried = True
            return write(connection)

        appended = self.patiently(act)
        if appended is None:
            self._lease.lost = True
            raise LeaseLost(self._run_id, self._lease.token)
        self._last_seq = appended.last_seq
        return appended

    def _find_any(self, connection: Connection, intended: RunState) -> Appended | None:
        status = self._inspect(connection)
        if not status.committed_since:
            return None
        return Appended(last_seq=status.last_seq, cancelled=status.state is not intended)

    def _find_settled(self, settlement: Settlement, connection: Connection) -> Appended | None:
        """As `_find_any`; the state of a run that goes on either way does not tell of a cancel.

        Then what may not have begun is not gone on with.
        """
        found = self._find_any(connection, settlement.normal.state)
        goes_on = settlement.if_cancelled.state is settlement.normal.state
        if found is None or not (goes_on and self._lease.cancelled):
            return found
        return replace(found, cancelled=True)

    def begin_shared(self, attempt: Attempt, event: NewEvent) -> Portion | None:
        """An event of a step, for a statement that commits it with those of other runs.

        None if it is to be written by itself: a thread writes just now, for which this one does not
        wait, or something else is to be written first. Nobody else writes before `end_shared`.
        """
        if self._lease.lost or not self._writing.acquire(blocking=False):
            return None
        output = self._outputs.get(id(attempt))
        tried = any(each.tried for each in list(self._outputs.values()))
        if output is None or output.waiting or tried or self._doubtful is not None:
            self._writing.release()
            return None
        return Portion(
            run_id=self._run_id,
            token=self._lease.token,
            after=self._last_seq,
            events=[event],
            connection=self._connection,
            disconnect=self._disconnect,
        )

    def end_shared(self, event: NewEvent, appended: Appended | None, *, in_doubt: bool) -> None:
        """It was written, or not, or it is not known whether it was; others may write again."""
        if appended is not None:
            self._last_seq = appended.last_seq
            self._lease.cancelled |= appended.cancelled
        elif in_doubt:
            self._doubtful = event
        self._writing.release()

    def cancel_requested(self) -> bool:
        """Whether a cancel was accepted, by the row and not by the last heartbeat."""
        self.patiently(self._inspect)
        return self._lease.cancelled

    def cancel_noticed(self, attempt: Attempt, step: str) -> bool:
        """`cancel_requested` for the threads of a step. Raises StepEnded after it."""
        with self._asking(attempt, step):
            return self.cancel_requested()

    @contextmanager
    def _asking(
        self, attempt: Attempt, step: str | None, what: NewEvent | None = None
    ) -> Iterator[None]:
        began = monotonic()
        try:
            with self._locked() if what is None else self._alone(what):
                if id(attempt) not in self._outputs:
                    raise StepEnded(self._run_id, step or "")
                yield
        finally:
            self.asked_s += monotonic() - began

    def reconnect(self) -> None:
        """An exception struck anywhere in the body: in the middle of a trace's commit, perhaps."""
        self._disconnect()
        self._last_seq = self.patiently(self._inspect).last_seq

    def _is_open(self, output: StepOutput) -> bool:
        # A list at once: other bodies of the run may begin meanwhile.
        return any(each is output for each in list(self._outputs.values()))

    def _is_doubtful(self, output: StepOutput) -> bool:
        """Whether a write of this attempt is in doubt."""
        doubtful = self._doubtful
        if isinstance(doubtful, NewEvent):
            return doubtful.step == output.step
        return doubtful is output

    @contextmanager
    def _alone(self, what: object) -> Iterator[None]:
        """The turn of this thread to write this. Raises RowHeld as `_locked`.

        What another thread has written, perhaps, is written by that one first; output by any.
        """
        while True:
            with self._locked():
                doubtful = self._doubtful
                open_output = any(each is doubtful for each in list(self._outputs.values()))
                if doubtful is None or open_output or doubtful == what:
                    yield
                    return
            if GIVES_WAY.get():
                raise RowHeld(self._run_id)
            self._never.wait(HELD_ROW_WAIT_S)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The turn of this thread. Raises RowHeld if another writes, and others need this one."""
        if not self._writing.acquire(timeout=HELD_ROW_WAIT_S if GIVES_WAY.get() else -1):
            raise RowHeld(self._run_id)
        try:
            yield
        finally:
            self._writing.release()

    @contextmanager
    def _transaction(self, connection: Connection) -> Iterator[None]:
        """A transaction; one that waits for no row for long, where others need the thread.

        Then it raises RowHeld.
        """
        if GIVES_WAY.get():
            try:
                with self._leases.with_lock_timeout(connection, HELD_ROW_WAIT_S):
                    yield
            except psycopg.errors.LockNotAvailable as error:
                raise RowHeld(self._run_id) from error
        else:
            with connection.transaction():
                yield

    @contextmanager
    def _statement(self, connection: Connection) -> Iterator[None]:
        """One statement, which waits for no row for long where others need the thread."""
        if GIVES_WAY.get():
            # A pipeline, or it would be four round trips.
            with connection.pipeline(), self._transaction(connection):
                yield
        else:
            yield

    def patiently(self, act: Callable[[Connection], T]) -> T:
        """Do it as soon as Postgres can be reached, unless the worker stops first."""
        failures = 0
        while True:
            try:
                return act(self._connection())
            except NEVER:
                raise
            except AWAY as error:
                self._disconnect()
                failures += 1
                delay = BETWEEN_TRIES.delay(failures)
                logger.warning(
                    "Postgres is unreachable, will retry",
                    extra={
                        "action": "postgres_away",
                        "run_id": self._run_id,
                        "retry_in": delay,
                        "reason": str(error),
                    },
                )
                if self._stopping.wait(delay):
                    raise

    def _renew(self, connection: Connection) -> None:
        with self._statement(connection):
            self._leases.renew_token(connection, self._lease)
        self._heartbeat.hold(self._lease)

    def _forgo_doubt(self) -> None:
        """Have what is doubtful written or not, for good: nobody will write it again."""

        def act(connection: Connection) -> None:
            self._renew(connection)
            status = self._inspect(connection)
            if status.held:  # else the next write learns of it
                self._last_seq = status.last_seq

        if self._doubtful is not None:
            self.patiently(act)
            self._doubtful = None

    def _inspect(self, connection: Connection) -> LeaseStatus:
        return self._leases.inspect(connection, self._lease, self._last_seq)
