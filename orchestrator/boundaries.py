"""The commits of each outcome of an attempt. Pure: it decides, and neither writes nor logs.

An attempt ends in one of these ways; the run then goes on, waits or has ended:

    the body returned      StepFinished, with the next start or RunFinished; or a snooze
    the body failed        StepFailed, and the run waits for the next attempt or has failed
    the run is cancelled   StepFailed, and the run has ended, or waits for its `on_cancel` step
    the worker stops       a trace: the attempt is made again and does not count
    the worker is busy     the same, before the body was called
    the transaction broke  a trace: the same; after many in a row the run has failed

A wait ends with WaitFinished, and the run goes on as after a step; or it leaves its worker.
"""

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from beatless.orchestrator.errors import (
    BadPayload,
    ChildFailed,
    DeadlineExceeded,
    Fatal,
    StepFailed,
)
from beatless.orchestrator.events import EventType, NewEvent, encode
from beatless.orchestrator.failure import (
    MESSAGE_LIMIT,
    cancel_error,
    describe,
    is_a,
    storable_text,
)
from beatless.orchestrator.long_history import HistoryTooLong
from beatless.orchestrator.open_waits import OpenWait, Received, wait_started
from beatless.orchestrator.outcomes import Finish, Goto, Snooze
from beatless.orchestrator.plan import Element, Plan, Step, occurrence
from beatless.orchestrator.progress import (
    CONNECTION_LOST,
    FINAL,
    GIVEN_BACK,
    ON_CANCEL,
    RAN_OUT,
    RENAMED_FROM,
    SNOOZED,
    UNDO,
    UNKNOWN_STEP,
    Progress,
    following_name,
    known_step,
)
from beatless.orchestrator.settlement import NEVER_S, Boundary, Settlement
from beatless.orchestrator.state import UNDOING, WAITS, RunState
from beatless.orchestrator.waits import Wait
from beatless.outbox.backoff import Backoff

BETWEEN_LOSSES = Backoff(initial=1.0, cap=60.0)
"""Seconds between attempts whose transactions were lost, from the second in a row on."""

MAX_LOSSES = 20
"""Transactions of a step that are lost in a row until the run fails: a quarter of an hour.

A statement that crashes its server would else do so each minute for ever. Those that were refused
have done nothing, and do not count.
"""

UNREADABLE_INPUT = {
    "type": "BadPayload",
    "message": "the run's input is nested too deeply to be read, or a number of it is too long",
}

Facts = dict[str, Any]
"""The members of an error."""

ENDED_UNREAD = (RunState.FAILED, RunState.CANCELLED)

FAILURE_BYTES = 262_144
"""Above the needs of any failure, see `orchestrator.failure`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """The commit for the return value of a body, or for the end of a wait."""

    settlement: Settlement
    following: Element | None
    """The step or wait that comes next: the same step after a snooze, None at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailure:
    """The commit for a failed attempt, and its log line."""

    settlement: Settlement
    step: str
    """The occurrence."""
    attempt: int
    error: BaseException
    facts: dict[str, Any]
    """Its type, message and traceback, as they are stored."""
    retry_in: float | None
    """Seconds until the next attempt; None if there is none."""


