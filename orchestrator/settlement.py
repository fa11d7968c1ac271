"""The commit of a boundary as a value: one if the run was cancelled, another if not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.state import RunState

NEVER_S = 240_000_000_000.0
"""Seconds until a time that never comes: whatever ends the wait makes the run due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """Events to append to a run, and the state it is in after them."""

    state: RunState
    events: Sequence[NewEvent] = ()
    result: str | None = None
    """JSON text; a cancelled run has none."""
    error: str | None = None
    """JSON text."""
    delay_s: float = 0.0
    """Seconds until the run is due again, when the state is queued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """Both ways that a boundary can go.

    Postgres chooses on the locked row, so a cancel is before a boundary or after it, never between.
    """

    normal: Boundary
    if_cancelled: Boundary
    """Written instead if a cancel was accepted before."""
    reason: str = "retry"
    """Why the run waits, in its dispatch, when the state is queued."""

    @classmethod
    def ignoring_cancel(cls, boundary: Boundary, reason: str = "retry") -> Self:
        """The same boundary either way: for a run whose cancel is being carried out."""
        return cls(normal=boundary, if_cancelled=boundary, reason=reason)

    def due_in(self, delay_s: float) -> Self:
        """The same, of a run that waits so many seconds at most, also if its cancel is ignored."""
        delay_s = min(delay_s, self.normal.delay_s or delay_s)
        later = replace(self.normal, delay_s=delay_s)
        ignores = self.if_cancelled is self.normal
        return replace(self, normal=later, if_cancelled=later if ignores else self.if_cancelled)

    def chosen(self, *, cancelled: bool) -> Boundary:
        """The boundary that was written."""
        return self.if_cancelled if cancelled else self.normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A boundary that is ready to be committed under a lease, alone or with those of other runs."""

    run_id: str
    token: int
    after: int
    """The seq of the last event that the owner of the lease has seen."""
    settlement: Settlement
