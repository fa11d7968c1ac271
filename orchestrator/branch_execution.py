"""The calls of a plan's function that are in hand at the same time: how they begin and end.

Does no I/O, as `execution`. When the run leaves its worker is decided by `parallel_execution`.
"""

from asyncio import CancelledError
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from beatless.orchestrator.child_calls import PAGE_CHILDREN, ChildCall, Children
from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import EventType, NewEvent, as_stored
from beatless.orchestrator.failure import is_a
from beatless.orchestrator.function_call import Broken, Ended
from beatless.orchestrator.function_execution import FunctionExecution
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Step
from beatless.orchestrator.progress import Progress
from beatless.orchestrator.replay import Call, Outcome, Several
from beatless.orchestrator.requests import (
    BeginBody,
    BodyEnded,
    Cancelled,
    Commit,
    CommitIfQuiet,
    Committed,
    EndBody,
    Raised,
    Request,
    Returned,
    Signalled,
    Stopped,
    TransactionLost,
    Unstorable,
)
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.waits import Wait

MOST_IN_FLIGHT = 64
"""Steps of one run that are executed at the same time; others begin as they end."""

EARLY_MS = 50.0
"""A run that is claimed when it is due may be so much early by our clock."""

ALONE_AFTER = 3
"""Deaths of its process, with others beside it, after which a step is executed alone; a lease that
ran out may be one."""


EMPTY = Commit(settlement=Settlement.ignoring_cancel(Boundary(state=RunState.RUNNING)))
"""A commit that is filled in."""


def starts_slowly(children: Children) -> bool:
    """Whether not all are started at once: others must not get the numbers behind theirs."""
    most = PAGE_CHILDREN if children.at_once is None else min(children.at_once, PAGE_CHILDREN)
    return not children.rivals and children.count > most


