"""The calls that a plan's function has made, folded from the journal of its run. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from beatless.orchestrator.arguments import digest_of_wait
from beatless.orchestrator.child_calls import RIVALS, Children
from beatless.orchestrator.errors import CannotRetry
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.open_waits import OpenWaits, Received, received_of
from beatless.orchestrator.plan import step_of
from beatless.orchestrator.progress import (
    ARGUMENTS,
    BESIDE_OTHERS,
    CHILDREN,
    CONNECTION_LOST,
    FINAL,
    FOLLOWING,
    GIVEN_BACK,
    LEFT_OUT,
    PROCESS_DIED,
    RAN_OUT,
    RENAMED_FROM,
    RETRY_IN,
    SIGNALS,
    SNOOZED,
    TAKEN_OVER,
    UNCOUNTED,
    UNDO,
    VALUE,
    WAS_UNDONE,
)
from beatless.orchestrator.records import Run

VERSION = "version"
"""In StepStarted: the plan's version, if the run was started with another one."""

GENERATION, VISITS, SIGNALS_FROM = "generation", "visits", "signals_from"
"""In RunRestarted: its generation, how often names were called before, and the seq from which on
signals may not be taken yet. The first two also in the `reused` of a retry."""

CLAIM = "claim"
"""In the trace of a takeover: the number of the claim that has written it."""

CALLS, RESULTS, ERRORS, VALUES = "calls", "results", "errors", "values"
"""In the `reused` of RunStarted: the calls in order, their outcomes, and the values of a retry."""

ENDS = "ends"
"""In it, if it is another one than that of the calls: the order in which they have ended."""


@dataclass(slots=True, kw_only=True)
class StoredCall:
    """A step or wait that the function has asked for, and how far it is."""

    occurrence: str
    """By the name that the step has now."""
    key: str
    """The name that it had at its first attempt."""
    arguments: str | None = None
    """Their digest, of a wait that of its signals; None if none was stored."""
    starts: int = 0
    failures: int = 0
    lost: int = 0
    refused: int = 0
    deaths: int = 0
    ran_out: int = 0
    ended: bool = False
    left_out: bool = False
    """The journal says that the function has gone on without its end."""
    result: Any = None
    error: dict[str, Any] | None = None
    """Of a step that has failed for good."""
    children: Children | None = None
    """Those that the call has started, or waits for."""
    asked_seq: int = 0
    """Of the event by which it is known."""
    ended_seq: int = 0
    """Of the event with its outcome; below 0 of those that a retry has taken over."""
    beside: bool = False
    """Its last attempt was begun beside other steps of the run."""
    in_flight: bool = False
    """Its last attempt has no outcome."""
    due_ms: float = 0.0
    """When its next attempt is due, if the last one was begun beside others."""

    def uncount(self) -> None:
        self.starts -= 1

    def judge(self) -> None:
        self.lost = self.refused = self.deaths = self.ran_out = 0


@dataclass(slots=True, kw_only=True)
class History:
    """All that the journal knows of a function's calls, in the order in which it made them."""

    calls: dict[str, StoredCall] = field(default_factory=dict)
    inbox: OpenWaits = field(default_factory=OpenWaits)
    values: dict[str, list[Any]] = field(default_factory=dict)
    """The times, random numbers and UUIDs that it was given, by their kind."""
    takeovers: int = 0
    """Claims in a row, up to the last, whose worker died without another event."""
    ran_out: int = 0
    """Those of them of whose workers nobody knows that they have died."""
    last_takeover: int | None = None
    """The number of the claim that has written the last one of these, if it is known."""
    generation: int = 1
    """Counts how often the function has begun, by its own wish, with an input of its own."""
    input: Any = None
    """That of the generation; the first has the run's."""
    events: int = 0
    """Those of the generation that were read."""
    restarted_seq: int = 0
    """The seq of the event by which the generation began; 0 of the first."""
    visits: Counter[str] = field(default_factory=Counter)
    """The calls of earlier generations, by name: their occurrences are not used again."""
    version: int = 0
    """The highest version of the plan that a step was begun with; 0 if only the run's own was."""
    undoes: bool = False
    """A step that is to be undone was begun."""
    given_back_beside: bool = False
    """The last attempt that was given back had begun beside others, and none has begun since."""
    last_ts_ms: int = 0
    children: int = 0
    """The highest number of a child, of all generations."""

    def as_given(self, run: Run) -> Run:
        """The run with the input of the generation."""
        return replace(run, input=self.input) if self.restarted_seq else run

    def count_takeover(self, taken_over: bool, claim: int | None, *, ran_out: bool) -> None:
        """Count an event, of a claim that found the one before it dead or of another one.

        Claims that have left no event may be between two: of a run that waits for its children.
        """
        if not taken_over:
            self.takeovers, self.ran_out, self.last_takeover = 0, 0, None
            return
        before, self.last_takeover = self.last_takeover, claim
        in_a_row = before is None or claim is None or claim == before + 1
        self.takeovers = self.takeovers + 1 if in_a_row else 1
        self.ran_out = (self.ran_out if in_a_row else 0) + ran_out

    def restart(self, plan: FunctionPlan, event: Event) -> None:
        """Begin a generation: only the signals that no wait has taken stay."""
        data = event.data or {}
        self.calls, self.values = {}, {}
        self.input, self.restarted_seq, self.events = data.get("input"), event.seq, 0
        self.resume(plan, data)

    def resume(self, plan: FunctionPlan, stored: dict[str, Any]) -> None:
        """Take over the count of generations and calls."""
        self.generation, self.visits = stored.get(GENERATION, 1), Counter()
        self.children = stored.get(CHILDREN, 0)
        for name, visits in stored.get(VISITS, {}).items():
            self.visits[plan.current(name)] += visits

    def call(self, occurrence: str, key: str | None = None, *, seq: int = 0) -> StoredCall:
        """The call of this occurrence, which it makes by the event of this seq if there is none."""
        return self.calls.setdefault(
            occurrence, StoredCall(occurrence=occurrence, key=key or occurrence, asked_seq=seq)
        )

    def in_flight(self, *, also_one: bool = False) -> list[StoredCall]:
        """The calls whose attempts have no outcome, if there were several: none was alone.

        `also_one`: if there is only one, too.
        """
        found = [call for call in self.calls.values() if call.in_flight]
        return found if also_one or len(found) > 1 or self.given_back_beside else []


