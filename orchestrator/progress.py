"""The place of a run in its plan, folded from its events. Pure: it reads and writes nothing."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from beatless.orchestrator.child_calls import Children
from beatless.orchestrator.errors import BadPayload, RunCancelled
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.function_plan import VERSIONS
from beatless.orchestrator.open_waits import Approval, OpenWaits, received_of
from beatless.orchestrator.plan import Element, Plan, Step, occurrence, step_of
from beatless.orchestrator.waits import Wait, WaitKind

SNOOZED = "beatless.snoozed"
"""The trace that a Snooze leaves: the attempt before it was not a failure."""

GIVEN_BACK = "beatless.given_back"
"""An attempt that its worker gave back, as it stopped or was busy: it does not count."""

CONNECTION_LOST = "beatless.connection_lost"
"""The trace of a transaction that Postgres took back: its attempt is made again, uncounted.

With `refused`, there was no connection to begin it on.
"""

VALUE = "beatless.value"
"""The trace of a time, random number or UUID that a plan's function was given."""

TAKEN_OVER = "beatless.taken_over"
"""The trace of a claim of a plan's function whose last worker died or lost its lease."""

PROCESS_DIED = "process_died"
"""In a GIVEN_BACK: it was written for a process that has died with others' bodies in hand."""

RAN_OUT = "lease_ran_out"
"""In a GIVEN_BACK and a TAKEN_OVER: nobody knows that its process has died. Its lease ran out."""

SUSPECT = "beatless.suspect"
"""The trace of a suspect whose body is to be called. `alone`: no other runs in its process."""

LEFT_OUT = "beatless.left_out"
"""The trace of a call without an end that `removed=` names: the function goes on without it."""

UNCOUNTED = (SNOOZED, GIVEN_BACK, CONNECTION_LOST)
"""The traces of attempts that do not count."""

FOLDED = (*UNCOUNTED, VALUE, TAKEN_OVER, LEFT_OUT)
"""The traces that give the place of a run."""

UNKNOWN_STEP = "unknown_step"
"""Why a run waits that stands at a step which the worker's version of the plan does not have."""

CHANGED_CALL = "changed_call"
"""Why a run waits whose plan's function gave a stored call other arguments in this version."""

RENAMED_FROM = "renamed_from"
"""In StepStarted: the name that the occurrence had at its first attempt, and has in its key."""

ON_CANCEL = "on_cancel"
"""In CancelRequested: the step that is to undo the run. In StepFinished: that it has."""

FOLLOWING = "following"
"""In StepFinished and WaitFinished, if no step begins with it: what follows by the writer's plan.

A process that knows no waits finds one there that it does not have, and leaves it alone.
"""

BESIDE_OTHERS = VERSIONS
"""Added to `version` in the StepStarted of a step that is begun beside others of its run.

A process that knows no such steps takes it for a version that is higher than its own, and leaves
the run alone.
"""

RETRY_IN = "retry_in"
"""In StepFailed, of a step that is tried again while others of its run are in flight: in how many
seconds."""

UNDO, GIVEN = "undo", "given"
"""In StepStarted: the name of the step that undoes this one, and the arguments that a function has
given it: `args` and `kwargs`."""

UNDOES = "undoes"
"""In StepFinished: the step that is undone by it, by the name that this began with."""

CHILDREN = "children"
"""In RunRestarted: how many children the run has started before."""

LAST = "last"
"""In `reused`: the name of the result that was the last one."""

SIGNALS = "signals"
"""In `reused`: the names of the results that are signals, or approvals."""

FINAL = "final"
"""In StepFailed, where the run goes on: the step is not tried again.

Of a plan's function, which is told; or of a cancelled run, whose `on_cancel` step follows."""


ARGUMENTS = "arguments"
"""In StepStarted and ChildrenStarted: the digest of the arguments, or inputs, that were given."""

WAS_UNDONE = "its steps were undone: name no step to begin with, for it begins at the beginning"

MAX_RAN_OUT = 20
"""Leases in a row that may run out while a step has no outcome: a step that kills each worker where
nobody notices it, as behind a pooler, would else do so for ever."""

CALM = 2
"""Leases in a row that run out without making a step a suspect."""

MAX_DEATHS = 20
"""Deaths of workers in one step, with others beside it, after which it is taken for their cause all
the same. Where it can be executed alone, as in `--pool async`, it is so before."""


class UnknownStep(Exception):
    """The journal is at a step that this version of the plan does not have."""

    def __init__(self, plan: str, step: str) -> None:
        super().__init__(plan, step)
        self.plan = plan
        self.step = step

    def __str__(self) -> str:
        return f"plan {self.plan} has no step {self.step} in this version"


