"""The outbox id above which a relay looks for rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import psycopg

from beatless.outbox.message import PickedEvents

FLOOR_INTERVAL_ROWS = 1000
"""Outbox rows between two attempts to raise the scan floor."""


class FloorCandidate(NamedTuple):
    """Outbox ids up to `id` are all decided once every transaction below `xid` has ended."""

    id: int
    xid: int


class ScanFloor:
    """Skips the dead rows that an old snapshot keeps VACUUM from removing.

    1. remember the highest id m that was picked and the next transaction id x
    2. once no transaction below x runs, every id up to m is visible or will never be
    3. after one complete pick since then, everything up to m has been published
    Ids commit out of order, so m alone, without the wait for x, would lose rows. It is not
    read from the sequence, which a role that may write rows need not be allowed to see.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.id = 0
        """Rows up to this id are not looked at."""
        self._connection = connection
        self._candidate: FloorCandidate | None = None
        self._highest = 0
        self._decided = False
        self._rows_since = 0

    def advance(self, picked: Sequence[PickedEvents], *, complete: bool) -> None:
        """Take one step towards a higher floor.

        `complete`: nothing above the floor was left out of the pick, and all of it was published.
        """
        self._highest = max(self._highest, *(row.id for row in picked), 0)
        if complete and self._decided and self._candidate:
            self.id = self._candidate.id
            self._candidate, self._decided = None, False
        self._rows_since += len(picked)
        if self._rows_since < FLOOR_INTERVAL_ROWS:
            return
        self._rows_since = 0
        if self._candidate is None:
            # A writer that drew an id up to the highest one has its transaction id already. One of
            # our own, not the snapshot's xmax: that leaves out transactions that run still.
            xid = self._connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
            if xid and self._highest > self.id:
                self._candidate = FloorCandidate(self._highest, xid[0])
        elif not self._decided:
            xmin = self._connection.execute(
                "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
            ).fetchone()
            self._decided = xmin is not None and xmin[0] >= self._candidate.xid

    def reset(self) -> None:
        """Look at everything again, because the set of shards has changed."""
        self.id, self._highest, self._candidate, self._decided = 0, 0, None, False
