"""The steps at which unfinished runs stand, and whether their plans still have them.

It writes nothing. Of a plan that is a function it calls that function, and no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sqlalchemy

from beatless.orchestrator.child_calls import ChildrenWait
from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.dry_replay import dry_replay
from beatless.orchestrator.events import EventType
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.plan_versions import PlanVersions
from beatless.orchestrator.progress import (
    CHANGED_CALL,
    FOLDED,
    SNOOZED,
    UNKNOWN_STEP,
    Progress,
    UnknownStep,
    fold,
    next_step,
)
from beatless.orchestrator.records import Unfinished
from beatless.orchestrator.replay import Mismatch
from beatless.orchestrator.step_order import changed_places, passed_by, removed
from beatless.orchestrator.timeline import stands_at, waits_for_children
from beatless.orchestrator.unfit_events import UNFIT, UnreadableEvent, folded
from beatless.orchestrator.waits import Wait, WaitKind
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
    difference: str | None = None
    """What the function of the plan does instead, with the first of these runs."""
    advice: str | None = None
    leaves_out: Sequence[str] = ()
    """Steps that the runs were to do, and that this version of their plan does not have."""
    waits_for: Sequence[str] = ()
    """The signals that end the wait of the runs, if this version's wait names others too."""
    ignores: Sequence[str] = ()
    """Those others."""
    runs: int = 0
    run_ids: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        told = {"difference": self.difference, "advice": self.advice}
        return {
            "plan": self.plan,
            "step": self.step,
            "runs": self.runs,
            "waits": self.waits,
            **(told if self.difference is not None else {}),
            **({"leaves_out": [*self.leaves_out]} if self.leaves_out else {}),
            **(
                {"waits_for": [*self.waits_for], "ignores": [*self.ignores]} if self.ignores else {}
            ),
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
    found: dict[tuple[object, ...], Place] = {}
    called: list[tuple[Plan, Unfinished]] = []

    def note(
        run: Unfinished,
        step: str | None,
        waits: str | None,
        told: Mismatch | None = None,
        leaves_out: Sequence[str] = (),
    ) -> None:
        waits_for, ignores = ((), ()) if waits else _other_signals(plans.get(run.plan), run)
        key = (run.plan, step, waits, told and told.kind, tuple(leaves_out), waits_for, ignores)
        place = found.setdefault(
            key,
            Place(
                plan=run.plan,
                step=step,
                waits=waits,
                leaves_out=leaves_out,
                waits_for=waits_for,
                ignores=ignores,
            ),
        )
        if told is not None and not place.runs:
            place.difference, place.advice = difference(told), told.advice
        place.runs += 1
        if len(place.run_ids) < MAX_RUN_IDS:
            place.run_ids.append(run.place.run_id)

    with engine.begin() as connection:
        known = PlanVersions(journal.schema).known(connection)
        reordered = _reordered(plans, known)
        shortened = _shortened(plans, known) if reasons is None else {}
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
            elif (
                plan
                and not run.cancelled
                and (
                    (step and plan.name in reordered) or (plan.name, run.plan_version) in shortened
                )
            ):
                called.append((plan, run))
            else:
                note(run, step, _waits(plan, run))
        for plan, run in called:
            stands = stands_at([run.place])
            at = None if stands is None else step_of(stands)
            if isinstance(plan, FunctionPlan):
                told = mismatch(connection, journal, plan, run.place.run_id)
                note(run, at, None if told is None else told.reason, told)
                continue
            progress = _progress(connection, journal, plan, run.place.run_id)
            told = _other_order(connection, journal, plan, progress, run.plan_version)
            if told is not None:
                note(run, at, told.reason, told)
                continue
            steps = shortened.get((plan.name, run.plan_version))
            gone = removed(plan, progress, steps) if progress is not None and steps else ()
            note(run, at, _waits(plan, run), leaves_out=gone)
    return sorted(
        found.values(), key=lambda place: (place.waits is None, place.plan, place.step or "")
    )


def _other_signals(plan: Plan | None, run: Unfinished) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The signals of an open wait, and those that only the wait of this plan, a list, names.

    Both empty if there are none of the latter.
    """
    stored = (run.place.data or {}).get("names")
    if run.place.type != EventType.WAIT_STARTED or run.cancelled or not isinstance(stored, list):
        return (), ()
    wait = None if plan is None else plan.get(step_of(run.place.step or ""))
    if not isinstance(wait, Wait) or wait.kind is not WaitKind.SIGNAL:
        return (), ()
    ignored = tuple(name for name in wait.names if name not in stored)
    return (tuple(map(str, stored)), ignored) if ignored else ((), ())


def _reordered(
    plans: Mapping[str, Plan], known: Mapping[str, Mapping[str, Sequence[str]]]
) -> set[str]:
    """The plans of which another version has steps in another order."""
    return {
        name
        for name, plan in plans.items()
        if any(changed_places(plan, steps) for steps in known.get(name, {}).values())
    }


def _shortened(
    plans: Mapping[str, Plan], known: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[tuple[str, str], Sequence[str]]:
    """The steps of the versions, by plan and hash, that have one which their plan lacks here."""
    return {
        (name, version): steps
        for name, plan in plans.items()
        for version, steps in known.get(name, {}).items()
        if not {plan.current(each) for each in steps} <= {*plan.names}
    }


def _progress(connection: Caller, journal: Journal, plan: Plan, run_id: str) -> Progress | None:
    """The place of an unfinished run of a list; None if it ends with an unreadable event."""
    events = journal.checkpoint_events(connection, run_id, names=FOLDED, rest=SNOOZED)
    try:
        return folded(partial(fold, plan), [*events])
    except UnreadableEvent:
        return None


def _other_order(
    connection: Caller, journal: Journal, plan: Plan, progress: Progress | None, version: str
) -> Mismatch | None:
    """Why an unfinished run, started with this version of a list, cannot go on in this order."""
    if progress is None:
        return None
    versions = PlanVersions(journal.schema)
    step = passed_by(plan, progress, lambda: versions.steps(connection, plan, version))
    if step is None or progress.place is None:
        return None
    return Mismatch(
        step=progress.place.step or "",
        reason=UNKNOWN_STEP,
        message=(
            f"the plan has {step} before {step_of(progress.place.step or '')}, behind which it "
            "came when the run was started: the run would end without it"
        ),
        advice=(
            "deploy the former order until they have ended, or say in the plan that they go on "
            f'without it: moved=["{step}"]'
        ),
        instead=step,
    )


def mismatch(
    connection: Caller, journal: Journal, plan: FunctionPlan, run_id: str
) -> Mismatch | None:
    """Why an unfinished run of any namespace cannot go on with this function, which is called.

    Not of a run that is undone: for that it is not called.
    """
    events = [*journal.checkpoint_events(connection, run_id, names=FOLDED, rest=SNOOZED)]
    if any(event.type == EventType.UNDO_STARTED for event in events):
        return None
    try:
        said = dry_replay(
            plan,
            journal.get_of_any_namespace(connection, run_id),
            events,
            lambda first, last: ChildRuns(journal).ends(connection, run_id, first, last),
        )
    except UnreadableEvent:
        return None  # the run ends with this error
    return said if isinstance(said, Mismatch) else None


def why_it_waits(
    engine: sqlalchemy.Engine, journal: Journal, plans: Mapping[str, Plan], run_id: str
) -> Mismatch | None:
    """The mismatch of a run whose function could not go on in a worker, by these plans.

    None, and no function is called, if no worker has noted that.
    """
    with engine.begin() as connection:
        run = journal.get_of_any_namespace(connection, run_id)
        plan = plans.get(run.plan)
        dispatch = journal.dispatch_status(connection, run_id).dispatch
        noted = dispatch is not None and dispatch[2] in (UNKNOWN_STEP, CHANGED_CALL)
        if not noted or run.cancel_requested_at is not None or plan is None:
            return None
        if isinstance(plan, FunctionPlan):
            return mismatch(connection, journal, plan, run_id)
        progress = _progress(connection, journal, plan, run_id)
        return _other_order(connection, journal, plan, progress, run.plan_version)


def children_waited_for(
    engine: sqlalchemy.Engine, journal: Journal, run_id: str
) -> ChildrenWait | None:
    """How many children have ended of a run that waits; None if it waits for no children."""
    with engine.begin() as connection:
        started = waits_for_children(journal.read(connection, run_id))
        if started is None:
            return None
        return ChildRuns(journal).waited_for(connection, run_id, started)


def difference(told: Mismatch) -> str:
    """The message of a mismatch, with the text of an exception."""
    return f"{told.message}: {told.detail}" if told.detail else told.message


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
    except UNFIT:
        return None  # of an event that SQL has written: the run ends with this error
    return None
