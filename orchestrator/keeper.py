"""Keeps leases from another process: of those that work and cannot keep them themselves."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg

from beatless.orchestrator.board import Board, Noted
from beatless.orchestrator.lease import Connection, Leases
from beatless.orchestrator.lease_status import Kept
from beatless.outbox.clock import monotonic
from beatless.outbox.forks import without_forks
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

LATE_SHARE = 1 / 2
"""The share of the lease time after which a heartbeat is late: it beats after a third."""

STOPPED = frozenset("TtZX")
"""States of a process, as proc(5) has them, in which it does no work: stopped, traced, or dead."""


def works(pid: int) -> bool:
    """Whether this process lives and is not stopped; False where the system does not report it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # After its name, which is in brackets and may hold any.
    return stat.rpartition(")")[2].split()[0] not in STOPPED


class Keeper:
    """Extends the leases on the board whose process works and has not made sure of them in time.

    A body that holds the interpreter's lock, as a long call of C code does, lets no heartbeat run
    in its process. Its run would be taken over while it works, and be executed twice.

    1. sleep for a sixth of the lease time
    2. look at the board, which costs no statement, and extend late leases

    It opens a connection when something is late, and closes it when nothing is.
    """

    def __init__(
        self,
        board: Board,
        leases: Leases,
        connect: Callable[[], Connection],
        stopping: threading.Event,
    ) -> None:
        self._board = board
        self._leases = leases
        self._connect = connect
        self._stopping = stopping
        self._connection: Connection | None = None
        self._warned: set[int] = set()
        self.gone: set[int] = set()
        """Lives of processes that are known to be dead, whoever has their pids now."""

    def run(self, thread: LastingThread | None = None) -> None:
        """Until `stopping` is set. Nothing that goes wrong ends it."""
        while not self._stopping.wait(self.interval_s):
            works = self.look()
            if thread is not None:
                (thread.works if works else thread.failed)()
        self._disconnect()

    @property
    def interval_s(self) -> float:
        """Seconds between two looks."""
        return self._leases.seconds / 6

    def look(self) -> bool:
        """`once`, whatever goes wrong in it; whether nothing did."""
        try:
            with without_forks():
                self.once()
        except Exception as error:
            logger.warning(
                "leases of busy processes were not kept, will retry",
                extra={"action": "keeping_failed", "reason": str(error)},
                exc_info=None if isinstance(error, psycopg.Error) else error,
            )
            self._disconnect()
            return False
        return True

    def once(self) -> int:
        """Extend the leases that are late now; their number."""
        before = monotonic() - self._leases.seconds * LATE_SHARE
        late = [
            noted
            for noted in self._board.read()
            if noted.beat < before and noted.life not in self.gone and works(noted.pid)
        ]
        if not late:
            self._warned.clear()
            self._disconnect()
            return 0
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        kept = self._leases.extend_tokens(
            self._connection, [(noted.run_id, token) for noted in late for token in noted.tokens]
        )
        for noted in late:
            self._warn(noted, kept)
        return len(kept)

    def _warn(self, noted: Noted, kept: dict[int, Kept]) -> None:
        for token in kept.keys() & set(noted.tokens) - self._warned:
            self._warned.add(token)
            logger.warning(
                "a step lets no other thread of its process run; its lease is kept from outside",
                extra={"action": "lease_kept", "run_id": noted.run_id, "pid": noted.pid},
            )

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
