"""beatless: durable, transactional, live-streamed runs for Celery."""

from jobs.app import App
from jobs.client import Client, RunRequest
from jobs.errors import (
    BadRequest,
    BadSetting,
    JobsError,
    SchemaBehind,
    UnknownPlan,
    Unreachable,
    WaitTimeout,
)
from jobs.settings import Settings
from orchestrator import (
    BadPayload,
    Event,
    Fatal,
    Finish,
    Goto,
    LeaseLost,
    Plan,
    Run,
    RunCancelled,
    RunConflict,
    RunNotFound,
    RunState,
    Snooze,
    StepContext,
    retry,
    step,
)

__all__ = [
    "App",
    "BadPayload",
    "BadRequest",
    "BadSetting",
    "Client",
    "Event",
    "Fatal",
    "Finish",
    "Goto",
    "JobsError",
    "LeaseLost",
    "Plan",
    "Run",
    "RunCancelled",
    "RunConflict",
    "RunNotFound",
    "RunRequest",
    "RunState",
    "SchemaBehind",
    "Settings",
    "Snooze",
    "StepContext",
    "UnknownPlan",
    "Unreachable",
    "WaitTimeout",
    "retry",
    "step",
]
