"""The work on one claimed run of a list of steps. Does no I/O, as `execution`.

At an element that starts children, their ChildrenStarted is committed with the first of them; then
the run leaves the worker until it can start further ones, or all have ended.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from beatless.orchestrator.arguments import digest
from beatless.orchestrator.child_calls import (
    PAGE_CHILDREN,
    ChildCall,
    ChildEnd,
    Children,
    ChildResults,
    ReadEnds,
    with_results,
)
from beatless.orchestrator.child_elements import ChildElement, ElementContext
from beatless.orchestrator.child_starts import ChildStarts
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.execution import Execution
from beatless.orchestrator.failure import raise_if_leaving
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.list_boundaries import ListBoundaries
from beatless.orchestrator.plan import Element, Plan
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP, Progress
from beatless.orchestrator.requests import (
    Commit,
    CommitIfQuiet,
    Committed,
    Part,
    Request,
    Signalled,
)
from beatless.orchestrator.state import RunState
from beatless.orchestrator.step_order import OtherOrder, passed_by
from beatless.orchestrator.waits import Wait

OTHER_INPUTS = "other inputs than are stored"

ReadSteps = Callable[[], Sequence[str] | None]
"""The names of the steps of the version that a run was started with; None: unknown."""


class ListExecution(Execution):
    """One worker's decisions about one run of a list of steps."""

    _boundaries: ListBoundaries

    def __init__(
        self,
        plan: Plan,
        lease: Lease,
        *,
        max_event_bytes: int,
        read_ends: ReadEnds,
        read_steps: ReadSteps,
        plans: Mapping[str, Plan],
        **options: Any,
    ) -> None:
        """`read_ends` reads children of the run, also in the bodies of its steps.

        `read_steps` reads those of the version of the plan that it was started with. Its children
        are runs of `plans`.
        """
        super().__init__(plan, lease, max_event_bytes=max_event_bytes, **options)
        self._boundaries = ListBoundaries(plan, self._run_id, max_event_bytes=max_event_bytes)
        self._read_ends, self._read_steps = read_ends, read_steps
        self._call: ChildCall | None = None
        """That of the element at which the run is, if this claim has made it."""
        self._unread: BaseException | None = None
        """The error of a read of children, while the function for the inputs was called."""
        self._starts = ChildStarts(
            lease,
            plan=plan.name,
            plans=plans,
            read_ends=read_ends,
            max_event_bytes=max_event_bytes,
        )

    def _fold(self) -> Generator[Request, Any, Progress]:
        progress = yield from super()._fold()
        progress.results = with_results(progress.results, self._read)
        return progress

    def _begin_attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Part:
        """As there, unless this version would leave out a step that the run has to come to."""
        left_out = passed_by(self._plan, progress, self._read_steps)
        if left_out is None:
            return (yield from super()._begin_attempt(progress, before))
        reason = str(OtherOrder(self._plan.name, left_out))
        released = self._released(progress, left_out, UNKNOWN_STEP, reason, before)
        yield from self._settle(released)
        return None

    def _begin_wait(self, progress: Progress, wait: Wait, before: Any) -> Part:
        """As there; children are started by `_wait`, in a commit of their own."""
        if isinstance(wait, ChildElement):
            return progress
        return (yield from super()._begin_wait(progress, wait, before))

    def _begin_next(self, progress: Progress, following: Element | None, begun: Committed) -> None:
        if isinstance(following, ChildElement):
            progress.go_on(following)
        else:
            super()._begin_next(progress, following, begun)

    def _wait(self, progress: Progress, wait: Wait) -> Part:
        if not isinstance(wait, ChildElement):
            return (yield from super()._wait(progress, wait))
        if self._lease.late:
            yield from self._settle(self._boundaries.overdue())
            return None
        if progress.children is None:
            return (yield from self._start_children(progress, wait))
        return (yield from self._tend(progress, wait, progress.children))

    def _read(self, first: int, last: int) -> Sequence[ChildEnd]:
        try:
            return self._read_ends(first, last)
        except BaseException as error:
            self._unread = error
            raise

    def _asked(self, progress: Progress, element: ChildElement) -> ChildCall:
        """The call of an element, by the function for its inputs. Raises what that raises."""
        run, self._unread = self._lease.run, None
        context = ElementContext(
            run_id=self._run_id,
            input=run.input,
            tags=run.tags,
            results=progress.shown_results(self._plan),
        )
        return element.call(context, progress.result)

    def _raise_unread(self) -> None:
        """Raises the error of a read: then the function that was called is not to blame."""
        if self._unread is not None:
            raise self._unread

    def _start_children(self, progress: Progress, element: ChildElement) -> Part:
        """Start the first of them."""
        if self._stopping():
            yield from self._settle(self._boundaries.shut_down(progress))
            return None
        try:
            call = self._asked(progress, element)
            found = call.numbered(progress.children_started + 1)
            children, runs = self._starts.first(call, found)
            asked = _digest(call)
        except BaseException as error:  # also of the user's function
            self._raise_unread()
            raise_if_leaving(error, self._leaving)
            yield from self._settle(self._boundaries.broken(error, []))
            return None
        settlement = self._boundaries.children_started(progress, children, asked)
        begun = yield from self._commit(Commit(settlement=settlement, children=runs))
        if begun.cancelled:
            return None
        progress.begin_children(children, asked)
        self._call = call
        return progress

    def _tend(self, progress: Progress, element: ChildElement, children: Children) -> Part:
        """Start further ones as places become free; leave the worker until that, or their end."""
        call = self._call
        if call is None and children.count > min(PAGE_CHILDREN, children.at_once or PAGE_CHILDREN):
            call, change = self._asked_again(progress, element, children)
            if change:
                return (yield from self._release_changed(progress, change))
            self._call = call
        reply: Committed | Signalled = yield CommitIfQuiet(
            settlement=self._boundaries.parked(progress),
            tends=[self._starts.tends(call, children)],
        )
        if isinstance(reply, Committed):
            return None
        for event in reply.events:
            progress.inbox.note(event)
        turn = next(iter(reply.turns), None)
        if turn is None or not (turn.done or turn.changed):
            return progress
        if turn.changed or (
            turn.done and call is not None and not call.has_inputs(children, children.numbers)
        ):
            return (yield from self._release_changed(progress, OTHER_INPUTS))
        ended = self._starts.ended(children, turn)
        return (yield from self._end_children(progress, element, ended))

    def _release_changed(self, progress: Progress, change: str) -> Part:
        """The run is left to a worker whose plan asks for the children that were asked for."""
        reason = f"plan {self._plan.name} gives {progress.key} {change}"
        at = progress.occurrence
        yield from self._settle(self._released(progress, at, CHANGED_CALL, reason))
        return None

    def _asked_again(
        self, progress: Progress, element: ChildElement, children: Children
    ) -> tuple[ChildCall | None, str]:
        """The call of an element whose children were started, or how it has changed."""
        try:
            call = self._asked(progress, element)
            changed = not call.is_open(children) and _digest(call) != progress.arguments
        except BaseException as error:  # of the user's function
            self._raise_unread()
            raise_if_leaving(error, self._leaving)
            return None, f"an exception for its inputs: {type(error).__name__}"
        return call, OTHER_INPUTS if changed else ""

    def _end_children(self, progress: Progress, element: ChildElement, children: Children) -> Part:
        """Commit the end of the wait, with all that follows from it."""
        self._call = None
        result: Any = children.error
        if result is None:
            found = ChildResults(children, self._read)
            result = found[0] if element.alone else found
        conclusion = self._boundaries.children_ended(
            progress, element, children, result, gives_back=self._stopping()
        )
        committed = yield from self._settle(conclusion.settlement)
        normal = conclusion.settlement.normal
        if committed.cancelled or normal.state is not RunState.RUNNING:
            return None
        routed = children.error is not None
        progress.children_ended(element.name, result, alone=element.alone, routed=routed)
        self._begin_next(progress, conclusion.following, committed)
        return progress


def _digest(call: ChildCall) -> str:
    return digest(call.name, list(call.inputs), {})