class Boundaries:
    """The boundaries of one run of a plan. Each method is a function of where the run is.

    A cancel that was accepted before wins: the step in flight commits, then the run is over. If the
    plan has an `on_cancel` step the run is given back instead, and is due at once: the next claim
    begins with that step.
    """

    def __init__(self, plan: Plan, run_id: str, *, max_event_bytes: int) -> None:
        self._plan = plan
        self._run_id = run_id
        self._max_event_bytes = max_event_bytes
        self.undoes = False
        """A step was begun that is undone when the run fails or is cancelled: then it goes on."""
        self._begins_undone = False
        """The boundary that is being made begins the first of these."""

    # An attempt begins

    def started(self, progress: Progress, before: Sequence[NewEvent]) -> Settlement:
        """The start of the attempt that the progress counts already, after other events."""
        going_on = Boundary(events=[*before, self._start(progress)], state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, before)

    # The body returned

    def concluded(
        self, progress: Progress, step: Step, value: Any, *, late: bool, gives_back: bool
    ) -> Conclusion:
        """The outcome that the step returned.

        `late`: the run has reached its deadline. `gives_back`: another worker goes on with it.
        Raises Fatal for an outcome that the plan does not allow, and BadPayload for a result that
        cannot be stored.
        """
        if step.outcomes and not isinstance(value, tuple(step.outcomes)):
            raise Fatal(
                f"step {step.name} returned a {type(value).__name__}; it is annotated to return "
                f"only {', '.join(sorted(kind.__name__ for kind in step.outcomes))}"
            )
        match value:
            case Snooze(seconds):
                return Conclusion(settlement=self._snoozed(progress, seconds), following=step)
            case Finish(result):
                following, data = None, {"result": result, "next": None}
            case Goto(target, result):
                if not self._plan.may_go(step.name, target):
                    raise Fatal(
                        f"step {step.name} returned Goto({target!r:.200}), which plan "
                        f"{self._plan.name} does not declare in its routes"
                    )
                following = known_step(self._plan, target)
                data = {"result": result, "next": following.name}
            case result:
                following, data = progress.after(self._plan, step.name), {"result": result}
        if progress.compensating:
            data[ON_CANCEL] = True
        elif "next" not in data:
            data |= following_name(following, is_last=late or gives_back)
        finished = self._event(EventType.STEP_FINISHED, progress, **data)
        if progress.compensating:
            ended = self._end(RunState.CANCELLED, [finished], cancel_error(None))
            return Conclusion(settlement=Settlement.ignoring_cancel(ended), following=None)
        if following is None:
            completed = self.completed(data["result"], [finished])
            return Conclusion(settlement=completed, following=None)
        if late:
            return Conclusion(settlement=self.overdue([finished]), following=None)
        if gives_back:
            returned = self._given_back(progress, "shutdown", [finished])
            return Conclusion(settlement=returned, following=following)
        visit = progress.visits[following.name] + 1 + (following is step)
        return self._going_on(progress, finished, following, visit)

    def completed(self, result: Any, events: Sequence[NewEvent] = ()) -> Settlement:
        """The end of a run whose steps have all finished. Raises BadPayload."""
        try:
            text = encode(result, where="result", limit=self._max_event_bytes)
        except BadPayload as error:
            raise BadPayload(f"{error.where} of run {self._run_id}", error.reason) from error
        ended = NewEvent(
            type=EventType.RUN_FINISHED, data=f'{{"outcome":"completed","result":{text}}}'
        )
        return Settlement(
            normal=Boundary(events=[*events, ended], state=RunState.COMPLETED, result=text),
            if_cancelled=self._cancelled(events),
        )

    def _snoozed(self, progress: Progress, seconds: float) -> Settlement:
        note = self._event(EventType.DEBUG_TRACE, progress, name=SNOOZED, seconds=seconds)
        waiting = Boundary(events=[note], state=RunState.QUEUED, delay_s=seconds)
        return self._unless_cancelled(progress, waiting, [], "snooze")

    # The run waits

    def wait_begun(self, progress: Progress, wait: Wait, before: Sequence[NewEvent]) -> Settlement:
        """The start of a wait, after other events."""
        events = [*before, self._wait_start(progress.occurrence, wait)]
        going_on = Boundary(events=events, state=RunState.RUNNING)
        return self._unless_cancelled(progress, going_on, before)

    def wait_parked(self, progress: Progress, wait: Wait, before: Sequence[NewEvent]) -> Settlement:
        """The same, and with it the run leaves its worker."""
        begun = self.wait_begun(progress, wait, before)
        delay_s = NEVER_S if wait.seconds is None else wait.seconds
        parked = replace(begun.normal, state=RunState.QUEUED, delay_s=delay_s)
        return replace(begun, normal=parked, reason=WAITS)

    def parked(self, progress: Progress) -> Settlement:
        """The run leaves its worker until a signal comes, or its waits end."""
        return self._given_back(progress, WAITS, [])

    def shut_down(self, progress: Progress) -> Settlement:
        """The worker stops, between two steps: another one goes on."""
        return self._given_back(progress, "shutdown", [])

    def waited(
        self,
        progress: Progress,
        wait: Wait,
        opened: OpenWait,
        signal: Received | None,
        *,
        gives_back: bool,
    ) -> Conclusion:
        """The end of a wait, by this signal or without one by its time."""
        if signal is None and wait.on_timeout is not None:
            following: Element | None = known_step(self._plan, wait.on_timeout.step)
            data: dict[str, Any] = {"next": wait.on_timeout.step}
        else:
            following = progress.after(self._plan, wait.name)
            data = following_name(following, is_last=gives_back)
        finished = opened.finished(signal, **data)
        if following is None:
            completed = self.completed(progress.result, [finished])
            return Conclusion(settlement=completed, following=None)
        if gives_back:
            returned = self._given_back(progress, "shutdown", [finished])
            return Conclusion(settlement=returned, following=following)
        visit = progress.visits[following.name] + 1 + (following is wait)
        return self._going_on(progress, finished, following, visit)

    # The body failed

    def failed(
        self, progress: Progress, step: Step, error: BaseException, *, late: bool
    ) -> StepFailure:
        """The step is tried again later, or the run has failed. To describe it never raises."""
        retry_in = step.retry.delay(progress.failures + 1)
        if is_a(error, (Fatal, BadPayload)) or (is_a(error, DeadlineExceeded) and late):
            retry_in = None
        facts = describe(error, progress.occurrence)
        failed = self._failure(progress, facts)
        if retry_in is None:
            settlement = self._given_up(progress, failed, facts)
        else:
            waiting = Boundary(events=[failed], state=RunState.QUEUED, delay_s=retry_in)
            # Of a cancelled run that goes on, to be undone, it is not tried again.
            goes_on = self._plan.on_cancel is not None or self.undoes
            last = self._failure(progress, facts, final=goes_on)
            settlement = self._unless_cancelled(progress, waiting, [last], "retry")
        return StepFailure(
            settlement=settlement,
            step=progress.occurrence,
            attempt=progress.starts,
            error=error,
            facts=facts,
            retry_in=retry_in,
        )

    def crashed(self, progress: Progress) -> Settlement:
        """The step has ended its process, or lost its lease, too often: it is not tried again."""
        text = f"step {progress.occurrence} ended its process {progress.crashes} times"
        last = _last_attempt(progress)
        if progress.ran_out and not progress.crashes:
            return self._failed_with(last, "LeaseRanOut", _ran_out(progress))
        if progress.deaths:
            text += (
                f", and was one of several in a process or worker that died {progress.deaths} times"
            )
        if progress.ran_out:
            text += f"; {_ran_out(progress)}"
        return self._failed_with(last, "StepCrashed", text)

    def ran_out(self, progress: Progress) -> NewEvent:
        """The trace of the last attempt: its lease ran out, and nobody knows how it ended."""
        return NewEvent(
            type=EventType.DEBUG_TRACE,
            step=progress.occurrence or progress.begun,
            attempt=progress.starts,
            data=json.dumps({"name": GIVEN_BACK, RAN_OUT: True}),
        )

    def too_long(self) -> Settlement:
        """The history of the run has too many events: it fails between two steps."""
        return self._ended(RunState.FAILED, [], _facts_of(HistoryTooLong(of_function=False)))

    def unstorable(self, progress: Progress, reason: str) -> Settlement:
        """Postgres refuses the step's result or error: no other attempt will do better.

        In ASCII, which a database in any encoding can hold.
        """
        text = (
            f"the result of step {progress.occurrence} cannot be stored in this database: {reason}"
        )
        message = text[:MESSAGE_LIMIT].encode("ascii", "backslashreplace").decode()
        return self._failed_with(progress, "BadPayload", message)

    def unreadable(self) -> Settlement:
        """No step shall get what stands for the run's input."""
        return self._ended(RunState.FAILED, [], UNREADABLE_INPUT)

    def unread(self, message: str) -> Settlement:
        """What the run has done is unknown: nothing more is done, also for a cancel."""
        text = _failure_text({"type": "BadPayload", "message": message})
        failed, cancelled = (self._end_with(s, [], text) for s in ENDED_UNREAD)
        return Settlement(normal=failed, if_cancelled=cancelled)

    def overdue(self, events: Sequence[NewEvent] = ()) -> Settlement:
        """The run has reached its deadline."""
        return self._ended(RunState.FAILED, events, _facts_of(DeadlineExceeded(self._run_id)))

    def broken(self, error: BaseException, events: Sequence[NewEvent]) -> Settlement:
        """The function of a plan, or for the inputs of children, has raised: the run has failed."""
        return self._ended(RunState.FAILED, events, _facts_of_broken(error))

    # The run is cancelled, or its worker stops

    def stopped(self, progress: Progress) -> Settlement:
        """The step ended early because of a cancel."""
        facts = cancel_error(None) | {"step": progress.occurrence}
        failed = self._failure(progress, facts)
        if progress.compensating:
            return self._given_up(progress, failed, facts)
        if self._plan.on_cancel is None and not self.undoes:
            return self._ended(RunState.CANCELLED, [failed], facts)
        # The run waits, but to be undone and not for another attempt of this one.
        waiting = Boundary(
            events=[self._failure(progress, facts, final=True)], state=RunState.QUEUED
        )
        return Settlement.ignoring_cancel(waiting, "cancel")

    def unfinished(self, progress: Progress) -> Settlement:
        """The worker stops in the middle of a step: another one makes this attempt again."""
        return self._uncounted(progress, "shutdown")

    def handed_back(self, progress: Progress) -> Settlement:
        """The attempt has begun and its body has not: its process is busy with another run."""
        return self._uncounted(progress, "busy")

    def released(
        self,
        progress: Progress,
        delay_s: float,
        reason: str = UNKNOWN_STEP,
        before: Sequence[NewEvent] = (),
    ) -> Settlement:
        """The run stands at a step without a slot, or that this version of the plan lacks."""
        return self._given_back(progress, reason, before, delay_s)

    # The transaction broke

    def connection_lost(self, progress: Progress, *, refused: bool) -> NewEvent:
        """The trace that uncounts the attempt whose transaction is gone, or never was."""
        facts = {"refused": True} if refused else {}
        return self._event(EventType.DEBUG_TRACE, progress, name=CONNECTION_LOST, **facts)

    def disconnected(self, progress: Progress, lost: NewEvent, losses: int) -> Settlement:
        """The attempt is made again later; `losses` is how many in a row were before it."""
        return self._given_back(progress, "connection", [lost], BETWEEN_LOSSES.delay(losses))

    def lost(self, progress: Progress, reason: str) -> Settlement:
        """Postgres took back one transaction of the step after the other."""
        last = storable_text(reason[:MESSAGE_LIMIT])
        return self._failed_with(
            progress,
            "TransactionLost",
            f"step {progress.occurrence} lost the connection of its transaction "
            f"{progress.lost + 1} times in a row, the last time: {last}",
        )

    # Of these they are made

    def _start(self, progress: Progress, **data: Any) -> NewEvent:
        if progress.key != progress.occurrence:
            data[RENAMED_FROM] = progress.key
        data |= self._undo_of(progress.step)
        return self._event(EventType.STEP_STARTED, progress, **data)

    def _undo_of(self, step: Element | None) -> dict[str, Any]:
        """The data of the start of a step that is to be undone."""
        if not isinstance(step, Step) or step.undo is None:
            return {}
        self._begins_undone = True
        return {UNDO: step.undo.name}

    def _wait_start(self, occurrence: str, wait: Wait) -> NewEvent:
        return wait_started(occurrence, wait)

    def _going_on(
        self, progress: Progress, finished: NewEvent, following: Element, visit: int
    ) -> Conclusion:
        name = occurrence(following.name, visit)
        if isinstance(following, Wait):
            started = self._wait_start(name, following)
        else:
            undo = self._undo_of(following)
            started = NewEvent(
                type=EventType.STEP_STARTED,
                step=name,
                attempt=1,
                data=json.dumps(undo) if undo else None,
            )
        going_on = Boundary(events=[finished, started], state=RunState.RUNNING)
        settlement = self._unless_cancelled(progress, going_on, [finished])
        return Conclusion(settlement=settlement, following=following)

    def _unless_cancelled(
        self,
        progress: Progress,
        boundary: Boundary,
        events: Sequence[NewEvent],
        reason: str = "retry",
    ) -> Settlement:
        """This boundary; or these events and the end of the run if it was cancelled before."""
        if progress.compensating:
            return Settlement.ignoring_cancel(boundary, reason)
        cancelled = self._cancelled(events)
        # Only now: what the boundary begins is not begun if the run was cancelled before.
        self.undoes |= self._begins_undone
        return Settlement(normal=boundary, if_cancelled=cancelled, reason=reason)

    def _given_back(
        self, progress: Progress, reason: str, events: Sequence[NewEvent], delay_s: float = 0.0
    ) -> Settlement:
        waiting = Boundary(events=events, state=RunState.QUEUED, delay_s=delay_s)
        return self._unless_cancelled(progress, waiting, events, reason)

    def _uncounted(self, progress: Progress, reason: str) -> Settlement:
        note = self._event(EventType.DEBUG_TRACE, progress, name=GIVEN_BACK)
        return self._given_back(progress, reason, [note])

    def _failed_with(self, progress: Progress, type: str, message: str) -> Settlement:
        facts = {"type": type, "message": message, "step": progress.occurrence}
        return self._given_up(progress, self._failure(progress, facts), facts)

    def _given_up(self, progress: Progress, failed: NewEvent, facts: dict[str, Any]) -> Settlement:
        """The step has failed for good. A run whose `on_cancel` step fails is cancelled still."""
        if not progress.compensating:
            final = self._failure(progress, facts, final=True)
            if self.undoes:  # the run goes on, and not with another attempt
                return self._ended(RunState.FAILED, [final], facts)
            ended = self._ended(RunState.FAILED, [failed], facts)
            if self._plan.on_cancel is None:
                return ended
            return replace(ended, if_cancelled=self._cancelled([final]))  # goes on with that step
        error = cancel_error(None) | {"on_cancel": facts}
        return Settlement.ignoring_cancel(self._end(RunState.CANCELLED, [failed], error))

    def _ended(self, state: RunState, events: Sequence[NewEvent], facts: Facts) -> Settlement:
        if self.undoes and state is RunState.FAILED:
            started = NewEvent(
                type=EventType.UNDO_STARTED, data=f'{{"error":{_failure_text(facts)}}}'
            )
            undone = Boundary(events=[*events, started], state=RunState.QUEUED)
            return Settlement(normal=undone, if_cancelled=self._cancelled(events), reason=UNDOING)
        normal = self._end(state, events, facts)
        return Settlement(normal=normal, if_cancelled=self._cancelled(events))

    def _cancelled(self, events: Sequence[NewEvent]) -> Boundary:
        if self._plan.on_cancel is not None or self.undoes:
            return Boundary(events=events, state=RunState.QUEUED)
        return self._end_with(RunState.CANCELLED, events, CANCELLED_TEXT)

    def _end(self, state: RunState, events: Sequence[NewEvent], facts: Facts) -> Boundary:
        return self._end_with(state, events, _failure_text(facts))

    def _end_with(self, state: RunState, events: Sequence[NewEvent], text: str) -> Boundary:
        ended = NewEvent(
            type=EventType.RUN_FINISHED, data=f'{{"outcome":"{state.value}","error":{text}}}'
        )
        return Boundary(events=[*events, ended], state=state, error=text)

    def _failure(self, progress: Progress, facts: Facts, *, final: bool = False) -> NewEvent:
        last = f',"{FINAL}":true' if final else ""
        return NewEvent(
            type=EventType.STEP_FAILED,
            step=progress.occurrence,
            attempt=progress.starts,
            data=f'{{"error":{_failure_text(facts)}{last}}}',
        )

    def _event(self, type: EventType, progress: Progress, **data: Any) -> NewEvent:
        """Raises BadPayload."""
        text = None
        if data:
            text = encode(
                data, where=f"step {progress.occurrence}: its data", limit=self._max_event_bytes
            )
        return NewEvent(type=type, step=progress.occurrence, attempt=progress.starts, data=text)


