"""What moves in a fleet: its queues, the plans of the last minute, and the last failures.

Eight statements a look. They read the runs that have not ended, and of the others at most the last
thousand: never the history.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy

from beatless.app import App
from beatless.orchestrator.queues import RECENT_ENDS, QueueState, QueueStatements
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.system import SystemState, look

FAILURES = 5
"""Failed runs that are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRate:
    """What ended of a plan within the last minute, or of many runs among the last ones."""

    plan: str
    completed: int
    failed: int
    cancelled: int
    per_second: float
    seconds: float
    """From the first start of a run to its end, on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRun:
    """A run that failed, and its error as it may be shown."""

    run_id: str
    plan: str
    failed_at: datetime
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """One look at a fleet: of all namespaces."""

    system: SystemState
    queues: list[QueueState]
    """Without the counts of runs that have ended."""
    plans: list[PlanRate]
    failures: list[FailedRun]
    """The last ones, the newest first."""


def activity(app: App, engine: sqlalchemy.Engine) -> Activity:
    """Raises SQLAlchemy's errors for a Postgres that cannot be reached."""
    schema = app.settings.schema
    sql = statements(__file__, schema, recent_ends=RECENT_ENDS, failures=FAILURES)
    with engine.connect() as connection:
        queues = QueueStatements(schema).states(connection, ended=False)
        ended = execute(connection, sql["plans"], {})
        failed = execute(connection, sql["failures"], {})
    return Activity(
        system=look(app, engine),
        queues=queues,
        plans=[
            PlanRate(
                plan=plan,
                completed=completed,
                failed=failures,
                cancelled=cancelled,
                per_second=(completed + failures + cancelled) / over_s,
                seconds=seconds,
            )
            for plan, completed, failures, cancelled, seconds, over_s in ended
        ],
        failures=[
            FailedRun(
                run_id=run_id, plan=plan, failed_at=at, error=app.redaction.value("error", error)
            )
            for run_id, plan, at, error in failed
        ],
    )
