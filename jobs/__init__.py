"""beatless: durable, transactional, live-streamed runs for Celery.

Every name is imported when it is first used: `from beatless import step` costs neither SQLAlchemy
nor Celery.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read by type checkers and editors; `_MODULES` is the same at run time
    from beatless.app import App
    from beatless.approval_links import ApprovalLink
    from beatless.client import Client, RunRequest, SignalRequest
    from beatless.errors import (
        AccessDenied,
        BadRequest,
        BadSetting,
        ExtraMissing,
        HistoryChanged,
        JobsError,
        MigrationBlocked,
        QueueBusy,
        SchemaBehind,
        SchemaTaken,
        StatementTimeout,
        TransactionConflict,
        UnknownPlan,
        Unreachable,
        WaitTimeout,
        WrongEncoding,
    )
    from beatless.failures import Failure
    from beatless.observe.logs import JsonLines, TextLines
    from beatless.orchestrator.async_context import AsyncStepContext
    from beatless.orchestrator.child_elements import ElementContext, child, map_
    from beatless.orchestrator.context import StepContext
    from beatless.orchestrator.errors import (
        AlreadyDecided,
        ApprovalNotOpen,
        BadPayload,
        CannotRetry,
        ChildFailed,
        DeadlineExceeded,
        EventsPruned,
        Fatal,
        LeaseLost,
        RunCancelled,
        RunConflict,
        RunEnded,
        RunIsActive,
        RunNotFound,
        ScheduleConflict,
        ScheduleNotFound,
        SignalConflict,
        StepEnded,
        StepFailed,
        StepTimeout,
        WorkerStops,
    )
    from beatless.orchestrator.events import Event
    from beatless.orchestrator.forms import Verdict
    from beatless.orchestrator.function_plan import plan
    from beatless.orchestrator.limit import Limit
    from beatless.orchestrator.open_waits import Approval, Signal
    from beatless.orchestrator.outcomes import Finish, Goto, PlanError, Snooze
    from beatless.orchestrator.plan import Plan, step
    from beatless.orchestrator.records import Run, SentDecision, SentSignal
    from beatless.orchestrator.retry import retry
    from beatless.orchestrator.run_context import Child, RunContext
    from beatless.orchestrator.schedule import Schedule, StoredSchedule
    from beatless.orchestrator.state import RunState
    from beatless.orchestrator.undos import Undone
    from beatless.orchestrator.waits import approve, days, hours, minutes, sleep, wait
    from beatless.problem import ProblemDocument, problem_of
    from beatless.settings import Settings
    from beatless.streams.tailed import TailedEvent

_MODULES = {
    "AccessDenied": "beatless.errors",
    "AlreadyDecided": "beatless.orchestrator.errors",
    "App": "beatless.app",
    "Approval": "beatless.orchestrator.open_waits",
    "ApprovalLink": "beatless.approval_links",
    "ApprovalNotOpen": "beatless.orchestrator.errors",
    "AsyncStepContext": "beatless.orchestrator.async_context",
    "BadPayload": "beatless.orchestrator.errors",
    "BadRequest": "beatless.errors",
    "BadSetting": "beatless.errors",
    "CannotRetry": "beatless.orchestrator.errors",
    "Child": "beatless.orchestrator.run_context",
    "ChildFailed": "beatless.orchestrator.errors",
    "Client": "beatless.client",
    "DeadlineExceeded": "beatless.orchestrator.errors",
    "ElementContext": "beatless.orchestrator.child_elements",
    "Event": "beatless.orchestrator.events",
    "EventsPruned": "beatless.orchestrator.errors",
    "ExtraMissing": "beatless.errors",
    "Failure": "beatless.failures",
    "Fatal": "beatless.orchestrator.errors",
    "Finish": "beatless.orchestrator.outcomes",
    "Goto": "beatless.orchestrator.outcomes",
    "HistoryChanged": "beatless.errors",
    "JobsError": "beatless.errors",
    "JsonLines": "beatless.observe.logs",
    "LeaseLost": "beatless.orchestrator.errors",
    "Limit": "beatless.orchestrator.limit",
    "MigrationBlocked": "beatless.errors",
    "Plan": "beatless.orchestrator.plan",
    "PlanError": "beatless.orchestrator.outcomes",
    "ProblemDocument": "beatless.problem",
    "QueueBusy": "beatless.errors",
    "Run": "beatless.orchestrator.records",
    "RunCancelled": "beatless.orchestrator.errors",
    "RunConflict": "beatless.orchestrator.errors",
    "RunContext": "beatless.orchestrator.run_context",
    "RunEnded": "beatless.orchestrator.errors",
    "RunIsActive": "beatless.orchestrator.errors",
    "RunNotFound": "beatless.orchestrator.errors",
    "RunRequest": "beatless.client",
    "RunState": "beatless.orchestrator.state",
    "Schedule": "beatless.orchestrator.schedule",
    "ScheduleConflict": "beatless.orchestrator.errors",
    "ScheduleNotFound": "beatless.orchestrator.errors",
    "SchemaBehind": "beatless.errors",
    "SchemaTaken": "beatless.errors",
    "SentDecision": "beatless.orchestrator.records",
    "SentSignal": "beatless.orchestrator.records",
    "Settings": "beatless.settings",
    "Signal": "beatless.orchestrator.open_waits",
    "SignalConflict": "beatless.orchestrator.errors",
    "SignalRequest": "beatless.client",
    "Snooze": "beatless.orchestrator.outcomes",
    "StatementTimeout": "beatless.errors",
    "TransactionConflict": "beatless.errors",
    "StepContext": "beatless.orchestrator.context",
    "StepEnded": "beatless.orchestrator.errors",
    "StepFailed": "beatless.orchestrator.errors",
    "StepTimeout": "beatless.orchestrator.errors",
    "StoredSchedule": "beatless.orchestrator.schedule",
    "TailedEvent": "beatless.streams.tailed",
    "TextLines": "beatless.observe.logs",
    "Undone": "beatless.orchestrator.undos",
    "UnknownPlan": "beatless.errors",
    "Unreachable": "beatless.errors",
    "Verdict": "beatless.orchestrator.forms",
    "WaitTimeout": "beatless.errors",
    "WorkerStops": "beatless.orchestrator.errors",
    "WrongEncoding": "beatless.errors",
    "approve": "beatless.orchestrator.waits",
    "child": "beatless.orchestrator.child_elements",
    "days": "beatless.orchestrator.waits",
    "hours": "beatless.orchestrator.waits",
    "map_": "beatless.orchestrator.child_elements",
    "minutes": "beatless.orchestrator.waits",
    "plan": "beatless.orchestrator.function_plan",
    "problem_of": "beatless.problem",
    "retry": "beatless.orchestrator.retry",
    "sleep": "beatless.orchestrator.waits",
    "step": "beatless.orchestrator.plan",
    "wait": "beatless.orchestrator.waits",
}

__all__ = [
    "AccessDenied",
    "AlreadyDecided",
    "App",
    "Approval",
    "ApprovalLink",
    "ApprovalNotOpen",
    "AsyncStepContext",
    "BadPayload",
    "BadRequest",
    "BadSetting",
    "CannotRetry",
    "Child",
    "ChildFailed",
    "Client",
    "DeadlineExceeded",
    "ElementContext",
    "Event",
    "EventsPruned",
    "ExtraMissing",
    "Failure",
    "Fatal",
    "Finish",
    "Goto",
    "HistoryChanged",
    "JobsError",
    "JsonLines",
    "LeaseLost",
    "Limit",
    "MigrationBlocked",
    "Plan",
    "PlanError",
    "ProblemDocument",
    "QueueBusy",
    "Run",
    "RunCancelled",
    "RunConflict",
    "RunContext",
    "RunEnded",
    "RunIsActive",
    "RunNotFound",
    "RunRequest",
    "RunState",
    "Schedule",
    "ScheduleConflict",
    "ScheduleNotFound",
    "SchemaBehind",
    "SchemaTaken",
    "SentDecision",
    "SentSignal",
    "Settings",
    "Signal",
    "SignalConflict",
    "SignalRequest",
    "Snooze",
    "StatementTimeout",
    "StepContext",
    "StepEnded",
    "StepFailed",
    "StepTimeout",
    "StoredSchedule",
    "TailedEvent",
    "TextLines",
    "TransactionConflict",
    "Undone",
    "UnknownPlan",
    "Unreachable",
    "Verdict",
    "WaitTimeout",
    "WorkerStops",
    "WrongEncoding",
    "approve",
    "child",
    "days",
    "hours",
    "map_",
    "minutes",
    "plan",
    "problem_of",
    "retry",
    "sleep",
    "step",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