def _facts_of(error: Exception) -> Facts:
    return {"type": type(error).__name__, "message": str(error)}


def _facts_of_broken(error: BaseException) -> Facts:
    """Never raises, whatever the error is."""
    if type(error) is StepFailed:
        return {"type": error.type, "message": error.message, "step": error.step}
    if type(error) is ChildFailed:
        return {"type": "ChildFailed", "message": str(error), "child": error.run_id}
    facts = describe(error, "")
    del facts["step"]
    return facts


def _last_attempt(progress: Progress) -> Progress:
    """The place at the attempt that began last: if it was given back it is the one that failed."""
    last = copy(progress)
    last.starts += not progress.in_flight
    return last


def _ran_out(progress: Progress) -> str:
    often = "once" if progress.ran_out == 1 else f"{progress.ran_out} times in a row"
    return (
        f"the lease of step {progress.occurrence} ran out {often} while it was executed: its "
        "worker stood still, was cut off, or died where nobody notices it"
    )


def _failure_text(facts: dict[str, Any]) -> str:
    """Facts of ours as JSON. The limit on users' data must not keep a failure from being stored."""
    return encode(facts, where="the error", limit=FAILURE_BYTES)


CANCELLED_TEXT = _failure_text(cancel_error(None))
"""The error of a run that is cancelled between two steps, as JSON: each boundary has it ready."""