def history_of(plan: FunctionPlan, events: Iterable[Event]) -> History:
    """The history in the journal of a run that is not cancelled."""
    history = History()
    fold_calls(plan, history, events)
    return history


def fold_calls(plan: FunctionPlan, history: History, events: Iterable[Event]) -> None:
    """Fold the next events of the journal into a history."""
    for event in events:
        history.last_ts_ms = event.ts
        history.events += 1
        data = event.data or {}
        name = data.get("name") if event.type == EventType.DEBUG_TRACE else None
        ran_out = bool(data.get(RAN_OUT))
        history.count_takeover(name == TAKEN_OVER, data.get(CLAIM), ran_out=ran_out)
        if event.type == EventType.RUN_STARTED:
            _take_over(plan, history, data.get("reused") or {})
        elif name == VALUE:
            history.values.setdefault(data["kind"], []).append(data["value"])
        elif event.type == EventType.RUN_RESTARTED:
            history.restart(plan, event)
        elif event.type == EventType.SIGNAL_RECEIVED:
            history.inbox.note(event)
        elif event.step is not None:
            key = data.get(RENAMED_FROM, event.step)
            call = history.call(plan.current(event.step), key, seq=event.seq)
            note_outcome(call, event.type, name, data)
            _note_flight(call, event, name)
            if event.type == EventType.STEP_STARTED or name == GIVEN_BACK:
                history.given_back_beside = name == GIVEN_BACK and call.beside
            _note_wait(history.inbox, call, event)
            _note_children(history, call, event)
            if call.ended and not call.ended_seq:
                call.ended_seq = event.seq
            history.undoes |= event.type == EventType.STEP_STARTED and UNDO in data
            history.version = max(history.version, data.get(VERSION, 0) % BESIDE_OTHERS)
            if FOLLOWING in data:
                history.call(plan.current(data[FOLLOWING]), seq=event.seq)


def _take_over(plan: FunctionPlan, history: History, reused: dict[str, Any]) -> None:
    """The calls of the run that this one is a retry of."""
    calls = reused.get(CALLS, ())
    ends = reused.get(ENDS) or [name for name, _ in calls]
    order = {name: place for place, name in enumerate(ends)}
    for name, arguments in calls:
        call = history.call(plan.current(name), name)
        call.arguments, call.ended = arguments, True
        call.ended_seq = order[name] - len(calls)
        call.result = reused.get(RESULTS, {}).get(name)
        if name in reused.get(SIGNALS, ()):
            call.result = received_of(call.result)
        call.error = reused.get(ERRORS, {}).get(name)
    history.resume(plan, reused)
    for kind, values in reused.get(VALUES, {}).items():
        history.values[kind] = list(values)


def note_outcome(call: StoredCall, type: str, trace: str | None, data: dict[str, Any]) -> None:
    """Take up an event of the step of this call; `trace` is the name of a DebugTrace."""
    match type:
        case EventType.STEP_STARTED:
            call.starts += 1
            call.in_flight = True
            call.arguments = call.arguments or data.get(ARGUMENTS)
        case EventType.STEP_FAILED if data.get(FINAL):
            call.ended, call.error = True, data.get("error") or {}
        case EventType.STEP_FAILED:
            call.failures += 1
            call.judge()
        case EventType.STEP_FINISHED:
            call.ended, call.result = True, data.get("result")
    was_in_flight = call.in_flight
    if trace in UNCOUNTED and was_in_flight:  # several may have written one about the same attempt
        call.uncount()
    if trace in UNCOUNTED or type in (EventType.STEP_FAILED, EventType.STEP_FINISHED):
        call.in_flight = False
    match trace:
        case str() if trace == SNOOZED:
            call.judge()
        case str() if trace == GIVEN_BACK and was_in_flight:
            call.deaths += bool(data.get(PROCESS_DIED))
            call.ran_out += bool(data.get(RAN_OUT))
        case str() if trace == LEFT_OUT:
            call.left_out = True
        case str() if trace == CONNECTION_LOST:
            call.refused += bool(data.get("refused"))
            call.lost += not data.get("refused")


