"""The commits of a run whose steps are being undone. Pure, as `boundaries`. No cancel matters."""

from collections.abc import Sequence
from typing import Any

from beatless.orchestrator.boundaries import Boundaries, Conclusion
from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.failure import cancel_error
from beatless.orchestrator.outcomes import Finish, Goto, Snooze
from beatless.orchestrator.plan import Plan, Step
from beatless.orchestrator.progress import ON_CANCEL, UNDOES, Progress
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.undos import Undoing, Undos, undos_of


class UndoBoundaries(Boundaries):
    """The boundaries of one run while it is undone."""

    def __init__(self, plan: Plan, run_id: str, *, max_event_bytes: int) -> None:
        super().__init__(plan, run_id, max_event_bytes=max_event_bytes)
        self.undos: Undos = undos_of(plan, run_id, [], {})
        """Those of the journal, as it was read last."""

    def concluded(
        self, progress: Progress, step: Step, value: Any, *, late: bool, gives_back: bool
    ) -> Conclusion:
        """The end of one undo, with the start of the next, or the end of the run."""
        assert isinstance(progress, Undoing)  # noqa: S101 - no other place is taken here
        if isinstance(value, Snooze):
            return super().concluded(progress, step, value, late=late, gives_back=gives_back)
        if isinstance(value, Goto | Finish):
            raise Fatal(
                f"step {step.name} returned a {type(value).__name__}, and undoes another one: "
                "nothing follows from it"
            )
        of_what = {ON_CANCEL: True} if progress.undoes is None else {UNDOES: progress.undoes}
        finished = self._event(EventType.STEP_FINISHED, progress, result=value, **of_what)
        self.undos.end(progress)
        following = self.undos.next()
        if following is None:
            return Conclusion(settlement=self.ended([finished]), following=None)
        if gives_back or following.step is None:
            returned = self._given_back(progress, "shutdown", [finished])
            return Conclusion(settlement=returned, following=step)
        following.starts += 1
        going_on = Boundary(events=[finished, self._start(following)], state=RunState.RUNNING)
        settlement = Settlement.ignoring_cancel(going_on)
        return Conclusion(settlement=settlement, following=following.step)

    def ended(self, events: Sequence[NewEvent] = ()) -> Settlement:
        """All is undone: the end of the run, which has failed unless it was cancelled."""
        failures = self.undos.failures()
        told = {"undo": failures} if failures else {}
        cancel = cancel_error(self.undos.reason) | told
        if (failure := self.undos.failure_of_cancel()) is not None:
            cancel |= {ON_CANCEL: failure}
        cancelled = self._end(RunState.CANCELLED, events, cancel)
        if self.undos.cancelled or self.undos.error is None:
            return Settlement.ignoring_cancel(cancelled)
        if self._plan.on_cancel is not None:  # it comes first, if a cancel was just accepted
            cancelled = Boundary(events=events, state=RunState.QUEUED)
        failed = self._end(RunState.FAILED, events, self.undos.error | told)
        return Settlement(normal=failed, if_cancelled=cancelled, reason="cancel")

    def _given_up(self, progress: Progress, failed: NewEvent, facts: dict[str, Any]) -> Settlement:
        """This one cannot be undone; the others still are, in another claim."""
        del failed
        assert isinstance(progress, Undoing)  # noqa: S101 - no other place is taken here
        final = self._failure(progress, facts, final=True)
        return Settlement.ignoring_cancel(Boundary(events=[final], state=RunState.QUEUED), "undo")
