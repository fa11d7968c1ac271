"""Steps that changed places while runs were in flight. Pure: it reads and writes nothing.

A run knows the version of the plan that it was started with. A step that this version had, that
the run has never finished, and that stands before the place of the run in the order of now, would
be left out without a word: such a run waits for a worker with the other order.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from beatless.orchestrator.events import EventType
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.progress import Progress


class OtherOrder(Exception):
    """A step that the run has not executed stands before its place in this version of the plan."""

    def __init__(self, plan: str, step: str) -> None:
        super().__init__(plan, step)
        self.plan = plan
        self.step = step

    def __str__(self) -> str:
        return (
            f"plan {self.plan} has its steps in another order in this version, and would leave out "
            f"{self.step}"
        )


def passed_by(
    plan: Plan, progress: Progress, steps: Callable[[], Sequence[str] | None]
) -> str | None:
    """The step that this version of the plan would leave out; None if there is none.

    `steps` reads those of the version that the run was started with, in order; None: unknown. A
    step counts that

    1. was to come then: it follows the place, or was stepped over on the straight way to it
    2. has never finished in this run, and is a step of this version, not named in its `moved=`
    3. does not come any more: not the next one, nor one that follows that by default
    """
    if progress.undoing or progress.compensating or progress.unknown is not None:
        return None
    behind = set(_coming(plan, progress.step.name)) if progress.step is not None else set[str]()
    left = {
        name
        for name in plan.names
        if not progress.visits[name] and name not in behind and name not in plan.moved
    }
    stored = steps() if left else None
    if stored is None:
        return None
    return next((name for name in _due(plan, progress, stored) if name in left), None)


def removed(plan: Plan, progress: Progress, steps: Sequence[str]) -> list[str]:
    """The steps that a run goes on without, as this version of the plan does not have them.

    They were to come by the order of the version that the run was started with; the run stands at
    none of them, or it would wait. One that has not begun was to do all.
    """
    if progress.undoing or progress.compensating or progress.unknown is not None:
        return []
    if _has_begun(progress):
        due = _due(plan, progress, steps)
    else:
        order = [plan.current(name) for name in steps]
        due = [*order[:1], *_followed(plan, order)]
    return [name for name in due if name not in plan.names and not progress.visits[name]]


def changed_places(plan: Plan, steps: Sequence[str]) -> bool:
    """Whether steps that both versions have stand in another order in this one."""
    names = plan.names
    both = [name for name in map(plan.current, steps) if name in names]
    return both != sorted(both, key=names.index)


def _due(plan: Plan, progress: Progress, steps: Sequence[str]) -> Sequence[str]:
    """Those that were to come in that order, or were stepped over on the straight way there."""
    order = [plan.current(name) for name in steps]
    stands = _stands_at(plan, order, progress)
    if stands is None:
        return []
    at = order.index(stands)
    straight = [order.index(name) for name in progress.straight if name in order]
    begins = min([*straight, at])
    return [*order[begins:at], *_followed(plan, order[at:])]


def _has_begun(progress: Progress) -> bool:
    """Whether the run has a place in its plan, which a retry has from the run before it."""
    place = progress.place
    if place is None or place.type != EventType.RUN_STARTED:
        return place is not None
    return (place.data or {}).get("reused", {}).get("next") is not None


def _stands_at(plan: Plan, order: Sequence[str], progress: Progress) -> str | None:
    """The step of that order at which the run is; None if it has none to count from.

    One that another version has added is not in it: then the last one before it that is.
    """
    place = progress.place
    if place is None:
        return None
    data = place.data or {}
    if place.type == EventType.RUN_STARTED:
        name = data.get("reused", {}).get("next")
    elif "next" in data:
        name = data["next"]
    else:
        name = step_of(place.step or "")
    if name is None:
        return None
    now = plan.current(name)
    if now in order:
        return now
    return max((each for each in progress.straight if each in order), key=order.index, default=None)


def _followed(plan: Plan, order: Sequence[str]) -> Iterator[str]:
    """Those that follow the first one by default, as far as this version knows."""
    names = plan.names
    for name, following in pairwise(order):
        if name in names and not plan.falls_through(name):
            return
        yield following


def _coming(plan: Plan, name: str) -> Iterator[str]:
    """This step and those that may come behind it without a choice, or by one that must be made."""
    seen, ahead = set[str](), [name]
    while ahead:
        each = ahead.pop()
        if each in seen or each not in plan.names:
            continue
        seen.add(each)
        yield each
        following = plan.after(each)
        if not plan.falls_through(each):
            ahead += plan.routes.get(each, ())
        elif following is not None:
            ahead.append(following.name)
