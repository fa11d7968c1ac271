"""What the retry of an ended run takes over of it, folded from its events. Pure."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from beatless.orchestrator.errors import CannotRetry
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.open_waits import Received
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.progress import LAST, SIGNALS, WAS_UNDONE, first_name, fold
from beatless.orchestrator.unfit_events import folded
from beatless.orchestrator.waits import Wait, WaitKind


def reusable(plan: Plan, events: Sequence[Event], from_step: str | None) -> dict[str, Any] | None:
    """The results that a retry of an ended run takes over, and the step to begin with.

    None if it begins at the beginning, as it does for a run that was undone, and only there.
    `from_step` is an occurrence, or a name for the last occurrence, as it is called now or was
    before. Raises CannotRetry and UnreadableEvent.
    """
    run_id = events[0].run_id
    progress, first = folded(partial(fold, plan), events), None
    if progress.undoing or (progress.begun_undos and any(map(_is_cancel, events))):
        if from_step is not None:
            raise CannotRetry(run_id, WAS_UNDONE)
        return None
    if from_step is not None:
        begun = [
            event
            for event in events
            if event.type
            in (EventType.STEP_STARTED, EventType.WAIT_STARTED, EventType.CHILDREN_STARTED)
            and from_step in _names(plan, event.step or "")
        ]
        if not begun:
            raise CannotRetry(run_id, f"it never began a step {from_step}")
        # The last occurrence, from its first attempt on.
        first = next(event for event in begun if first_name(event) == first_name(begun[-1]))
    # Children belong to the run that has started them: they are started again.
    children = next((event for event in events if event.type == EventType.CHILDREN_STARTED), None)
    if children is not None and (
        first.seq > children.seq
        if first is not None
        else not progress.compensating and (progress.step or progress.unknown)
    ):
        first = children
    if first is not None:
        name = step_of(first.step or "")
        step = plan.get(name)
        if step is None or step is not plan.on_cancel:
            progress = fold(plan, [event for event in events if event.seq < first.seq])
            progress.step, progress.unknown = step, None if step else name
    if progress.compensating:
        return None
    if progress.unknown is not None:
        raise CannotRetry(
            run_id,
            f"plan {plan.name} has no step {progress.unknown} any more; if it was renamed, say so "
            f'in the plan: renamed={{"{progress.unknown}": …}}',
        )
    if progress.step is None:
        raise CannotRetry(run_id, "all of its steps have finished; name the step to begin with")
    if not progress.visits and progress.step is plan.first:
        return None
    received = {
        name: result for name, result in progress.results.items() if isinstance(result, Received)
    }
    reused = {
        "results": progress.results | {name: each.to_dict() for name, each in received.items()},
        "visits": dict(progress.visits),
        "next": progress.step.name,
    }
    if received:
        reused[SIGNALS] = list(received)
    starts_children = any(
        isinstance(each, Wait) and each.kind is WaitKind.CHILDREN for each in plan.elements
    )
    if progress.last is not None and starts_children:
        reused[LAST] = progress.last  # the children may get its result
    ahead, passed = plan.after(progress.step.name), []
    while ahead is not None:
        if ahead.name in progress.straight:
            passed.append(ahead.name)
        ahead = plan.after(ahead.name)
    return reused | {"passed": passed} if passed else reused


def _is_cancel(event: Event) -> bool:
    return event.type == EventType.CANCEL_REQUESTED


def _names(plan: Plan, occurrence: str) -> set[str]:
    """All names by which a caller may mean it."""
    now = plan.current(occurrence)
    return {occurrence, step_of(occurrence), now, step_of(now)}
