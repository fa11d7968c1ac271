"""The work on one claimed run whose function is at several calls at the same time. Does no I/O.

1. have children started, begin waits, start the attempts of steps; call the bodies, all at once
2. wait until one of them has ended, or a wait, or the back-off of a step has
3. tell the function; its outcome is in one commit with the starts of what it asks for then
4. go on at 1; with one call left, as `function_execution` does

The run leaves its worker only with no step in flight. Meanwhile back-offs and time-outs of other
branches are kept here. It is due again at the earliest of them.

A transactional step has the run's row to itself when it commits, and a step whose process has died
with it beside others is suspected: these are executed while no other is in flight.
"""

from collections.abc import Generator, Sequence
from typing import Any

from beatless.orchestrator.branch_execution import BranchExecution, starts_slowly
from beatless.orchestrator.child_calls import ChildCall, Tends
from beatless.orchestrator.events import NewEvent, as_stored
from beatless.orchestrator.function_call import Broken, Ended
from beatless.orchestrator.history import StoredCall
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.plan import Step
from beatless.orchestrator.progress import (
    ARGUMENTS,
    CHANGED_CALL,
    PROCESS_DIED,
    RAN_OUT,
    Progress,
)
from beatless.orchestrator.replay import Call, Mismatch, Several
from beatless.orchestrator.requests import (
    AwaitBody,
    BodyEnded,
    CommitIfQuiet,
    Committed,
    EndBody,
    Part,
    Request,
    Signalled,
)
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.waits import Wait, WaitKind

SIGNALS_INTERVAL_S = 0.5
"""Seconds between two looks for signals, while a branch waits for one and steps are in flight."""


