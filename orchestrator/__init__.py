"""What a run is: plans, events, states, the journal, leases and the executor."""

from orchestrator.context import StepContext
from orchestrator.errors import (
    BadPayload,
    CannotRetry,
    DeadlineExceeded,
    EventsPruned,
    Fatal,
    LeaseLost,
    OrchestratorError,
    RunCancelled,
    RunConflict,
    RunNotFound,
    StepTimeout,
    WorkerStops,
)
from orchestrator.events import Event, EventType
from orchestrator.executor import Executor
from orchestrator.journal import Journal, Run
from orchestrator.lease import Heartbeat, Lease, Leases
from orchestrator.plan import Finish, Goto, Plan, PlanError, Snooze, Step, step
from orchestrator.retry import Retry, retry
from orchestrator.state import RunState

__all__ = [
    "BadPayload",
    "CannotRetry",
    "DeadlineExceeded",
    "Event",
    "EventType",
    "EventsPruned",
    "Executor",
    "Fatal",
    "Finish",
    "Goto",
    "Heartbeat",
    "Journal",
    "Lease",
    "LeaseLost",
    "Leases",
    "OrchestratorError",
    "Plan",
    "PlanError",
    "Retry",
    "Run",
    "RunCancelled",
    "RunConflict",
    "RunNotFound",
    "RunState",
    "Snooze",
    "Step",
    "StepContext",
    "StepTimeout",
    "WorkerStops",
    "retry",
    "step",
]
