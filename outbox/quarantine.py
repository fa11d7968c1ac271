"""Runs whose rows Postgres or Redis cannot take: they are left alone, and the others go on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, RunSetAside

logger = logging.getLogger(__name__)

ROW_INDEPENDENT_SQLSTATES = frozenset(
    ("08", "25", "26", "28", "3D", "3F", "40", "42", "53", "55", "57", "58", "")
)
"""Classes of SQLSTATE for which no row is to blame: the connection, the transaction (a primary that
has become read-only), rights, missing objects, resources, locks, an operator, the system."""

SET_ASIDE_S = 60.0
"""Seconds for which a run is left alone after a statement over one of its rows has failed."""


class Quarantine:
    """The runs that are set aside, each for a time."""

    def __init__(self, observer: Observer) -> None:
        self.additions = 0
        """How many times a run was set aside."""
        self._observer = observer
        self._until: dict[str, float] = {}

    @property
    def run_ids(self) -> list[str]:
        """The runs that are set aside now."""
        return list(self._until)

    @property
    def array(self) -> list[str] | str:
        """`run_ids` as a parameter. Nearly always none: as text, as in `queries.int_array`."""
        return self.run_ids or "{}"

    @property
    def retry_in_s(self) -> list[float]:
        """Seconds until each of them is tried again."""
        return [max(0.0, until - monotonic()) for until in self._until.values()]

    def release_due(self) -> None:
        """Let those be tried again whose time is over."""
        self._until = {run: until for run, until in self._until.items() if monotonic() < until}

    @contextmanager
    def isolating(self, run_id: str) -> Iterator[None]:
        """Set this run aside if Postgres refuses a statement over nothing but its rows.

        Raises psycopg.Error if no row is to blame for it.
        """
        try:
            yield
        except psycopg.Error as error:
            if not is_row_fault(error):
                raise
            self.set_aside(run_id, SET_ASIDE_S, f"Postgres refuses a statement over it: {error}")

    def set_aside(self, run_id: str, seconds: float, reason: str) -> None:
        """Leave this run alone for a while."""
        self._until[run_id] = monotonic() + seconds
        self.additions += 1
        self._observer(RunSetAside(run_id=run_id))
        logger.error(
            "a run is set aside",
            extra={
                "action": "set_aside",
                "run_id": run_id,
                "retry_in": seconds,
                "reason": reason,
            },
        )


def is_row_fault(error: psycopg.Error) -> bool:
    """Whether Postgres may refuse a statement for the sake of one row, and not of all others."""
    return (error.sqlstate or "")[:2] not in ROW_INDEPENDENT_SQLSTATES
