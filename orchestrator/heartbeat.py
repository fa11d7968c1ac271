"""Keeps the leases of this process while their steps run."""

import logging
import os
import threading
from collections.abc import Callable, Sequence

import psycopg

from beatless.orchestrator.board import Board, Noted
from beatless.orchestrator.lease import Connection, Lease, Leases
from beatless.outbox.clock import monotonic, since_boot
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.orchestrator.lease")

LOCK_TIMEOUT_S = 0.02
"""Seconds that a run's row is waited for to take in its signals: other leases wait meanwhile."""

RETRY_INTERVAL_S = 1.0
"""Seconds until a heartbeat that failed is tried again."""

SUSPEND_CHECK_INTERVAL_S = 1.0
"""Seconds between two looks whether the machine was suspended, while a lease is held: those of the
server went on meanwhile."""


class Heartbeat:
    """A thread that keeps this process's leases while their steps run.

    1. sleep until a third of the lease time has gone, or until stopped
    2. extend every lease that is held, all at once, and waiting for no row
    3. note on each lease whether it was lost, or a cancel was asked for; take in signals
    4. if that failed, or a row was held, do it again each second: a lease must not run out for that

    It opens a connection when a step first outlives that third, so short steps cost nothing.
    Nothing that goes wrong ends it.
    """

    def __init__(
        self,
        leases: Leases,
        connect: Callable[[], Connection],
        *,
        board: Board | None = None,
        slots: Sequence[int] = (),
        life: int = 0,
        observer: Observer = ignore,
    ) -> None:
        """Held leases are noted in these slots of `board`, as far as they go, with this `life`."""
        self._leases = leases
        self._connect = connect
        self._board = board
        self._free = list(slots)
        self._life = life
        self._pid = os.getpid()
        self._slots: dict[int, int] = {}
        self._by_id: dict[int, Lease] = {}
        self._changed = threading.Condition()
        self._observer = observer
        self._thread: LastingThread | None = None
        self._resting = False
        self._stopping = False

    def hold(self, lease: Lease) -> None:
        """Keep this lease from now on; again when its token has changed."""
        with self._changed:
            self._by_id[id(lease)] = lease
            self._note(lease)
            if self._thread is None:
                thread = LastingThread("heartbeat", self._run, observer=self._observer)
                thread.start()
                self._thread = thread  # one that could not be started is started with the next
            elif self._resting:
                self._changed.notify()

    def note_uncalled(self, lease: Lease, *, uncalled: bool, beside: bool = False) -> None:
        """Note whether a death of the process would be no crash of the run, and why.

        Its next body is yet to be called, or runs `beside` others.
        """
        with self._changed:
            if (lease.uncalled, lease.beside) != (uncalled, beside):
                lease.uncalled, lease.beside = uncalled, beside
                slot = self._slots.get(id(lease))
                if self._board is not None and slot is not None:
                    self._board.mark(slot, uncalled=uncalled, beside=beside)

    def release(self, lease: Lease) -> None:
        """Keep it no longer."""
        with self._changed:
            self._by_id.pop(id(lease), None)
            slot = self._slots.pop(id(lease), None)
            if self._board is not None and slot is not None:
                self._board.clear(slot)
                self._free.append(slot)

    def _note(self, lease: Lease) -> None:
        if self._board is None or id(lease) not in self._by_id:
            return
        if id(lease) not in self._slots:
            if not self._free:
                return
            self._slots[id(lease)] = self._free.pop()
        self._board.write(
            self._slots[id(lease)],
            Noted(
                pid=self._pid,
                life=self._life,
                beat=monotonic(),
                run_id=lease.run.run_id,
                tokens=lease.tokens,
                uncalled=lease.uncalled,
                beside=lease.beside,
            ),
        )

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def once(self, connection: Connection) -> bool:
        """Extend every lease that is held now; False if another transaction holds a row."""
        with self._changed:
            held = list(self._by_id.values())
        if not held:
            return True
        complete = True
        missed = self._leases.extend(connection, held)
        with self._changed:
            for lease in held:
                if not any(lease is other for other in missed):
                    self._note(lease)
        for lease in held:
            if lease.signalled:
                self._leases.take_in(connection, lease, LOCK_TIMEOUT_S)
        for lease in missed:
            status = self._leases.inspect(connection, lease, 0)
            if status.held:
                complete = False
                continue
            lease.lost = True
            self.release(lease)
            # With our token still in place, it was this process that ended it or gave it back.
            if not status.committed_since and not status.state.final:
                logger.warning(
                    "lease lost while its step runs",
                    extra={
                        "action": "lease_lost",
                        "run_id": lease.run.run_id,
                        "token": lease.token,
                    },
                )
        return complete

    def _run(self, thread: LastingThread) -> None:
        connection: Connection | None = None
        failing = False
        while True:
            with self._changed:
                self._resting = True
                self._changed.wait_for(lambda: self._by_id or self._stopping)
                self._resting = False
                # A lease that comes meanwhile is younger than this wait: it can bear its end.
                every = self._leases.seconds / 3
                self._rest(min(every, RETRY_INTERVAL_S) if failing else every)
                if self._stopping:
                    break
                if not self._by_id:
                    failing = False
                    thread.works()
                    continue
            try:
                if connection is None or connection.closed:
                    connection = self._connect()
                failing = not self.once(connection)
                thread.works()
            except Exception as error:
                failing = True
                thread.failed()
                # Mostly Postgres is unreachable. For any error: the token protects the run.
                logger.warning(
                    "heartbeat failed, will retry",
                    extra={"action": "heartbeat_failed", "reason": str(error)},
                    exc_info=None if isinstance(error, psycopg.Error) else error,
                )
                if connection is not None:
                    connection.close()
        if connection is not None:
            connection.close()

    def _rest(self, seconds: float) -> None:
        """Wait for so long, with the time in which the machine is suspended."""
        until = since_boot() + seconds
        while not self._stopping and (left := until - since_boot()) > 0:
            self._changed.wait_for(lambda: self._stopping, min(left, SUSPEND_CHECK_INTERVAL_S))
