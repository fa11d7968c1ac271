"""Writes the boundaries of a run with limits that take slots, or pass them on, in one commit."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg import pq

from beatless.orchestrator.events import EventType, as_stored
from beatless.orchestrator.lease import Connection, Lease
from beatless.orchestrator.leased_writer import LeasedWriter
from beatless.orchestrator.limit import RunLimit
from beatless.orchestrator.progress import FINAL
from beatless.orchestrator.records import Appended
from beatless.orchestrator.requests import Committed, CommitWithSlots, NoSlot, Unstorable
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.state import RunState
from beatless.outbox.pending import prepare_anew
from beatless.outbox.queries import Caller

logger = logging.getLogger("beatless.orchestrator.executor")

ClaimNext = Callable[[Connection, Lease], Callable[[], Lease | None]]
"""As `Leases.claim_next`."""


def _is_idle(connection: Connection) -> bool:
    """Whether nothing is open, and no answer is waited for."""
    return (
        connection.pgconn.pipeline_status is pq.PipelineStatus.OFF
        and connection.pgconn.transaction_status is pq.TransactionStatus.IDLE
    )


def log_unclaimed(run_id: str, error: psycopg.Error) -> None:
    """Say why no run was claimed behind this one."""
    logger.info(
        "no run was claimed with the end of another: it comes with its message",
        extra={"action": "claim_next_failed", "run_id": run_id, "reason": str(error)},
    )


def no_lease() -> Lease | None:
    """The answer to a claim that was not made."""
    return None


class LimitedWriter(LeasedWriter):
    """As `LeasedWriter`; a step with limits begins with their slots, and its end frees them."""

    def __init__(
        self, lease: Lease, *, on_commit: Callable[[Settlement, Appended], None], **options: Any
    ) -> None:
        # Not a method: a writer that refers to itself is left to the garbage collector.
        super().__init__(lease, on_commit=partial(_committed, lease, on_commit), **options)
        self._announce_commit = on_commit

    def begin_step(self, commit: CommitWithSlots) -> Committed | NoSlot | Unstorable:
        """Commit the start of a step with its slots, or that the run waits. Raises LeaseLost."""
        try:
            appended, missing = self._settle_with_slots(
                commit.settlement, commit.parked, commit.limits
            )
        except psycopg.DataError as error:
            return Unstorable(str(error))
        return Committed.of(appended) if missing is None else NoSlot(missing)

    def settle_and_claim(self, settlement: Settlement, claim: ClaimNext) -> Appended:
        """`settle` the end of the run, and claim another in the same commit: `following`.

        Raises LeaseLost. If the claim fails there is none; if the answer is lost, it is looked for.
        """
        claims = True

        def write(connection: Connection) -> Appended | None:
            nonlocal claims
            if claims:
                claims = False
                try:
                    appended, self._lease.following = self._with_claim(
                        connection, settlement, claim
                    )
                    return appended
                except psycopg.Error as error:
                    if connection.closed:
                        raise
                    log_unclaimed(self._run_id, error)
                    if error.sqlstate is None or not _is_idle(connection):
                        # psycopg's own error, with which it loses count of the answers of a
                        # pipeline: Postgres may have committed it.
                        self._disconnect()
                        connection, self._doubtful = self._connection(), settlement
                        self._renew(connection)
                        found, self._doubtful = find(connection), None
                        if found is not None:
                            return found
                    else:
                        prepare_anew(connection)
            with self._statement(connection):
                return self._settle(connection, settlement)

        def find(connection: Connection) -> Appended | None:
            found = self._find_settled(settlement, connection)
            if found is not None:
                self._lease.following = self._leases.find_following(connection, self._lease)
            return found

        with self._alone(settlement):
            self._write_tried(settlement)
            appended = self._write(write, settlement.normal.state, what=settlement, find=find)
        self._in_doubt = None
        self._on_commit(settlement, appended)
        self._take_in(appended)
        return appended

    def _with_claim(
        self, connection: Connection, settlement: Settlement, claim: ClaimNext
    ) -> tuple[Appended | None, Lease | None]:
        lease, following = self._lease, no_lease

        def send(_: Caller, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
            nonlocal following
            with connection.pipeline():  # one transaction, on an autocommit connection
                if lease.limited_step:
                    self._leases.send_free_slots_of_step(connection, lease)
                settled = connection.execute(statement, parameters)
                following = claim(connection, lease)
            return settled.fetchall()

        appended = self._journal.settle(
            connection, self._run_id, lease.token, settlement, self._last_seq, send=send
        )
        return appended, following()

    def _settle_with_slots(
        self, settlement: Settlement, parked: Settlement, limits: Sequence[RunLimit]
    ) -> tuple[Appended, str | None]:
        missing: str | None = None
        chosen = settlement

        def write(connection: Connection) -> Appended | None:
            nonlocal missing, chosen
            with self._transaction(connection):
                missing = self._leases.take_slots_of_step(connection, self._lease, limits)
                chosen = settlement if missing is None else parked
                if missing is not None:
                    self._leases.free_slots_of_step(connection, self._lease, ends=False)
                return super(LimitedWriter, self)._settle(connection, chosen)

        def find(connection: Connection) -> Appended | None:
            return self._find_settled(chosen, connection)

        with self._alone(settlement):
            self._write_tried(settlement)
            appended = self._write(write, RunState.RUNNING, what=settlement, find=find)
        self._announce_commit(chosen, appended)
        if missing is None:
            self._lease.limited_step = bool(limits)
            self._take_in(appended)
        return appended, missing

    @contextmanager
    def _statement(self, connection: Connection) -> Iterator[None]:
        """As there; what may end a step with limits frees their slots in the same transaction."""
        together = self._transaction if self._lease.limited_step else super()._statement
        with together(connection):
            yield

    def _settle(self, connection: Caller, settlement: Settlement) -> Appended | None:
        if self._lease.limited_step:
            self._leases.free_slots_of_step(connection, self._lease, ends=_ends_step(settlement))
        return super()._settle(connection, settlement)


def _committed(
    lease: Lease,
    announce: Callable[[Settlement, Appended], None],
    settlement: Settlement,
    appended: Appended,
) -> None:
    if lease.limited_step and _ends_step(settlement):
        lease.limited_step = False
    announce(settlement, appended)


def _ends_step(settlement: Settlement) -> bool:
    """Whether the step of a boundary is not called again for this occurrence."""
    boundary = settlement.normal
    return any(
        event.type in (EventType.STEP_FINISHED, EventType.UNDO_STARTED)
        or (
            event.type is EventType.STEP_FAILED
            and (boundary.state is not RunState.QUEUED or FINAL in as_stored(event))
        )
        for event in boundary.events
    )