@dataclass(slots=True, kw_only=True)
class Progress:
    """The place of a run, folded from its events. Steps have the names of this plan's version."""

    step: Element | None
    """The next step or wait; None when all have finished."""
    place: Event | None = None
    """The last event that says where the run is."""
    unknown: str | None = None
    """The next step's name, if this version of the plan does not have it: then `step` is None."""
    begun: str | None = None
    """The occurrence whose attempts are counted, by the name that its first attempt had."""
    results: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    """That of the step, or child of an element, that finished last."""
    last: str | None = None
    """The occurrence of that."""
    visits: Counter[str] = field(default_factory=Counter)
    straight: set[str] = field(default_factory=set)
    """The steps that have finished since a route was last taken."""
    starts: int = 0
    failures: int = 0
    lost: int = 0
    """Transactions in a row that Postgres took back."""
    refused: int = 0
    """Those that it did not let begin."""
    deaths: int = 0
    """Of the processes that executed this step beside others, since it last had an outcome."""
    ran_out: int = 0
    """Leases that ran out while it was executed, since it last had an outcome."""
    in_flight: bool = False
    """Its last attempt has no outcome."""
    promised: str | None = None
    """The `on_cancel` step of the plan that the cancel was accepted by."""
    compensating: bool = False
    """The run is cancelled, and the plan's `on_cancel` step comes last."""
    children: Children | None = None
    """Those that the element at which the run is has started."""
    arguments: str | None = None
    """The digest of the inputs that they were given."""
    children_started: int = 0
    """The highest number that a child was given."""
    begun_undos: bool = False
    """A step that is to be undone was begun."""
    undoing: bool = False
    """The run has failed, and its steps are being undone."""
    inbox: OpenWaits = field(default_factory=OpenWaits)
    """The open waits, and the signals that no wait has taken."""
    approvals: set[str] = field(default_factory=set)
    """The names of the results that are approvals."""

    @property
    def occurrence(self) -> str:
        """The name of this visit to the step: `name`, then `name#2`."""
        return "" if self.step is None else self.upcoming(self.step)

    def upcoming(self, step: Element) -> str:
        """The name of the next visit to a step."""
        return occurrence(step.name, self.visits[step.name] + 1)

    @property
    def key(self) -> str:
        """The name of this occurrence when it began: a rename leaves its key alone."""
        return self.begun or self.occurrence

    @property
    def crashes(self) -> int:
        """Attempts that ended without a word: their process died."""
        return self.starts - self.failures

    @property
    def suspicions(self) -> int:
        """How often it may have been what a process died of that executed it beside others.

        Leases run out by themselves too: the first ones are none.
        """
        return self.deaths + max(0, self.ran_out - CALM)

    def is_deadly(self, max_crashes: int) -> bool:
        """Whether the step has ended its process, or is taken for that, too often."""
        return (
            self.crashes >= max_crashes
            or self.deaths >= MAX_DEATHS
            or self.ran_out >= most_ran_out(max_crashes)
        )

    def after(self, plan: Plan, name: str) -> Element | None:
        """The step or wait that follows this one by default, or None at the end.

        Only a route leads back to a step that has finished. If one comes next in the list, it stood
        before this one when the run passed it: it is not done again.
        """
        following = plan.after(name)
        while following is not None and following.name in self.straight:
            following = plan.after(following.name)
        return following

    def finished(self, name: str, result: Any, *, routed: bool) -> None:
        """A visit to the step of this name has its result."""
        self.passed(name, result, routed=routed)
        self.result, self.last = result, occurrence(name, self.visits[name])

    def passed(self, name: str, result: Any, *, routed: bool) -> None:
        """The same of a wait, whose result is not that of the run."""
        self.straight.add(name)
        if routed:
            self.straight.clear()
        self.visits[name] += 1
        visit = occurrence(name, self.visits[name])
        self.results[visit] = self.results[name] = result
        if type(result) is Approval:
            self.approvals.update((visit, name))

    def shown_results(self, plan: Plan) -> dict[str, Any]:
        """The results for the body of a step: approvals have the type of their forms."""
        if not self.approvals:
            return self.results
        return self.results | {name: self._shown(plan, name) for name in self.approvals}

    def unreadable(self, plan: Plan) -> str | None:
        """The name of an approval that this version of the plan cannot take."""
        for name in self.approvals:
            try:
                self._shown(plan, name)
            except BadPayload:
                return name
        return None

    def _shown(self, plan: Plan, name: str) -> Any:
        """Raises BadPayload."""
        element, found = plan.get(step_of(name)), self.results[name]
        if isinstance(element, Wait) and element.form and isinstance(found, Approval):
            return found.as_form(element.form)
        return found

    def go_on(self, step: Element | None, *, begun: str | None = None) -> None:
        """This step comes next; nothing of it is counted yet."""
        self.step, self.unknown, self.begun, self.children = step, None, begun, None
        self.starts = self.failures = 0
        self.in_flight = False
        self.judged()

    def begin_wait(self, wait: Wait, seq: int) -> None:
        """The wait at which the run is has begun, with the event of this seq."""
        self.inbox.begin(self.key, wait.kind, wait.names, seq=seq)

    def begin_children(self, children: Children, arguments: str | None) -> None:
        """The element at which the run is has started these."""
        self.begun, self.children, self.arguments = self.key, children, arguments
        self.children_started = max(self.children_started, children.last)

    def children_ended(self, name: str, result: Any, *, alone: bool, routed: bool) -> None:
        """The children of the element of this name have ended."""
        if alone and not routed:
            self.finished(name, result, routed=False)
        else:
            self.passed(name, result, routed=routed)

    def cancel(self, on_cancel: Step | None) -> None:
        """The run is cancelled: its plan's `on_cancel` step comes next, or the one promised."""
        if self.compensating:
            return
        if on_cancel is not None:
            self.compensate(on_cancel)
        elif self.promised is not None:
            self.lacks(self.promised)

    def compensate(self, step: Step) -> None:
        """The run was cancelled; the step that undoes it comes next."""
        self.go_on(step)
        self.compensating = True

    def lacks(self, step: str) -> None:
        """The same, and this version of the plan has no such step."""
        self.go_on(None)
        self.unknown, self.compensating = step, True

    def uncounted(self) -> None:
        """The attempt was ended by no fault of the step's."""
        self.starts -= 1
        self.in_flight = False

    def traced(self, name: str, data: dict[str, Any]) -> None:
        """Take up a trace after which an attempt does not count.

        Only one that is in flight: several may have written one about the same attempt.
        """
        was_in_flight = self.in_flight
        if was_in_flight:
            self.uncounted()
        if name == SNOOZED:
            self.judged()
        elif name == CONNECTION_LOST:
            self.note_loss(refused=data.get("refused", False))
        elif was_in_flight:
            self.deaths += bool(data.get(PROCESS_DIED))
            self.ran_out += bool(data.get(RAN_OUT))

    def judged(self) -> None:
        """The attempt ended by the step's own outcome: earlier losses no longer count."""
        self.lost = self.refused = self.deaths = self.ran_out = 0
        self.in_flight = False

    def lose(self, *, refused: bool) -> None:
        """Its transaction is gone, or never was."""
        self.uncounted()
        self.note_loss(refused=refused)

    def note_loss(self, *, refused: bool) -> None:
        """One more transaction in a row; its attempt is uncounted elsewhere."""
        self.lost += not refused
        self.refused += refused


