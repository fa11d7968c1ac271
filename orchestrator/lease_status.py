"""Leases as their rows tell of them: to an owner, to a heartbeat, and to who notices a death."""

from dataclasses import dataclass

from beatless.orchestrator.state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """The fate of a lease. Only its owner writes as a worker."""

    held: bool
    committed_since: bool
    """The owner has committed something after the seq that it was sure of."""
    last_seq: int
    state: RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The news of a run whose lease was extended."""

    cancelled: bool
    signalled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLease:
    """A lease as it stands in the run's row."""

    run_id: str
    token: int
    worker: str
    """What ends the names of all processes of its worker."""
    alone: bool = False
    """Of a suspect: its body runs, with no other beside it."""
    uncalled: bool = False
    """Of a suspect: its body was not called yet."""
