"""The steps at which unfinished runs stand, and whether their plans still have them. Reads only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy

from beatless.orchestrator.journal import Journal
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.progress import UNKNOWN_STEP, UnknownStep, next_step
from beatless.orchestrator.records import Unfinished
from beatless.orchestrator.timeline import stands_at
from beatless.outbox.queries import execute_lazily

UNKNOWN_PLAN = "unknown_plan"
"""Why a run waits whose plan this version does not have."""

MAX_RUN_IDS = 1000
"""Of one place; more are only counted."""


@dataclass(slots=True, kw_only=True)
class Place:
    """The runs of one plan that are in one step, or go on with it."""

    plan: str
    step: str | None
    """None for runs that have not begun."""
    waits: str | None
    """`unknown_step` or `unknown_plan` if this version cannot go on there."""
    runs: int = 0
    run_ids: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "step": self.step,
            "runs": self.runs,
            "waits": self.waits,
            "run_ids": self.run_ids,
        }


def places(
    engine: sqlalchemy.Engine,
    journal: Journal,
    plans: Mapping[str, Plan],
    *,
    reason: str | None = None,
) -> list[Place]:
    """All places where unfinished runs of any namespace are, those that cannot go on first.

    `reason` takes only those that wait for it, as a worker has noted.
    """
    found: dict[tuple[str, str | None, str | None], Place] = {}
    with engine.begin() as connection:
        for run in journal.unfinished(connection, reason=reason, read=execute_lazily):
            undoes = run.undo is not None and not run.undoing
            at = run.undo if undoes else stands_at([run.place])
            step = None if at is None else step_of(at)
            waits = _waits(plans.get(run.plan), run)
            place = found.setdefault(
                (run.plan, step, waits), Place(plan=run.plan, step=step, waits=waits)
            )
            place.runs += 1
            if len(place.run_ids) < MAX_RUN_IDS:
                place.run_ids.append(run.place.run_id)
    return sorted(
        found.values(), key=lambda place: (place.waits is None, place.plan, place.step or "")
    )


def _waits(plan: Plan | None, run: Unfinished) -> str | None:
    if plan is None:
        return UNKNOWN_PLAN
    if run.cancelled and not run.undoing:
        # It ends, or the plan's own `on_cancel` step begins.
        return UNKNOWN_STEP if run.undo is not None and plan.on_cancel is None else None
    try:
        next_step(plan, run.place, undoing=run.undoing)
    except UnknownStep:
        return UNKNOWN_STEP
    return None