def most_ran_out(max_crashes: int) -> int:
    """How many leases may run out in a row: of a step that shall not be begun twice, none."""
    return 1 if max_crashes == 1 else max(max_crashes, MAX_RAN_OUT)


def fold(plan: Plan, events: Sequence[Event]) -> Progress:
    """The place of a run in its plan.

    Attempts are counted by the names of the journal: attempts that another version of the plan has
    begun never count on another step. The plan is consulted once, for the last place.
    """
    progress, place, stopping = Progress(step=None), events[0], False
    for event in events:
        data = event.data or {}
        match event.type:
            case EventType.RUN_STARTED:
                reused = data.get("reused", {})
                signals = reused.get(SIGNALS, ())
                for name, result in reused.get("results", {}).items():
                    stored = received_of(result) if name in signals else result
                    progress.results[plan.current(name)] = stored
                    if type(stored) is Approval:
                        progress.approvals.add(plan.current(name))
                for name, visits in reused.get("visits", {}).items():
                    progress.visits[plan.current(name)] += visits
                progress.straight.update(map(plan.current, reused.get("passed", ())))
                if LAST in reused:
                    progress.last = plan.current(reused[LAST])
                    progress.result = progress.results.get(progress.last)
            case EventType.STEP_STARTED:
                place, begun = event, first_name(event)
                progress.begun_undos |= UNDO in data
                if begun != progress.begun:
                    progress.go_on(None, begun=begun)
                    # No other step begins after a cancel.
                    progress.compensating = stopping
                progress.starts += 1
                progress.in_flight = True
            case EventType.STEP_FAILED:
                progress.failures += 1
                progress.judged()
                error = data.get("error") or {}
                if error.get("type") == RunCancelled.__name__ and plan.on_cancel is not None:
                    stopping = True
                    if not progress.compensating:
                        progress.compensate(plan.on_cancel)
            case EventType.UNDO_STARTED:
                progress.undoing = True
            case EventType.CANCEL_REQUESTED:
                stopping, progress.promised = True, data.get(ON_CANCEL)
            case EventType.DEBUG_TRACE if (name := data.get("name")) in UNCOUNTED:
                progress.traced(name, data)
            case EventType.STEP_FINISHED:
                place = event
                name = plan.current(step_of(event.step or ""))
                progress.finished(name, data.get("result"), routed="next" in data)
                progress.go_on(None)
            case EventType.WAIT_STARTED:
                place = event
                progress.inbox.note(event)
                progress.go_on(None, begun=event.step)
            case EventType.WAIT_FINISHED:
                place = event
                name = plan.current(step_of(event.step or ""))
                progress.passed(name, progress.inbox.note(event), routed="next" in data)
                progress.go_on(None)
            case EventType.SIGNAL_RECEIVED:
                progress.inbox.note(event)
            case EventType.CHILDREN_STARTED:
                place = event
                progress.go_on(None, begun=event.step)
                progress.begin_children(Children.from_event(event), data.get(ARGUMENTS))
            case EventType.CHILDREN_FINISHED:
                place = event
                children = progress.children or Children.from_event(event)
                alone = children.run_id is not None
                progress.children_ended(
                    plan.current(step_of(event.step or "")),
                    data.get("error") or (data.get("result") if alone else children),
                    alone=alone,
                    routed="next" in data,
                )
                progress.go_on(None)
            case EventType.RUN_RESTARTED:
                progress.results.clear()
                progress.children_started = data.get(CHILDREN, 0)
    progress.place = place
    if progress.undoing:
        return progress
    if progress.compensating and progress.begun is None:
        return progress  # the `on_cancel` step has not begun
    if progress.approvals and (unreadable := progress.unreadable(plan)) is not None:
        progress.unknown = unreadable
        return progress
    try:
        progress.step = next_step(plan, place, undoing=progress.compensating, after=progress.after)
    except UnknownStep as error:
        progress.step, progress.unknown = None, error.step
    return progress


