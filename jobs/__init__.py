"""beatless: durable, transactional, live-streamed runs for Celery.

Every name is imported when it is first used: `from beatless import step` costs neither SQLAlchemy
nor Celery.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read by type checkers and editors; `_MODULES` is the same at run time
    from beatless.app import App
    from beatless.client import Client, RunRequest
    from beatless.errors import (
        BadRequest,
        BadSetting,
        HistoryChanged,
        JobsError,
        SchemaBehind,
        StatementTimeout,
        UnknownPlan,
        Unreachable,
        WaitTimeout,
        WrongEncoding,
    )
    from beatless.failures import Failure
    from beatless.observe.logs import JsonLines, TextLines
    from beatless.orchestrator.context import StepContext
    from beatless.orchestrator.errors import (
        BadPayload,
        CannotRetry,
        DeadlineExceeded,
        EventsPruned,
        Fatal,
        LeaseLost,
        RunCancelled,
        RunConflict,
        RunNotFound,
        StepEnded,
        StepFailed,
        StepTimeout,
        WorkerStops,
    )
    from beatless.orchestrator.events import Event
    from beatless.orchestrator.function_plan import plan
    from beatless.orchestrator.plan import Finish, Goto, Plan, Snooze, step
    from beatless.orchestrator.records import Run
    from beatless.orchestrator.retry import retry
    from beatless.orchestrator.run_context import RunContext
    from beatless.orchestrator.state import RunState
    from beatless.settings import Settings

_MODULES = {
    "App": "beatless.app",
    "BadPayload": "beatless.orchestrator.errors",
    "BadRequest": "beatless.errors",
    "BadSetting": "beatless.errors",
    "CannotRetry": "beatless.orchestrator.errors",
    "Client": "beatless.client",
    "DeadlineExceeded": "beatless.orchestrator.errors",
    "Event": "beatless.orchestrator.events",
    "EventsPruned": "beatless.orchestrator.errors",
    "Failure": "beatless.failures",
    "Fatal": "beatless.orchestrator.errors",
    "Finish": "beatless.orchestrator.plan",
    "Goto": "beatless.orchestrator.plan",
    "HistoryChanged": "beatless.errors",
    "JobsError": "beatless.errors",
    "JsonLines": "beatless.observe.logs",
    "LeaseLost": "beatless.orchestrator.errors",
    "Plan": "beatless.orchestrator.plan",
    "Run": "beatless.orchestrator.records",
    "RunCancelled": "beatless.orchestrator.errors",
    "RunConflict": "beatless.orchestrator.errors",
    "RunContext": "beatless.orchestrator.run_context",
    "RunNotFound": "beatless.orchestrator.errors",
    "RunRequest": "beatless.client",
    "RunState": "beatless.orchestrator.state",
    "SchemaBehind": "beatless.errors",
    "Settings": "beatless.settings",
    "Snooze": "beatless.orchestrator.plan",
    "StatementTimeout": "beatless.errors",
    "StepContext": "beatless.orchestrator.context",
    "StepEnded": "beatless.orchestrator.errors",
    "StepFailed": "beatless.orchestrator.errors",
    "StepTimeout": "beatless.orchestrator.errors",
    "TextLines": "beatless.observe.logs",
    "UnknownPlan": "beatless.errors",
    "Unreachable": "beatless.errors",
    "WaitTimeout": "beatless.errors",
    "WorkerStops": "beatless.orchestrator.errors",
    "WrongEncoding": "beatless.errors",
    "plan": "beatless.orchestrator.function_plan",
    "retry": "beatless.orchestrator.retry",
    "step": "beatless.orchestrator.plan",
}

__all__ = [
    "App",
    "BadPayload",
    "BadRequest",
    "BadSetting",
    "CannotRetry",
    "Client",
    "DeadlineExceeded",
    "Event",
    "EventsPruned",
    "Failure",
    "Fatal",
    "Finish",
    "Goto",
    "HistoryChanged",
    "JobsError",
    "JsonLines",
    "LeaseLost",
    "Plan",
    "Run",
    "RunCancelled",
    "RunConflict",
    "RunContext",
    "RunNotFound",
    "RunRequest",
    "RunState",
    "SchemaBehind",
    "Settings",
    "Snooze",
    "StatementTimeout",
    "StepContext",
    "StepEnded",
    "StepFailed",
    "StepTimeout",
    "TextLines",
    "UnknownPlan",
    "Unreachable",
    "WaitTimeout",
    "WorkerStops",
    "WrongEncoding",
    "plan",
    "retry",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
