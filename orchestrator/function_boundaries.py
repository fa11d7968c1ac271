"""The commits of a run whose plan is a function. Pure, as `boundaries`.

A step that has failed for good ends no run: the function is told, and decides. A boundary alone
gives the run back, and whoever claims it calls the function again; where the function can be told
at once, `joined` writes its next call into the same boundary.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from beatless.orchestrator.boundaries import Boundaries, Conclusion
from beatless.orchestrator.child_calls import ChildCall, Children
from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.events import EventType, NewEvent, encode
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import (
    CLAIM,
    GENERATION,
    SIGNALS_FROM,
    VERSION,
    VISITS,
    History,
    StoredCall,
)
from beatless.orchestrator.open_waits import wait_started
from beatless.orchestrator.outcomes import Finish, Goto, Snooze
from beatless.orchestrator.plan import Step
from beatless.orchestrator.progress import (
    ARGUMENTS,
    BESIDE_OTHERS,
    CHILDREN,
    FINAL,
    FOLLOWING,
    GIVEN,
    GIVEN_BACK,
    LEFT_OUT,
    RAN_OUT,
    RETRY_IN,
    TAKEN_OVER,
    VALUE,
    Progress,
)
from beatless.orchestrator.replay import Again, Call
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import WAITS, RunState
from beatless.orchestrator.waits import Wait

ABANDONED = "the function of the plan went on without it: its branch or task was ended"

MAX_TAKEOVERS = 5
"""Claims in a row that die without a new event until the run fails."""


class FunctionBoundaries(Boundaries):
    """The boundaries of one run of a plan that is a function."""

    def __init__(
        self, plan: FunctionPlan, run_id: str, *, max_event_bytes: int, version: int
    ) -> None:
        """`version` is the one that the run was started with."""
        super().__init__(plan, run_id, max_event_bytes=max_event_bytes)
        self._number = plan.number
        self._begun_as = {} if version == plan.number else {VERSION: plan.number}

    # The function is called, and says how it goes on

    def taken_over(self, claim: int, *, ran_out: bool) -> Settlement:
        """The last claim ended without a word: counted before the function is called.

        `ran_out`: nobody knows that its process has died.
        """
        facts: dict[str, Any] = {"name": TAKEN_OVER, CLAIM: claim}
        if ran_out:
            facts[RAN_OUT] = True
        note = NewEvent(type=EventType.DEBUG_TRACE, data=_text(facts))
        return Settlement.ignoring_cancel(Boundary(events=[note], state=RunState.RUNNING))

    def plan_crashed(self, takeovers: int, ran_out: int) -> Settlement:
        """The function has ended its process, or lost its lease, too often."""
        message = f"the function of the plan ended its process {takeovers - ran_out} times in a row"
        if ran_out:
            message = (
                f"the function of the plan was called {takeovers} times in a row without a word "
                f"from it: it ended its process {takeovers - ran_out} times, and {ran_out} times "
                "its lease ran out, for its worker stood still, was cut off, or died where nobody "
                "notices it"
            )
        return self._ended(RunState.FAILED, [], {"type": "PlanCrashed", "message": message})

    def values(self, drawn: Sequence[tuple[str, Any]]) -> list[NewEvent]:
        """The traces of values that the function was given."""
        return [
            NewEvent(
                type=EventType.DEBUG_TRACE,
                data=_text({"name": VALUE, "kind": kind, "value": value}),
            )
            for kind, value in drawn
        ]

    def left_out(self, calls: Sequence[StoredCall]) -> list[NewEvent]:
        """The traces of calls that the function goes on without."""
        return [
            NewEvent(
                type=EventType.DEBUG_TRACE,
                step=call.occurrence,
                attempt=max(call.starts, 1),
                data=_text({"name": LEFT_OUT}),
            )
            for call in calls
        ]

    def joined(
        self, progress: Progress, outcome: NewEvent, values: Sequence[NewEvent], call: Call
    ) -> Settlement:
        """The outcome of a step or wait with the start of what the function has asked for then."""
        if isinstance(call.step, Wait):
            begun = self._wait_start(call.named, call.step)
        else:
            begun = self._start(call)
        going_on = Boundary(events=[outcome, *values, begun], state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, [outcome])

    def children_started(
        self,
        progress: Call,
        call: ChildCall,
        children: Children,
        values: Sequence[NewEvent],
    ) -> Settlement:
        """The start of the children of a call; they are stored in the same transaction."""
        started = self.children_event(progress, call, children)
        going_on = Boundary(events=[*values, started], state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, values)

    def children_event(self, progress: Call, call: ChildCall, children: Children) -> NewEvent:
        """The event by which the children of a call are started."""
        data: dict[str, Any] = dict(self._begun_as)
        if call.detached:
            data["detached"] = True
        if progress.arguments is not None:
            data[ARGUMENTS] = progress.arguments
        return children.started(progress.named, **data)

    def drawn(self, progress: Progress, values: Sequence[NewEvent]) -> Settlement:
        """The values that the function was given before a wait that begins with no event."""
        going_on = Boundary(events=values, state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, values)

    def alone(
        self, progress: Progress, outcome: NewEvent, values: Sequence[NewEvent], call: Call
    ) -> Settlement:
        """The outcome of a step or wait, before children are started or waited for."""
        events = [_followed(outcome, call), *values]
        going_on = Boundary(events=events, state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, events)

    def promised(
        self, progress: Progress, outcome: NewEvent, values: Sequence[NewEvent], call: Call
    ) -> Settlement:
        """The run is given back before the step or wait that the function has asked for.

        With the values that the function was given: which call it has asked for may hang on them.
        """
        return self._given_back(progress, "shutdown", [_followed(outcome, call), *values])

    # Steps that are executed at the same time

    def going_on(self, events: Sequence[NewEvent], begun: Sequence[NewEvent] = ()) -> Settlement:
        """These events, and unless the run is cancelled also those with which it goes on.

        Either way the run stays in its worker: steps are in flight, or other events follow.
        """
        return Settlement(
            normal=Boundary(events=[*events, *begun], state=RunState.RUNNING),
            if_cancelled=Boundary(events=events, state=RunState.RUNNING),
        )

    def begun_beside(self, call: Call) -> NewEvent:
        """The start of a step, or wait, that is begun beside others of the run."""
        if isinstance(call.step, Wait):
            return self._wait_start(call.named, call.step)
        return self._start(call, **{VERSION: BESIDE_OTHERS + self._number})

    def note_begun(self) -> None:
        """What the last boundary was to begin has begun: the run was not cancelled before."""
        self.undoes |= self._begins_undone

    def left_beside(self, settlement: Settlement, calls: Sequence[Call]) -> Settlement:
        """A boundary that ends an attempt by force, with those that are in flight beside it.

        They are given back, as the run is, at once.
        """
        notes = [self.given_back(call) for call in calls]

        def with_others(boundary: Boundary) -> Boundary:
            return replace(boundary, events=[*notes, *boundary.events], delay_s=0.0)

        return replace(
            settlement,
            normal=with_others(settlement.normal),
            if_cancelled=with_others(settlement.if_cancelled),
        )

    def given_back(self, call: Call, *, why: str | None = None) -> NewEvent:
        """The trace of an attempt that is made again, uncounted.

        `why`: its process has died with others beside it (`PROCESS_DIED`), or may have (`RAN_OUT`).
        """
        data = {"name": GIVEN_BACK} | ({} if why is None else {why: True})
        return self._event(EventType.DEBUG_TRACE, call, **data)

    def abandoned(self, call: Call, facts: dict[str, Any] | None = None) -> NewEvent:
        """The end of a step whose task or branch has ended before; the facts of its own error."""
        ended = {"type": "StepAbandoned", "message": ABANDONED, "step": call.named}
        return self._failure(call, facts or ended, final=True)

    def retried(self, failed: NewEvent, retry_in: float) -> NewEvent:
        """A failure after which the run stays, and the step is tried again in so many seconds."""
        data = json.loads(failed.data or "{}") | {RETRY_IN: retry_in}
        return replace(failed, data=_text(data))

    def cancelled(self) -> Settlement:
        """The end of a cancelled run, or of its way to be undone, when nothing is in flight."""
        return Settlement.ignoring_cancel(self._cancelled([]), "cancel")

    def parked_until(self, progress: Progress, delay_s: float, *, waits: bool) -> Settlement:
        """The run leaves its worker until the next attempt of a step is due, or a wait ends."""
        return self._given_back(progress, WAITS if waits else "retry", [], delay_s)

    def restarted(
        self,
        again: Again,
        history: History,
        visits: dict[str, int],
        told: int,
        events: Sequence[NewEvent],
    ) -> Settlement:
        """The function begins again, in another claim. Raises BadPayload.

        Signals up to the seq `told` are in the history.
        """
        waiting = [signal.seq for signal in history.inbox.signals]
        facts = {
            GENERATION: history.generation + 1,
            "input": again.input,
            VISITS: visits,
            SIGNALS_FROM: min([told + 1, *waiting]),
        }
        if history.children:
            facts[CHILDREN] = history.children
        text = encode(facts, where="the input of run.again", limit=self._max_event_bytes)
        restarted = NewEvent(type=EventType.RUN_RESTARTED, data=text)
        due = Boundary(events=[*events, restarted], state=RunState.QUEUED)
        return Settlement(normal=due, if_cancelled=self._cancelled(events), reason="again")

    # Its steps

    def _start(self, progress: Progress, **data: Any) -> NewEvent:
        if isinstance(progress, Call):
            if progress.beside:
                data = {VERSION: BESIDE_OTHERS + self._number} | data
            data = self._begun_as | data
            if progress.arguments is not None:
                data[ARGUMENTS] = progress.arguments
        started = super()._start(progress, **data)
        if not isinstance(progress, Call) or progress.given is None:
            return started
        given = {GIVEN: progress.given}
        return replace(started, data=_text(json.loads(started.data or "{}") | given))

    def _wait_start(self, occurrence: str, wait: Wait) -> NewEvent:
        return wait_started(occurrence, wait, **self._begun_as)

    def concluded(
        self, progress: Progress, step: Step, value: Any, *, late: bool, gives_back: bool
    ) -> Conclusion:
        """The result of the step, alone. Raises Fatal for a route, and BadPayload."""
        if progress.compensating or isinstance(value, Snooze):
            return super().concluded(progress, step, value, late=late, gives_back=gives_back)
        if isinstance(value, Goto | Finish):
            raise Fatal(
                f"step {step.name} returned a {type(value).__name__}, and the function of plan "
                f"{self._plan.name} decides how it goes on: return a result"
            )
        finished = self._event(EventType.STEP_FINISHED, progress, result=value)
        settlement = self._given_back(progress, "shutdown", [finished])
        return Conclusion(settlement=settlement, following=step)

    def _given_up(self, progress: Progress, failed: NewEvent, facts: dict[str, Any]) -> Settlement:
        """The step has failed for good; whoever claims the run next tells the function."""
        if progress.compensating:
            return super()._given_up(progress, failed, facts)
        told = replace(failed, data=_text(json.loads(failed.data or "{}") | {FINAL: True}))
        waiting = Boundary(events=[told], state=RunState.QUEUED)
        return self._unless_cancelled(progress, waiting, [told])


def _followed(outcome: NewEvent, call: Call) -> NewEvent:
    """The outcome of a step or wait, with the name of the call that comes next."""
    data = json.loads(outcome.data or "{}") | {FOLLOWING: call.named}
    return replace(outcome, data=_text(data))


def _text(data: dict[str, Any]) -> str:
    """Data that has been checked before, or is ours, as JSON."""
    return encode(data, where="an event", limit=2**30)