class BranchExecution(FunctionExecution):
    """The decisions about calls of one run that are beside one another."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_flight: dict[str, Call] = {}
        """The calls whose bodies run, by occurrence."""
        self._beginning: Sequence[Call] = ()
        """Those whose start is being committed: it may be in the journal already."""
        self._begun_beside: dict[str, Call] = {}
        """Those that were begun beside others, and have no end."""
        self._told_to_end: set[str] = set()
        self._alone: str | None = None
        """The call that is executed while others wait for it to end."""
        self._is_cancelled = False
        self._stopped: Stopped | None = None
        self._unreadable: tuple[str, str] | None = None
        """The approval that this version of the plan cannot take, and why not."""
        self._left: tuple[Progress | None] | None = None
        """How the work goes on, once it is that of one call."""

    @property
    def _calls(self) -> Sequence[Call]:
        """Those at which the function is, in the order in which it has asked for them."""
        match self._said:
            case Several(calls=calls):
                return calls
            case Call() as call:
                return [call]
        return []

    @property
    def _begins_nothing(self) -> bool:
        """Whether what is in flight is the last of the run here."""
        return (
            self._is_cancelled
            or self._lease.cancelled
            or self._lease.late
            or self._stopped is not None
            or self._unreadable is not None
            or not isinstance(self._said, Call | Several)
            or self._stopping()
            or self._steps_left == 0
        )

    def _is_due(self, call: Call) -> bool:
        return call.due_ms - self._lease.now_ms <= EARLY_MS

    def _is_begun(self, call: Call) -> bool:
        """Whether it is in the journal, and has not ended."""
        stored = self._replay.history.calls.get(call.named)
        return (
            call.named in self._in_flight
            or call.starts > 0
            or call.key in call.inbox.waits
            or (stored is not None and stored.children is not None)
        )

    def _goes_alone(self, call: Call) -> bool:
        step = call.step
        return isinstance(step, Step) and (
            step.transactional or call.deaths + call.ran_out >= ALONE_AFTER
        )

    # Calls begin

    def _begin(
        self, events: Sequence[NewEvent], commit: Commit | None = None
    ) -> Generator[Request, Any, None]:
        """Begin what can begin, in one commit with these events. Raises Unstorable."""
        begun: list[Call] = []
        room = MOST_IN_FLIGHT - len(self._in_flight)
        for call in self._calls if not self._begins_nothing else ():
            if isinstance(call.step, ChildCall) or call.named in self._in_flight:
                continue
            if isinstance(call.step, Wait):
                if call.key not in call.inbox.waits:
                    begun.append(call)
            elif (
                self._is_due(call)
                and not self._goes_alone(call)
                and not (
                    isinstance(call.step, Step) and call.is_deadly(call.step.retry.max_crashes)
                )
                and room > 0
                and not (len(self._calls) == 1 and not self._in_flight)
            ):
                room -= 1
                call.starts += 1
                begun.append(call)
        events = [*events, *self._values()]
        if not events and not begun:
            return
        starts = [self._boundaries.begun_beside(call) for call in begun]
        settlement = self._boundaries.going_on(events, starts)
        self._beginning = [call for call in begun if isinstance(call.step, Step)]
        committed = yield from self._write_all(replace(commit or EMPTY, settlement=settlement))
        if committed.cancelled:
            self._beginning = ()
            return
        self._boundaries.note_begun()
        for place, call in enumerate(begun):
            if isinstance(call.step, Wait):
                self._note_begun_wait(call, call.step, committed.last_seq - len(begun) + place + 1)
            elif isinstance(call.step, Step):
                self._in_flight[call.named] = self._begun_beside[call.named] = call
                yield BeginBody(body=self._body(call, call.step))
        self._beginning = ()

    def _note_begun_wait(self, call: Call, wait: Wait, seq: int) -> None:
        call.begin_wait(wait, seq)
        if wait.seconds is not None:
            until = round(self._lease.now_ms + 1000 * wait.seconds)
            opened = call.inbox.waits[call.key]
            call.inbox.waits[call.key] = replace(opened, until_ms=until)

    def _has_room(self, call: Call) -> bool:
        """Whether children may be started: their numbers are given out in the order of starts."""
        return not any(
            starts_slowly(children)
            for each in self._calls
            if each is not call and (children := self._children_of(each)) is not None
        )

    def _children_of(self, call: Call) -> Children | None:
        """The children that this call waits for, if they were started."""
        if not isinstance(call.step, ChildCall):
            return None
        return call.step.children or self._replay.history.call(call.named).children

    def _start_child_runs(self, call: Call, step: ChildCall) -> Generator[Request, Any, None]:
        history = self._replay.history
        try:
            first = step.numbered(history.children + 1)
            compares = call.arguments is not None
            children, runs = self._starts.first(step, first, compares=compares)
        except (BadPayload, PlanError) as error:
            self._said = Broken(error)
            return
        event = self._boundaries.children_event(call, step, children)
        settlement = self._boundaries.going_on(self._values(), [event])
        begun = yield from self._write_all(Commit(settlement=settlement, children=runs))
        if begun.cancelled:
            return
        history.children = children.last
        stored = history.call(call.named, call.begun)
        stored.children, stored.arguments = children, call.arguments
        if step.alone:
            self._said = self._resumed(self._replay.ended(call, children), call.named)

    # Calls end

    def _take_end(self, end: BodyEnded) -> Generator[Request, Any, None]:
        """Write the outcome of a body that has ended, and tell the function."""
        if not end.occurrence:
            assert isinstance(end.outcome, Stopped)  # noqa: S101 - as `BodyEnded` has it
            yield from self._end_process(end.outcome)
            return
        call = self._in_flight.pop(end.occurrence)
        pending = next((each for each in self._calls if each.named == call.named), None)
        match end.outcome:
            case Returned(conclusion):
                event = conclusion.settlement.normal.events[0]
                if event.type != EventType.STEP_FINISHED:
                    call.uncounted()
                    yield from self._postpone(call, pending, event, as_stored(event)["seconds"])
                    return
                self._count_step()
                if pending is None or self._begins_nothing:
                    self._begun_beside.pop(call.named, None)
                    yield from self._write_storable(call, event)
                else:
                    answer = self._replay.finished(pending, as_stored(event)["result"])
                    yield from self._tell(pending, event, answer)
            case Raised(error):
                is_left = pending is not None and self._stopped is not None
                if is_left and is_a(error, CancelledError):
                    yield from self._write([self._boundaries.given_back(call)])
                else:
                    yield from self._take_failure(call, pending, error)
            case Cancelled():
                self._is_cancelled = True
                yield from self._write(self._boundaries.stopped(call).normal.events[:1])
            case TransactionLost():
                raise TypeError("a step in a transaction is executed alone")
            case Stopped() as stopped:
                self._stopped = self._stopped or stopped
                yield from self._write([self._boundaries.given_back(call)])

    def _end_process(self, stopped: Stopped) -> Generator[Request, Any, None]:
        """This process is to end: once no body runs, or another worker would call it meanwhile.

        Told a second time it leaves the run to its lease.
        """
        if self._stopped is not None and self._stopped.error is not None:
            assert stopped.error is not None  # noqa: S101 - as `BodyEnded` has it
            raise stopped.error
        self._stopped = stopped
        for name in list(self._in_flight):
            self._told_to_end.add(name)
            yield EndBody(occurrence=name)

    def _take_failure(
        self, call: Call, pending: Call | None, error: BaseException
    ) -> Generator[Request, Any, None]:
        assert isinstance(call.step, Step)  # noqa: S101 - it has a body
        commit = self._failed(call, call.step, error)
        failure, event = commit.failure, commit.settlement.normal.events[0]
        assert failure is not None  # noqa: S101 - as `_failed` has it
        if pending is None:
            self._begun_beside.pop(call.named, None)
            told = call.named in self._told_to_end and is_a(error, CancelledError)
            event = self._boundaries.abandoned(call, None if told else failure.facts)
            settlement = self._boundaries.going_on([event])
            yield from self._write_all(replace(commit, settlement=settlement))
        elif failure.retry_in is not None:
            call.failures += 1
            call.judged()
            event = self._boundaries.retried(event, failure.retry_in)
            yield from self._postpone(call, pending, event, failure.retry_in, commit)
        elif self._begins_nothing:
            settlement = self._boundaries.going_on([event])
            yield from self._write_all(replace(commit, settlement=settlement))
        else:
            self._count_step()
            answer = self._replay.failed(pending, as_stored(event)["error"])
            yield from self._tell(pending, event, answer, commit)

    def _count_step(self) -> None:
        """Several may end after the last one that was to be executed here."""
        if self._steps_left > 0:
            self._steps_left -= 1

    def _postpone(
        self,
        call: Call,
        pending: Call | None,
        event: NewEvent,
        seconds: float,
        commit: Commit | None = None,
    ) -> Generator[Request, Any, None]:
        """The step is tried again later."""
        settlement = self._boundaries.going_on([event])
        yield from self._write_all(replace(commit or EMPTY, settlement=settlement))
        if pending is not None:
            pending.starts, pending.failures = call.starts, call.failures
            pending.lost, pending.refused, pending.deaths = call.lost, call.refused, call.deaths
            pending.ran_out = call.ran_out
            pending.due_ms = self._lease.now_ms + 1000 * seconds

    def _end_wait(self, call: Call, wait: Wait, opened: OpenWait) -> Generator[Request, Any, bool]:
        """End a wait if its signal or its time has come; whether it has."""
        signal = call.inbox.oldest(opened)
        if problem := opened.problem_with(signal, wait.form):
            self._unreadable = call.key, problem
            return True
        if signal is None and not opened.ended(self._lease.now_ms):
            return False
        answer = self._replay.waited(call, signal)
        yield from self._tell(call, opened.finished(signal), answer, if_quiet=signal is None)
        return True

    def _tell(
        self,
        call: Call,
        event: NewEvent,
        answer: Outcome,
        commit: Commit | None = None,
        *,
        if_quiet: bool = False,
    ) -> Generator[Request, Any, None]:
        """Tell the function of an outcome, and write that with what it makes of it.

        `if_quiet`: only if no signal has come; else it was told too much, and is called again.
        """
        self._begun_beside.pop(call.named, None)
        self._said = said = self._resumed(answer, call.named)
        try:
            if if_quiet:
                settlement = self._boundaries.going_on([event, *self._values()])
                reply: Committed | Signalled = yield CommitIfQuiet(settlement=settlement)
                self._take_up(reply)
                if isinstance(reply, Signalled):
                    yield from self._fold()
            elif (
                self._in_flight
                or isinstance(said, Several)
                or (isinstance(said, Call) and (self._steps_left == 0 or self._is_begun(said)))
            ):
                yield from self._begin([event], commit)
            else:
                settlement = self._followed(call, event, is_step=False)  # it was counted
                end = yield from self._commit(replace(commit or EMPTY, settlement=settlement))
                self._left = (self._begun(settlement, end),)
        except Unstorable as error:
            yield from self._write_unstorable(call, error)
            yield from self._fold()

    def _take_up(self, reply: Committed | Signalled) -> None:
        """Take up what was found instead of a commit."""
        if isinstance(reply, Committed):
            self._note(reply)
            return
        for event in reply.events:
            self._replay.history.inbox.note(event)

    def _last(self, said: Ended | Broken, events: Sequence[NewEvent]) -> Settlement:
        """As there; with the ends of steps that the function has gone on without."""
        begun, self._begun_beside = list(self._begun_beside.values()), {}
        passed = [self._boundaries.abandoned(call) for call in begun]
        return super()._last(said, [*passed, *events])

    # Commits

    def _write(self, events: Sequence[NewEvent]) -> Generator[Request, Any, Committed]:
        return (yield from self._write_all(Commit(settlement=self._boundaries.going_on(events))))

    def _write_all(self, commit: Commit) -> Generator[Request, Any, Committed]:
        """Raises Unstorable."""
        committed = yield from self._commit(commit)
        self._note(committed)
        return committed

    def _write_storable(self, call: Call, event: NewEvent) -> Generator[Request, Any, None]:
        """Write the result of a step, if it can be stored."""
        try:
            yield from self._write([event])
        except Unstorable as error:
            yield from self._write_unstorable(call, error)

    def _write_unstorable(self, call: Call, error: Unstorable) -> Generator[Request, Any, None]:
        yield from self._write(self._boundaries.unstorable(call, str(error)).normal.events[:1])

    def _note(self, committed: Committed) -> None:
        self._last_seq = committed.last_seq
        self._is_cancelled |= committed.cancelled

    def _interrupted(self, progress: Progress, step: Step, reason: Exception) -> Commit:
        """As there. Called in the thread of the watchdog."""
        commit = super()._interrupted(progress, step, reason)
        begun = {call.named: call for call in [*self._beginning, *list(self._in_flight.values())]}
        others = [call for call in begun.values() if call is not progress]
        if not others:
            return commit
        settlement, failure = commit.settlement, commit.failure
        if failure is not None and failure.retry_in is not None:
            event = self._boundaries.retried(settlement.normal.events[0], failure.retry_in)
            normal = replace(settlement.normal, events=[event])
            settlement = replace(settlement, normal=normal)
        return replace(commit, settlement=self._boundaries.left_beside(settlement, others))