class ParallelExecution(BranchExecution):
    """One worker's decisions about one run of a plan that is a function."""

    def _fold(self) -> Generator[Request, Any, Progress]:
        """As there; attempts that have died beside one another are given back.

        So are those whose lease ran out.
        """
        place = yield from super()._fold()
        ran_out = self._lease.ran_out and self._said is not None  # the function was called
        died = [
            call
            for call in self._replay.history.in_flight(also_one=ran_out)
            if call.occurrence not in self._in_flight
        ]
        self._lease.ran_out &= not ran_out
        if died and not self._lease.cancelled:
            why = RAN_OUT if ran_out else PROCESS_DIED
            notes = [self._boundaries.given_back(_as_call(call), why=why) for call in died]
            noted = yield from self._write(notes)
            self._lease.cancelled |= noted.cancelled
            return (yield from self._fold())
        self._begun_beside = {
            call.occurrence: _as_call(call)
            for call in self._replay.history.calls.values()
            if call.beside and not call.ended
        }
        if isinstance(place, Several):
            alone = next((each for each in place.calls if each.named == self._alone), None)
            if alone is None:
                return place
            alone.beside = True
            return alone
        if isinstance(place, Call) and not self._is_due(place):
            self._said = place = _several([place])
        return place

    def _begin_attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Part:
        if not isinstance(progress, Several):
            return (yield from super()._begin_attempt(progress, before))
        before = [*before, *self._boundaries.left_out(self._replay.left_out())]
        if before:
            yield from self._write(before)
        return progress

    def _followed(
        self, progress: Progress, outcome: NewEvent, *, is_step: bool = True
    ) -> Settlement:
        self._begun_beside.pop(progress.occurrence, None)
        if isinstance(self._said, Call) and self._is_begun(self._said):
            self._said = _several([self._said])
        return super()._followed(progress, outcome, is_step=is_step)

    def _wait(self, progress: Progress, wait: Wait) -> Part:
        if isinstance(progress, Several):
            return (yield from self._take_several())
        return (yield from super()._wait(progress, wait))

    def _take_storable_step(self, progress: Progress, step: Step) -> Part:
        if isinstance(progress, Several):
            return (yield from self._take_several())
        return (yield from super()._take_storable_step(progress, step))

    def _take_several(self) -> Part:
        """Until one call is left at most, or the run leaves this worker."""
        self._begin_several()
        return (yield from self._until_left())

    def _fail(self, progress: Progress, step: Step, error: BaseException) -> Part:
        """As there; others go on while a step that was executed alone is in its back-off."""
        if not isinstance(progress, Call) or progress.named != self._alone:
            return (yield from super()._fail(progress, step, error))
        self._begin_several()
        yield from self._take_failure(progress, progress, error)
        return (yield from self._until_left())

    def _until_left(self) -> Part:
        while self._left is None:
            if not self._begins_nothing:
                if (yield from self._advance()):
                    continue
                yield from self._begin([])
            yield from self._end_abandoned()
            if self._in_flight:
                yield from self._await_body()
            else:
                yield from self._leave_or_go_on()
        return self._left[0]

    def _begin_several(self) -> None:
        self._alone = self._left = None

    def _advance(self) -> Generator[Request, Any, bool]:
        """Do one thing for which no body is called; whether there was one."""
        for call in self._calls:
            match call.step:
                case ChildCall() as step:
                    if not self._is_begun(call) and step.children is None and self._has_room(call):
                        yield from self._start_child_runs(call, step)
                        return True
                case Wait() as wait if call.key in call.inbox.waits:
                    if (yield from self._end_wait(call, wait, call.inbox.waits[call.key])):
                        return True
                case Step() as step if call.named not in self._in_flight:
                    if call.is_deadly(step.retry.max_crashes):
                        event = self._boundaries.crashed(call).normal.events[0]
                        failed = self._replay.failed(call, as_stored(event)["error"])
                        yield from self._tell(call, event, failed)
                        return True
        return False

    def _await_body(self) -> Generator[Request, Any, None]:
        reply: BodyEnded | None = yield AwaitBody(timeout_s=self._patience_s())
        if reply is not None:
            yield from self._take_end(reply)
        elif self._hears_signals and not self._begins_nothing:
            quiet = self._boundaries.going_on([])
            found: Committed | Signalled = yield CommitIfQuiet(settlement=quiet)
            self._take_up(found)

    @property
    def _open_waits(self) -> list[OpenWait]:
        """Those of the calls at which the function is, without those for children."""
        waits = self._replay.history.inbox.waits
        return [
            waits[call.key]
            for call in self._calls
            if not isinstance(call.step, ChildCall) and call.key in waits
        ]

    @property
    def _hears_signals(self) -> bool:
        return any(opened.kind is not WaitKind.SLEEP for opened in self._open_waits)

    def _patience_s(self) -> float | None:
        """Seconds until something is to be done beside what is in flight; None: nothing is."""
        if self._begins_nothing:
            return None
        ends = [wait.until_ms for wait in self._open_waits if wait.until_ms is not None]
        dues = [call.due_ms for call in self._calls if not self._is_due(call)]
        left = [max(0.0, (at - self._lease.now_ms) / 1000) for at in (*ends, *dues)]
        return min([*left, *([SIGNALS_INTERVAL_S] if self._hears_signals else [])], default=None)

    def _end_abandoned(self) -> Generator[Request, Any, None]:
        """Have the bodies end whose results the function waits for no more."""
        if self._is_cancelled or self._lease.late or self._stopped or self._stopping():
            return
        asked = {call.named for call in self._calls}
        for name in list(self._in_flight):
            if name not in asked and name not in self._told_to_end:
                self._told_to_end.add(name)
                yield EndBody(occurrence=name)

    # The run leaves this worker, or goes on with one call

    def _leave_or_go_on(self) -> Generator[Request, Any, None]:
        said, place = self._said, self._place()
        if self._stopped is not None:
            yield from self._leave_with(self._boundaries.shut_down(place))
            if self._stopped.error is not None:
                raise self._stopped.error from None
        elif self._is_cancelled or self._lease.cancelled:
            yield from self._leave_with(self._boundaries.cancelled())
        elif self._lease.late and not isinstance(said, Ended):
            yield from self._leave_with(self._boundaries.overdue())
        elif isinstance(said, Ended | Broken):
            yield from self._leave_with(self._last(said, []))
        elif isinstance(said, Mismatch):
            reason = f"{said.message}; {said.advice}"
            yield from self._leave_with(self._released(place, said.step, said.reason, reason))
        elif self._unreadable is not None:
            key, problem = self._unreadable
            yield from self._leave_with(self._released(place, key, CHANGED_CALL, problem))
        elif self._stopping() or self._steps_left == 0:
            yield from self._leave_with(self._boundaries.shut_down(place))
        else:
            yield from self._go_on_with_one()

    def _leave_with(self, settlement: Settlement) -> Generator[Request, Any, None]:
        yield from self._settle(settlement)
        self._left = (None,)

    def _go_on_with_one(self) -> Generator[Request, Any, None]:
        """With the only call, or with a step that goes alone; else the run is parked."""
        due = [call for call in self._calls if self._is_due(call)]
        steps = [call for call in due if isinstance(call.step, Step)]
        if len(self._calls) == 1 and due:
            self._said = due[0]
            self._left = ((yield from super()._begin_attempt(due[0])),)
        elif steps:
            self._alone, steps[0].beside = steps[0].named, True
            self._begun_beside[steps[0].named] = steps[0]
            self._left = ((yield from super()._begin_attempt(steps[0])),)
        else:
            yield from self._park()

    def _park(self) -> Generator[Request, Any, None]:
        """Leave the worker until the earliest end of a wait, or back-off, unless it has come."""
        waits = [opened.seq for opened in self._open_waits]
        slow, quick = self._tended()
        tended = [*slow, *quick]
        dues = [call.due_ms for call in self._calls if not self._is_due(call)]
        delay_s = min(((at - self._lease.now_ms) / 1000 for at in dues), default=0.0)
        settlement = self._boundaries.parked_until(
            self._place(), delay_s, waits=bool(waits or tended)
        )
        if not waits and not tended:
            yield from self._leave_with(settlement)
            return
        tends = [tends for _, tends in tended]
        reply: Committed | Signalled = yield CommitIfQuiet(
            settlement=settlement, waits=waits, tends=tends
        )
        if isinstance(reply, Committed):
            self._left = (None,)
            return
        self._take_up(reply)
        for (call, each), turn in zip(tended, reply.turns, strict=False):
            children, step = each.children, call.step
            if children is None or not isinstance(step, ChildCall):
                continue
            changed = turn.done and step.children is None
            if turn.changed or (changed and not step.has_inputs(children, children.numbers)):
                self._said = self._replay.changed(call.named)
                return
            if turn.done:
                ended = self._starts.ended(children, turn)
                asked = {ARGUMENTS: call.arguments} if ended.rivals else {}
                event = ended.finished(step.started_by or call.named, **asked)
                yield from self._tell(call, event, self._replay.ended(call, ended))
                return

    def _tended(self) -> tuple[list[tuple[Call, Tends]], list[tuple[Call, Tends]]]:
        """The calls that wait for children: those that start them little by little, and others."""
        slow: list[tuple[Call, Tends]] = []
        quick: list[tuple[Call, Tends]] = []
        for call in self._calls:
            if isinstance(call.step, ChildCall) and (children := self._children_of(call)):
                tends = self._starts.tends(call.step, children)
                (slow if starts_slowly(children) else quick).append((call, tends))
        return slow, quick


def _several(calls: Sequence[Call]) -> Several:
    first = calls[0]
    return Several(step=first.step, inbox=first.inbox, results=first.results, calls=calls)


def _as_call(stored: StoredCall) -> Call:
    """The place of a call in the journal, for an event about its attempt."""
    starts = max(1, stored.starts)
    return Call(step=None, named=stored.occurrence, arguments=stored.arguments, starts=starts)