def next_step(
    plan: Plan,
    place: Event,
    *,
    undoing: bool,
    after: Callable[[Plan, str], Element | None] = Plan.after,
) -> Element | None:
    """The step or wait that a run goes on with after the last RunStarted, or the last start or end.

    None if all have finished. Raises UnknownStep, also for a step that has the other role in this
    version: `undoing`: whether it is the one that undoes the run.

    1. a step that has begun, or that was chosen: that one
    2. after a step of the plan, the one that is `after` it in this version of the plan
    3. after another one, the one that would have followed in the version that finished it

    For 2 too the plan must have that one: a version that does not know it may be older, and must
    not pass it by.
    """
    found = _next_step(plan, place, after)
    if found is not None and found.name in plan.undo_steps:
        return found
    if found is not None and (found is plan.on_cancel) is not undoing:
        raise UnknownStep(plan.name, found.name)
    return found


def _next_step(
    plan: Plan, place: Event, after: Callable[[Plan, str], Element | None]
) -> Element | None:
    data = place.data or {}
    match place.type:
        case EventType.STEP_STARTED:
            return _begun(plan, place, None)
        case EventType.WAIT_STARTED:
            return _begun(plan, place, data.get("kind"))
        case EventType.CHILDREN_STARTED:
            return _begun(plan, place, WaitKind.CHILDREN)
        case EventType.STEP_FINISHED | EventType.WAIT_FINISHED | EventType.CHILDREN_FINISHED:
            if "next" in data:
                return None if data["next"] is None else known_step(plan, data["next"])
            followed = known_step(plan, data[FOLLOWING]) if FOLLOWING in data else None
            finished = plan.get(step_of(place.step or ""))
            if finished is not None and finished is not plan.on_cancel:
                return after(plan, finished.name)
            return followed or known_step(plan, step_of(place.step or ""))
        case _:
            chosen = data.get("reused", {}).get("next")
            return plan.first if chosen is None else known_step(plan, chosen)


def _begun(plan: Plan, place: Event, kind: str | None) -> Element:
    """The step, or wait of this kind, that has begun. Raises UnknownStep.

    Also if something else has its name in this version: what has begun would never end.
    """
    found = known_step(plan, step_of(place.step or ""))
    if kind != (found.kind if isinstance(found, Wait) else None):
        raise UnknownStep(plan.name, found.name)
    return found


def first_name(started: Event) -> str | None:
    """The name that the first attempt of this occurrence had."""
    name: str | None = (started.data or {}).get(RENAMED_FROM, started.step)
    return name


def known_step(plan: Plan, name: str) -> Element:
    """The step or wait of this name. Raises UnknownStep."""
    found = plan.get(name)
    if found is None:
        raise UnknownStep(plan.name, name)
    return found


def following_name(following: Element | None, *, is_last: bool) -> dict[str, str]:
    """The member of the event that ends a step or a wait, if no step begins with it."""
    if following is not None and (is_last or isinstance(following, Wait)):
        return {FOLLOWING: following.name}
    return {}
