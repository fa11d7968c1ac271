"""The commits of a run of a list of steps at children, and before steps with limits. Pure."""

from collections.abc import Sequence
from typing import Any

from beatless.orchestrator.boundaries import Boundaries, Conclusion
from beatless.orchestrator.child_calls import Children, failure_of
from beatless.orchestrator.child_elements import ChildElement
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.plan import Element, Step
from beatless.orchestrator.progress import Progress, following_name, known_step
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState


class ListBoundaries(Boundaries):
    """The boundaries of one run of a list of steps."""

    def children_started(self, progress: Progress, children: Children, digest: str) -> Settlement:
        """The start of the children of an element; they are stored in the same transaction."""
        started = children.started(progress.occurrence, arguments=digest)
        going_on = Boundary(events=[started], state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, [])

    def children_ended(
        self,
        progress: Progress,
        element: ChildElement,
        children: Children,
        result: Any,
        *,
        gives_back: bool,
    ) -> Conclusion:
        """The end of the wait for the children of an element; of one alone with its `result`."""
        data: dict[str, Any] = {}
        if children.error is not None and element.on_failure is None:
            ended = children.finished(progress.key)
            failed = self.broken(failure_of(children.error), [ended])
            return Conclusion(settlement=failed, following=None)
        if children.error is not None and element.on_failure is not None:
            following: Element | None = known_step(self._plan, element.on_failure.step)
            data["next"] = element.on_failure.step
        else:
            following = progress.after(self._plan, element.name)
            data |= following_name(following, is_last=gives_back)
            if element.alone:
                data["result"] = result
        finished = children.finished(progress.key, **data)
        if following is None:
            run_result = result if element.alone else progress.result
            completed = self.completed(run_result, [finished])
            return Conclusion(settlement=completed, following=None)
        if gives_back:
            returned = self._given_back(progress, "shutdown", [finished])
            return Conclusion(settlement=returned, following=following)
        visit = progress.visits[following.name] + 1 + (following is element)
        return self._going_on(progress, finished, following, visit)

    def _going_on(
        self, progress: Progress, finished: NewEvent, following: Element, visit: int
    ) -> Conclusion:
        limited = isinstance(following, Step) and following.limits
        if not (limited or isinstance(following, ChildElement)):
            return super()._going_on(progress, finished, following, visit)
        events: Sequence[NewEvent] = [finished]
        going_on = Boundary(events=events, state=RunState.RUNNING)
        settlement = self._unless_cancelled(progress, going_on, events)
        return Conclusion(settlement=settlement, following=following)