def _note_flight(call: StoredCall, event: Event, trace: str | None) -> None:
    """An event that begins or ends an attempt of this call: whether it is one of several."""
    data = event.data or {}
    match event.type:
        case EventType.STEP_STARTED:
            call.due_ms = 0.0
            call.beside = data.get(VERSION, 0) >= BESIDE_OTHERS
        case EventType.STEP_FAILED:
            call.due_ms = event.ts + 1000 * data.get(RETRY_IN, 0.0)
        case EventType.DEBUG_TRACE if call.beside and trace == SNOOZED:
            call.due_ms = event.ts + 1000 * data.get("seconds", 0.0)


def _note_wait(inbox: OpenWaits, call: StoredCall, event: Event) -> None:
    """An event of the wait of this call."""
    data = event.data or {}
    match event.type:
        case EventType.WAIT_STARTED:
            inbox.note(event)
            names = data.get("names", ())
            call.arguments = digest_of_wait(data["kind"], names)
        case EventType.WAIT_FINISHED:
            call.ended, call.result = True, inbox.note(event)


def result_of(occurrence: str) -> str:
    """The name of the call that waits for a child which was started by this one."""
    return f"{occurrence}#:result"


def _note_children(history: History, call: StoredCall, event: Event) -> None:
    """An event of the children of this call."""
    match event.type:
        case EventType.CHILDREN_STARTED:
            history.inbox.note(event)
            call.children = children = Children.from_event(event)
            call.arguments = (event.data or {}).get(ARGUMENTS)
            call.ended = children.run_id is not None
            history.children = max(history.children, children.last)
        case EventType.CHILDREN_FINISHED if RIVALS in (event.data or {}):
            call.children, call.ended = Children.from_event(event), True
            call.arguments = (event.data or {}).get(ARGUMENTS)
        case EventType.CHILDREN_FINISHED if call.children is not None:
            history.inbox.note(event)
            children = replace(call.children, error=(event.data or {}).get("error"))
            ended = call
            if children.run_id:
                ended = history.call(result_of(call.occurrence), seq=event.seq)
            ended.ended, ended.children, ended.ended_seq = True, children, event.seq


def reusable_calls(
    plan: FunctionPlan, events: Sequence[Event], from_step: str | None
) -> dict[str, Any] | None:
    """The outcomes that a retry of an ended run takes over; None if there is none.

    Those before `from_step`, an occurrence or a name for its last one; else all but that of a step
    that failed last. None also for a run that was undone. Raises CannotRetry.
    """
    history = history_of(plan, events)
    ends = {event.type for event in events}
    if EventType.UNDO_STARTED in ends or (history.undoes and EventType.CANCEL_REQUESTED in ends):
        if from_step is not None:
            raise CannotRetry(events[0].run_id, WAS_UNDONE)
        return None
    calls = list(history.calls.values())
    if plan.on_cancel is not None and plan.on_cancel.name in history.calls:
        return None
    if from_step is not None:
        now = plan.current(from_step)
        places = [
            place
            for place, call in enumerate(calls)
            if now in (call.occurrence, step_of(call.occurrence))
        ]
        if not places:
            raise CannotRetry(events[0].run_id, f"it never began a step {from_step}")
        calls = calls[: places[-1]]
    else:  # those that nothing followed: the function may have gone on after others
        last = max((call.asked_seq for call in calls), default=0)
        calls = [call for call in calls if call.error is None or call.ended_seq < last]
    # Children belong to the run that has started them: they are started again.
    of_children = [place for place, call in enumerate(calls) if call.children is not None]
    ended = [call for call in calls[: min(of_children, default=len(calls))] if call.ended]
    if not ended:
        return None
    signals = {
        call.occurrence: call.result.to_dict()
        for call in ended
        if isinstance(call.result, Received)
    }
    results = {call.occurrence: call.result for call in ended if call.error is None} | signals
    reused: dict[str, Any] = {
        CALLS: [[call.occurrence, call.arguments] for call in ended],
        RESULTS: results,
        ERRORS: {call.occurrence: call.error for call in ended if call.error is not None},
        VALUES: history.values,
    }
    order = [call.occurrence for call in sorted(ended, key=lambda call: call.ended_seq)]
    if order != [call.occurrence for call in ended]:
        reused[ENDS] = order
    if signals:
        reused[SIGNALS] = list(signals)
    if history.generation > 1:
        reused |= {GENERATION: history.generation, VISITS: dict(history.visits)}
    return reused
