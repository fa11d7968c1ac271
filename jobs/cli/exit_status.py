"""The exit status of each known error."""

import sys
from collections.abc import Mapping

from beatless.errors import (
    BadRequest,
    BadSetting,
    JobsError,
    StatementTimeout,
    UnknownPlan,
    Unreachable,
)
from beatless.orchestrator.errors import (
    BadPayload,
    OrchestratorError,
    RunConflict,
    RunNotFound,
    ScheduleNotFound,
)
from beatless.orchestrator.outcomes import PlanError
from beatless.outbox.errors import OutboxError, PublishFailed

BAD_INPUT = (
    BadPayload,
    BadRequest,
    BadSetting,
    PlanError,
    RunConflict,
    RunNotFound,
    ScheduleNotFound,
    UnknownPlan,
)
UNREACHABLE = (PublishFailed, StatementTimeout, Unreachable)
UNREACHABLE_STATUS = 3
UNREACHABLE_ELSEWHERE = {
    "kombu.exceptions": ("OperationalError",),
    "psycopg": ("OperationalError",),
    "redis": ("ConnectionError", "TimeoutError"),
    "sqlalchemy.exc": ("OperationalError",),
}
"""The errors of other packages that tell of an unreachable server, by module."""

FAILED = (JobsError, OrchestratorError, OSError, OutboxError)
FAILED_ELSEWHERE = {
    "psycopg": ("Error",),
    "redis": ("RedisError",),
    "sqlalchemy.exc": ("DBAPIError",),
}


def exit_status(error: Exception) -> int | None:
    """2 for bad input, 3 for an unreachable server, 1 for other failures; None if unexpected."""
    if isinstance(error, BAD_INPUT):
        return 2
    if isinstance(error, (*UNREACHABLE, *imported(UNREACHABLE_ELSEWHERE))):
        return UNREACHABLE_STATUS
    return 1 if isinstance(error, (*FAILED, *imported(FAILED_ELSEWHERE))) else None


def imported(errors: Mapping[str, tuple[str, ...]]) -> list[type[Exception]]:
    """Those of the modules that are imported: no other module's error can have been raised."""
    return [
        getattr(sys.modules[module], name)
        for module, names in errors.items()
        if module in sys.modules
        for name in names
    ]
