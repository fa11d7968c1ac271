"""The work on one claimed run whose plan is a function. Does no I/O, as `execution`.

1. fold the journal; call the function, and answer its calls from there
2. it asks for a step that has not finished: start its attempt, and call the body
3. resume the function with the outcome; what it asks for next is started in the same commit
4. go on at 2, until the function ends, the run waits, or the worker stops

The function has always seen a little more than is committed. When a commit fails it is left, and
called again on what the journal has.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from beatless.orchestrator import long_history
from beatless.orchestrator.boundaries import Conclusion
from beatless.orchestrator.child_calls import ChildCall, Children, ReadEnds, with_results
from beatless.orchestrator.child_starts import ChildStarts
from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import Event, EventType, NewEvent, as_stored
from beatless.orchestrator.execution import Execution, read_pages
from beatless.orchestrator.failure import raise_if_leaving
from beatless.orchestrator.function_boundaries import MAX_TAKEOVERS, FunctionBoundaries
from beatless.orchestrator.function_call import Broken, Ended, FunctionCall, Said, call_function
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import History, fold_calls, history_of
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.long_history import HistoryTooLong
from beatless.orchestrator.open_waits import OpenWait, Received
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Plan, Step
from beatless.orchestrator.progress import ARGUMENTS, MAX_RAN_OUT, Progress, fold
from beatless.orchestrator.replay import (
    Again,
    Call,
    Mismatch,
    Outcome,
    PlanLeft,
    Replay,
    Several,
    departure,
    limited_beside,
    refused_input,
)
from beatless.orchestrator.requests import (
    Commit,
    CommitIfQuiet,
    Committed,
    Part,
    Request,
    Requests,
    Signalled,
)
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.unfit_events import UNFIT, UnreadableEvent, folded, problem_of
from beatless.orchestrator.waits import Wait

ENDS_CALLS = (EventType.CANCEL_REQUESTED, EventType.UNDO_STARTED)
"""Events after which the function is not called."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """The function has ended its process too often, and is not called."""


class FunctionExecution(Execution):
    """One worker's decisions about one run of a plan that is a function."""

    _boundaries: FunctionBoundaries

    def __init__(
        self,
        plan: FunctionPlan,
        lease: Lease,
        *,
        max_event_bytes: int,
        read_ends: ReadEnds,
        plans: Mapping[str, Plan],
        **options: Any,
    ) -> None:
        """`read_ends` reads children of the run, while its function is called.

        Its children are runs of `plans`.
        """
        super().__init__(plan, lease, max_event_bytes=max_event_bytes, **options)
        self._version = plan.started_with(lease.run.plan_version)
        self._boundaries = FunctionBoundaries(
            plan, self._run_id, max_event_bytes=max_event_bytes, version=self._version
        )
        self._function = plan
        self._stored_input = lease.run.input
        self._read_ends = read_ends
        self._starts = ChildStarts(
            lease,
            plan=plan.name,
            plans=plans,
            read_ends=read_ends,
            max_event_bytes=max_event_bytes,
        )
        self._replay = Replay(plan=plan, history=History(), read_ends=read_ends)
        self._call: FunctionCall | None = None
        self._said: Said | Crashed | None = None
        """What the function has said last; None before it was called."""
        self._last_seq = lease.run.last_seq
        """Of the last event, about: those that bodies append are not counted."""
        self._beside = 0
        """Those of the generation that were not read, as traces and output: no part of a replay."""
        self._told_seq = 0
        """The seq up to which the history was read; signals may have come since."""

    def requests(self) -> Requests:
        """As those of `Execution`."""
        try:
            yield from super().requests()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._call is not None:
            call, self._call = self._call, None
            call.close()

    # A claim

    def _resume(self) -> Part:
        lease = self._lease
        if lease.waited is None and lease.run.attempt > 1 and not lease.cancelled:
            yield from self._settle(
                self._boundaries.taken_over(lease.run.attempt, ran_out=lease.ran_out)
            )
            self._last_seq += 1
        if (lease.late or lease.unreadable) and not lease.cancelled:
            if self._last_seq > 1:  # by the journal: the plan may have lost an undo since
                self._boundaries.undoes = (yield from self._fold_cancelled()).begun_undos
            ended = self._boundaries.overdue if lease.late else self._boundaries.unreadable
            yield from self._settle(ended())
            return None
        return (yield from super()._resume())

    def _fold(self) -> Generator[Request, Any, Progress]:
        """Call the function on what the journal has; of a cancelled run it is not called."""
        self._leave()
        self._said = None
        if self._lease.cancelled:
            return (yield from self._fold_cancelled())
        history, cancelled = History(), False

        def take(events: Sequence[Event]) -> None:
            nonlocal cancelled
            self._last_seq = self._told_seq = events[-1].seq
            cancelled |= any(event.type in ENDS_CALLS for event in events)
            before = history.events
            try:
                fold_calls(self._function, history, events)
            except UNFIT as error:
                odd = events[history.events - before - 1]
                raise UnreadableEvent(odd, problem_of(error)) from error

        if self._last_seq > 1 or self._lease.run.retry_of is not None:
            yield from read_pages(take)
            self._last_ts_ms = history.last_ts_ms
            self._beside = self._last_seq - history.restarted_seq - history.events
        if cancelled:
            return (yield from self._fold_cancelled())
        self._lease.run = history.as_given(replace(self._lease.run, input=self._stored_input))
        self._boundaries.undoes |= history.undoes
        self._replay = Replay(plan=self._function, history=history, read_ends=self._read_ends)
        crashes = history.takeovers - history.ran_out
        if crashes >= MAX_TAKEOVERS or history.ran_out >= MAX_RAN_OUT:
            self._said = Crashed()
        else:
            stored = self._lease.run.plan_version
            self._said = departure(self._function, stored, history) or self._call_function()
        return self._place()

    def _fold_cancelled(self) -> Generator[Request, Any, Progress]:
        events: list[Event] = []
        yield from read_pages(events.extend)
        self._last_seq, self._last_ts_ms = events[-1].seq, events[-1].ts
        run = replace(self._lease.run, input=self._stored_input)
        history = folded(partial(history_of, self._function), events)
        self._lease.run = history.as_given(run)
        try:
            self._load_input()
        except BaseException as error:  # of an earlier version of the type: as it was stored
            raise_if_leaving(error, self._leaving)
        progress = folded(partial(fold, self._plan), events)
        progress.results = with_results(progress.results, self._read_ends)
        return progress

    def _call_function(self) -> Said:
        try:
            given = self._load_input()
        except BadPayload as error:
            return refused_input(error)
        except BaseException as error:
            raise_if_leaving(error, self._leaving)
            return Broken(error)
        self._call = call_function(self._lease.run, given, self._replay, leaving=self._leaving)
        return self._resumed(None)

    def _load_input(self) -> Any:
        """The input of the function; its steps get the JSON of it. Raises BadPayload."""
        run = self._lease.run
        given = self._function.input.load(run.input)
        self._lease.run = replace(run, input=self._function.input.filled(run.input, given))
        return given

    def _resumed(self, outcome: Outcome | None, named: str | None = None) -> Said:
        """What the function says to an outcome of a call, or of the only one."""
        assert self._call is not None  # noqa: S101 - it waits for one
        try:
            said = self._call.resume(outcome, named)
        except PlanLeft:
            if self._replay.unread is None:
                raise
        if self._replay.unread is not None:
            raise self._replay.unread
        if isinstance(said, Call | Several) and self._events >= long_history.MAX_EVENTS:
            return Broken(HistoryTooLong(of_function=True))
        if isinstance(said, Several):
            for call in said.calls:
                if _is_limited(call):
                    return Broken(limited_beside(self._plan.name, call.named))
        return said

    @property
    def _events(self) -> int:
        """Those of the generation that a replay reads, or is about to."""
        return self._last_seq - self._replay.history.restarted_seq - self._beside

    def _place(self) -> Progress:
        said = self._said
        return said if isinstance(said, Call | Several) else Progress(step=None)

    def _begin_attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Part:
        match self._said:
            case Mismatch(step=step, reason=reason) as found:
                text = f"{found.message}; {found.advice}"
                yield from self._settle(self._released(progress, step, reason, text))
                return None
            case Crashed():
                history = self._replay.history
                yield from self._settle(
                    self._boundaries.plan_crashed(history.takeovers, history.ran_out)
                )
                return None
        if left := self._boundaries.left_out(self._replay.left_out()):
            noted = yield from self._settle(self._boundaries.drawn(progress, left))
            self._last_seq = noted.last_seq
            if noted.cancelled:
                return None
        if isinstance(self._said, Ended | Broken):
            yield from self._settle(self._last(self._said, before))
            return None
        if isinstance(progress.step, ChildCall):
            return (yield from self._begin_children(progress, progress.step))
        if progress.key not in progress.inbox.waits:  # else nothing is written
            before = [*before, *self._values()]
        return (yield from super()._begin_attempt(progress, before))

    # The outcome of a step

    def _gone_on(self, progress: Progress, conclusion: Conclusion) -> Conclusion:
        outcome = conclusion.settlement.normal.events[0]
        if not isinstance(progress, Call) or outcome.type != EventType.STEP_FINISHED:
            return conclusion
        if self._lease.late:
            return replace(conclusion, settlement=self._boundaries.overdue([outcome]))
        answer = self._replay.finished(progress, as_stored(outcome)["result"])
        return replace(conclusion, settlement=self._joined(progress, outcome, answer))

    def _waited(
        self, progress: Progress, wait: Wait, opened: OpenWait, signal: Received | None
    ) -> Conclusion:
        del wait
        assert isinstance(progress, Call)  # noqa: S101 - an `on_cancel` step is no wait
        answer = self._replay.waited(progress, signal)
        settlement = self._joined(progress, opened.finished(signal), answer, is_step=False)
        return Conclusion(settlement=settlement, following=None)

    def _wait(self, progress: Progress, wait: Wait) -> Part:
        """As there; a function that was told of a time-out in vain is called again."""
        if isinstance(wait, ChildCall):
            assert isinstance(progress, Call)  # noqa: S101 - an `on_cancel` step is no call
            if self._lease.late:
                yield from self._settle(self._boundaries.overdue())
                return None
            children = wait.children or self._replay.history.call(progress.named).children
            if children is None:
                return (yield from self._start_children(progress, wait))
            return (yield from self._tend(progress, wait, children))
        place = yield from super()._wait(progress, wait)
        if place is not progress or self._said is progress:
            return place
        return (yield from self._begin_attempt((yield from self._fold())))

    def _after_wait(
        self,
        progress: Progress,
        wait: Wait,
        signal: Received | None,
        conclusion: Conclusion,
        end: Committed,
    ) -> Progress | None:
        del progress, wait, signal
        return self._begun(conclusion.settlement, end)

    # Children

    def _begin_children(self, progress: Progress, call: ChildCall) -> Part:
        """Store what the function was given; they are started, or looked at, by `_wait`."""
        if call.children is None or not (values := self._values()):
            return progress
        kept = yield from self._settle(self._boundaries.drawn(progress, values))
        self._last_seq = kept.last_seq
        return None if kept.cancelled else progress

    def _start_children(self, progress: Call, call: ChildCall) -> Part:
        """Start the first of them; with one that is started alone the function goes on."""
        if self._stopping():
            yield from self._settle(self._boundaries.shut_down(progress))
            return None
        history = self._replay.history
        try:
            first = call.numbered(history.children + 1)
            compares = progress.arguments is not None
            children, runs = self._starts.first(call, first, compares=compares)
        except (BadPayload, PlanError) as error:
            yield from self._settle(self._boundaries.broken(error, self._values()))
            return None
        settlement = self._boundaries.children_started(progress, call, children, self._values())
        begun = yield from self._commit(Commit(settlement=settlement, children=runs))
        if begun.cancelled:
            return None
        self._last_seq += len(settlement.normal.events)
        history.children = children.last
        stored = history.call(progress.named, progress.begun)
        stored.children, stored.arguments = children, progress.arguments
        if not call.alone:
            return progress
        self._said = self._resumed(self._replay.ended(progress, children), progress.named)
        return (yield from self._begin_attempt(self._place()))

    def _tend(self, progress: Call, call: ChildCall, children: Children) -> Part:
        """Start further ones as places become free; leave the worker until that, or their end."""
        reply: Committed | Signalled = yield CommitIfQuiet(
            settlement=self._boundaries.parked(progress),
            tends=[self._starts.tends(call, children)],
        )
        if isinstance(reply, Committed):
            return None
        for event in reply.events:
            progress.inbox.note(event)
        turn = next(iter(reply.turns), None)
        if turn is None:
            return progress
        if turn.changed or (
            turn.done and call.children is None and not call.has_inputs(children, children.numbers)
        ):
            self._said = self._replay.changed(progress.named)
            return (yield from self._begin_attempt(progress))
        if not turn.done:
            return progress
        children = self._starts.ended(children, turn)
        asked = {ARGUMENTS: progress.arguments} if children.rivals else {}
        finished = children.finished(call.started_by or progress.named, **asked)
        answer = self._replay.ended(progress, children)
        settlement = self._joined(progress, finished, answer, is_step=False)
        committed = yield from self._settle(settlement)
        return self._begun(settlement, committed)

    def _fail(self, progress: Progress, step: Step, error: BaseException) -> Part:
        """Tell the function, unless the step is tried again, or it has gone on with a result."""
        commit = self._failed(progress, step, error)
        final = commit.failure is not None and commit.failure.retry_in is None
        if (
            not isinstance(progress, Call)
            or self._said is not progress
            or not final
            or self._lease.late
        ):
            yield from self._commit(commit)
            return None
        outcome = commit.settlement.normal.events[0]
        answer = self._replay.failed(progress, as_stored(outcome)["error"])
        settlement = self._joined(progress, outcome, answer)
        committed = yield from self._commit(replace(commit, settlement=settlement))
        self._steps_left -= 1
        return self._begun(settlement, committed)

    def _joined(
        self, progress: Progress, outcome: NewEvent, answer: Outcome, *, is_step: bool = True
    ) -> Settlement:
        """The outcome of a step or wait, with all that the function makes of it."""
        self._said = self._resumed(answer, progress.occurrence)
        return self._followed(progress, outcome, is_step=is_step)

    def _followed(
        self, progress: Progress, outcome: NewEvent, *, is_step: bool = True
    ) -> Settlement:
        """The outcome of a step or wait, with what the function has said to it."""
        match said := self._said:
            case Several():
                return self._boundaries.alone(progress, outcome, self._values(), said.calls[0])
            case Call() if self._stopping() or (is_step and self._steps_left == 1):
                return self._boundaries.promised(progress, outcome, self._values(), said)
            case Call() if isinstance(said.step, ChildCall) or _is_limited(said):
                values = self._values()
                self._last_seq += 1 + len(values)
                return self._boundaries.alone(progress, outcome, values, said)
            case Call():
                values = self._values()
                self._last_seq += 2 + len(values)
                if isinstance(said.step, Step):
                    said.starts = 1
                return self._boundaries.joined(progress, outcome, values, said)
            case Ended() | Broken():
                return self._last(said, [outcome])
            case _:
                raise AssertionError(f"the function said this after its last stored call: {said}")

    def _last(self, said: Ended | Broken, events: Sequence[NewEvent]) -> Settlement:
        """The end of the run, after these events."""
        events = [*events, *self._values()]
        if isinstance(said, Broken):
            return self._boundaries.broken(said.error, events)
        try:
            if isinstance(said.value, Again):
                replay = self._replay
                return self._boundaries.restarted(
                    said.value, replay.history, replay.visits, self._told_seq, events
                )
            return self._boundaries.completed(said.value, events)
        except BaseException as error:  # of what the value is made of, too
            raise_if_leaving(error, self._leaving)
            return self._boundaries.broken(error, events)

    def _values(self) -> list[NewEvent]:
        """The values that the function was given since the last boundary."""
        drawn, self._replay.drawn = self._replay.drawn, []
        return self._boundaries.values(drawn)

    def _go_on(
        self, progress: Progress, step: Step, conclusion: Conclusion, end: Committed
    ) -> Progress | None:
        if not isinstance(progress, Call):
            return super()._go_on(progress, step, conclusion, end)
        self._steps_left -= 1
        return self._begun(conclusion.settlement, end)

    def _begun(self, settlement: Settlement, end: Committed) -> Progress | None:
        """The step or wait that has begun with a boundary; None if none has."""
        if end.cancelled or settlement.normal.state is not RunState.RUNNING:
            return None
        place = self._place()
        if isinstance(place.step, Wait) and not isinstance(place.step, ChildCall):
            place.begin_wait(place.step, end.last_seq)
        return place


def _is_limited(call: Call) -> bool:
    """Whether it is a step with limits: it begins in a commit of its own, with its slots."""
    return isinstance(call.step, Step) and bool(call.step.limits)
