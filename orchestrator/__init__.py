"""What a run is: plans, events, states, the journal, leases and the executor."""

from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import (
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
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.executor import Executor
from beatless.orchestrator.journal import Journal, Run
from beatless.orchestrator.lease import Heartbeat, Lease, Leases
from beatless.orchestrator.plan import Finish, Goto, Plan, PlanError, Snooze, Step, step
from beatless.orchestrator.retry import Retry, retry
from beatless.orchestrator.state import RunState

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
