"""The steps at which unfinished runs stand, and whether their plans still have them.

It writes nothing. Of a plan that is a function it calls that function, and no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy

from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.dry_replay import dry_replay
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.progress import (
    FOLDED,
    SNOOZED,
    UNKNOWN_STEP,
    UnknownStep,
    next_step,
)
from beatless.orchestrator.records import Unfinished
from beatless.orchestrator.replay import Mismatch
from beatless.orchestrator.timeline import stands_at
from beatless.outbox.queries import Caller, execute_lazily

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
    """`unknown_step`, `changed_call` or `unknown_plan` if this version cannot go on there."""
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
    reasons: Sequence[str] | None = None,
) -> list[Place]:
    """All places where unfinished runs of any namespace are, those that cannot go on first.

    `reasons` takes only those that wait for them, as a worker has noted; then no function of a plan
    is called, and all of its runs are taken as they are noted.
    """
    found: dict[tuple[str, str | None, str | None], Place] = {}
    called: list[tuple[FunctionPlan, Unfinished]] = []

    def note(run: Unfinished, step: str | None, waits: str | None) -> None:
        place = found.setdefault(
            (run.plan, step, waits), Place(plan=run.plan, step=step, waits=waits)
        )
        place.runs += 1
        if len(place.run_ids) < MAX_RUN_IDS:
            place.run_ids.append(run.place.run_id)

    with engine.begin() as connection:
        for run in journal.unfinished(connection, reasons=reasons, read=execute_lazily):
            undoes = run.undo is not None and not run.undoing
            at = run.undo if undoes else stands_at([run.place])
            step = None if at is None else step_of(at)
            plan = plans.get(run.plan)
            if isinstance(plan, FunctionPlan) and not run.cancelled:
                if reasons is None:
                    called.append((plan, run))
                else:
                    note(run, step, UNKNOWN_STEP)
            else:
                note(run, step, _waits(plan, run))
        for plan, run in called:
            at, waits = _replayed(connection, journal, plan, run)
            note(run, at, waits)
    return sorted(
        found.values(), key=lambda place: (place.waits is None, place.plan, place.step or "")
    )


def _replayed(
    connection: Caller, journal: Journal, plan: FunctionPlan, run: Unfinished
) -> tuple[str | None, str | None]:
    """Where a run of a function is, and why it waits there if it does."""
    run_id = run.place.run_id
    events = journal.checkpoint_events(connection, run_id, names=FOLDED, rest=SNOOZED)
    said = dry_replay(
        plan,
        journal.get_of_any_namespace(connection, run_id),
        events,
        lambda first, last: ChildRuns(journal).ends(connection, run_id, first, last),
    )
    stands = stands_at([run.place])
    if isinstance(said, Mismatch):
        return said.step or stands, said.reason
    return None if stands is None else step_of(stands), None


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
