"""The history of a database, named by its epoch: a restore or a failover may change it."""

import logging
import threading

from beatless.errors import HistoryChanged
from beatless.orchestrator.journal import Journal
from beatless.outbox.queries import Caller

logger = logging.getLogger("beatless.stream")

NO_HEAD = 2**31
"""The head of a run that was removed. Above any seq: its reader looks, and learns of it."""


def origin_of(epoch: str) -> str:
    """The epoch without its timeline, for names of channels."""
    return epoch.rpartition("t")[0]


class History:
    """Checks whether the database still has the history in which a run is followed."""

    def __init__(self, run_id: str, epoch: str | None) -> None:
        """`epoch` is that of the cursor, if it is known already."""
        self._run_id = run_id
        self._epoch = epoch
        self.sure = epoch is not None
        """Nothing has happened since the last look that another history could have come with."""

    def differs(self, epoch: str, head: int, seq: int) -> bool:
        """Whether a database of this epoch, where the run has this head, lacks seen events."""
        return self._epoch not in (None, epoch) or head < seq

    def check(self, epoch: str, head: int, seq: int) -> None:
        """Raises HistoryChanged."""
        if self.differs(epoch, head, seq):
            raise HistoryChanged(self._run_id, seq)
        self._epoch, self.sure = epoch, True


class Origin:
    """The identity of the database's history, as far as this process knows."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._epoch = ""
        self._flushed = 0
        self._look = threading.Lock()

    @property
    def name(self) -> str:
        """That of the last look, see `origin_of`; empty before the first."""
        return origin_of(self._epoch)

    def epoch(self, connection: Caller) -> str:
        """The epoch now. It is renewed here if the disk has become an older copy of itself.

        That is: a snapshot was restored while this process lived. One that was restored while none
        did is for operators to declare, by `beatless migrate --restored`.
        """
        # Noted before the statement: values of other threads meanwhile may be newer.
        before = (self._epoch, self._flushed)
        epoch, flushed = self._journal.epoch(connection)
        with self._look:
            if epoch == before[0] == self._epoch and 0 < flushed < before[1]:
                logger.warning(
                    "the database has gone back in time: its epoch is renewed",
                    extra={"action": "epoch_renewed", "epoch": epoch},
                )
                self._journal.renew(connection, epoch)
                epoch, flushed = self._journal.epoch(connection)
            if epoch == self._epoch:
                flushed = max(flushed, self._flushed)
            self._epoch, self._flushed = epoch, flushed
        return epoch

    def after_fork(self) -> None:
        self._look = threading.Lock()
