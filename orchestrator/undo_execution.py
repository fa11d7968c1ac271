"""The work on one claimed run that has failed or was cancelled, and whose steps are undone.

1. fold the journal
2. have the children cancelled, and leave the worker until they have ended
3. call what undoes the step that began last, then the one before, and so on
4. then the `on_cancel` step of the plan, if the run was cancelled; then the run has ended

Does no I/O, as `execution`. Whatever fails here is told with the end of the run, and keeps nothing
else from being undone.
"""

import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from beatless.orchestrator.boundaries import Conclusion
from beatless.orchestrator.child_calls import ReadEnds, Tends, with_results
from beatless.orchestrator.events import Event, NewEvent
from beatless.orchestrator.execution import Execution, read_pages
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.plan import Plan, Step
from beatless.orchestrator.progress import Progress, fold
from beatless.orchestrator.requests import (
    CommitIfQuiet,
    Committed,
    Part,
    Request,
    Requests,
    Signalled,
)
from beatless.orchestrator.state import RunState
from beatless.orchestrator.undo_boundaries import UndoBoundaries
from beatless.orchestrator.undos import Undoing, Undos, undos_of
from beatless.orchestrator.unfit_events import folded

logger = logging.getLogger("beatless.orchestrator.executor")


class UndoExecution(Execution):
    """One worker's decisions about one run that is undone."""

    _boundaries: UndoBoundaries

    def __init__(
        self,
        plan: Plan,
        lease: Lease,
        *,
        max_event_bytes: int,
        read_ends: ReadEnds,
        **options: Any,
    ) -> None:
        """`read_ends` reads children of the run in the bodies of steps."""
        super().__init__(plan, lease, max_event_bytes=max_event_bytes, **options)
        self._boundaries = UndoBoundaries(plan, self._run_id, max_event_bytes=max_event_bytes)
        self._read_ends = read_ends
        self._has_children = False

    def _work(self) -> Requests:
        progress = yield from self._fold()
        if self._has_children and not (yield from self._end_children(progress)):
            return
        place = yield from self._begin_attempt(progress, self._ran_out(progress))
        while place is not None and place.step is not None:
            assert isinstance(place.step, Step)  # noqa: S101 - no wait undoes anything
            place = yield from self._take_storable_step(place, place.step)

    def _fold(self) -> Generator[Request, Any, Progress]:
        events: list[Event] = []
        yield from read_pages(events.extend)
        self._last_ts_ms = events[-1].ts
        whole = folded(partial(fold, self._plan), events)
        self._has_children = whole.children_started > 0
        results = with_results(whole.results, self._read_ends)
        self._boundaries.undos = folded(
            lambda found: undos_of(self._plan, self._run_id, found, results), events
        )
        return self._place()

    @property
    def _undos(self) -> Undos:
        return self._boundaries.undos

    def _place(self) -> Progress:
        """The next step that undoes another one, or the run; no step if all is undone."""
        found = self._undos.next()
        return Progress(step=None, compensating=True) if found is None else self._bound(found)

    def _bound(self, place: Undoing) -> Undoing:
        """The place with a step that is given what it undoes."""
        if place.undoes is not None and isinstance(place.step, Step):
            body, undone = place.step.function, self._undos.undone(place.undoes)
            place.step = replace(place.step, function=lambda context: body(context, undone))
        return place

    def _end_children(self, progress: Progress) -> Generator[Request, Committed | Signalled, bool]:
        """Whether all children have ended; if not, the run has left the worker until then."""
        while True:
            reply = yield CommitIfQuiet(
                settlement=self._boundaries.parked(progress),
                tends=[Tends(children=None, runs=lambda _: [])],
            )
            if isinstance(reply, Committed):
                return False
            if any(turn.done for turn in reply.turns):
                return True

    def _begin_attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Part:
        if progress.step is None and progress.unknown is None:
            yield from self._settle(self._boundaries.ended())
            return None
        return (yield from super()._begin_attempt(progress, before))

    def _go_on(
        self, progress: Progress, step: Step, conclusion: Conclusion, end: Committed
    ) -> Progress | None:
        del progress, step, end
        if conclusion.settlement.normal.state is not RunState.RUNNING:
            return None
        self._steps_left -= 1
        place = self._place()
        place.starts = 1
        return place

    def _fail(self, progress: Progress, step: Step, error: BaseException) -> Part:
        commit = self._failed(progress, step, error)
        yield from self._commit(commit)
        if commit.failure is not None and commit.failure.retry_in is None:
            logger.error(
                "a step could not be undone",
                extra={
                    "action": "not_undone",
                    "run_id": self._run_id,
                    "step": progress.occurrence,
                    "reason": commit.failure.facts["type"],
                },
            )
        return None
