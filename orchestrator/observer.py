"""The signals of executors; `beatless.outbox.observer` explains signals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.state import RunState
from beatless.outbox.observer import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed(Signal):
    """A worker has the lease of a run, and begins to execute it."""

    lease: Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class LongHistoryRead(Signal):
    """A claim has read a history of many events."""

    lease: Lease
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NotClaimed(Signal):
    """A message was ignored: its run has ended, waits, is paused, or another worker has it."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver(Signal):
    """The lease was lost to another worker: this one writes nothing more."""

    run_id: str


DeathCause = Literal["child_died", "worker_died"]
"""One process of a worker, whose main process lives, or the worker as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesEnded(Signal):
    """Processes have died, and the leases that they held were ended: their runs go on at once."""

    cause: DeathCause
    leases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted(Signal):
    """The outcome of a step is committed."""

    run_id: str
    step: str
    """The occurrence, as in `reserve#2`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Signal):
    """Events of a run are committed, with its new state."""

    lease: Lease
    events: Sequence[NewEvent]
    state: RunState
    reason: str
    """Why the run is dispatched again, if it waits."""
    last_seq: int
    """Of the last of the events."""
    duration_s: float | None
    """Of the attempt that ended, its commit included; None if none did."""
    exception: BaseException | None
    """The exception of the step, if it raised one."""
