"""The work on one claimed run, from its claim to its end or to giving it back. Does no I/O.

It yields requests and is sent their replies: see `requests`.

1. fold the journal: finished steps are not executed again
2. start the next step's attempt (counted in Postgres before the body runs)
3. call the body
4. settle: the step's outcome and the next step's start are one commit
5. go on at 3, until the run ends, waits, or the worker stops

At a wait it takes a signal from the journal if there is one. If not, the run leaves the worker, or
goes on after a time-out; both are written only if no signal has come meanwhile.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from beatless.orchestrator import long_history
from beatless.orchestrator.boundaries import MAX_LOSSES, Boundaries, Conclusion
from beatless.orchestrator.errors import BadPayload, RunCancelled, WorkerStops
from beatless.orchestrator.events import Event, NewEvent, as_stored, is_unreadable
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.limit import RunLimit, limits_of
from beatless.orchestrator.open_waits import OpenWait, Received
from beatless.orchestrator.plan import Element, Plan, Step
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP, Progress, UnknownStep, fold
from beatless.orchestrator.records import CheckpointPage, Run
from beatless.orchestrator.requests import (
    Cancelled,
    Commit,
    CommitFailed,
    CommitIfQuiet,
    Committed,
    CommitWithSlots,
    HandedBack,
    NoSlot,
    Part,
    Raised,
    ReadJournal,
    Recover,
    Recovered,
    Request,
    Requests,
    Returned,
    RunBody,
    Signalled,
    Stopped,
    TransactionLost,
    Unstorable,
)
from beatless.orchestrator.settlement import NEVER_S, Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.unfit_events import UnfitRow, Unread, UnreadableEvent, folded
from beatless.orchestrator.waits import Wait, WaitKind

logger = logging.getLogger("beatless.orchestrator.executor")

UNKNOWN_STEP_S = 1.0
"""Seconds that a run waits at first whose step this worker does not have: most workers of a
rolling deploy have it, or none."""


class Execution:
    """One worker's decisions about one run."""

    def __init__(
        self,
        plan: Plan,
        lease: Lease,
        *,
        max_event_bytes: int,
        max_steps: int = 0,
        stopping: Callable[[], bool] = lambda: False,
        leaving: Callable[[], bool] = lambda: False,
        redispatch_s: float = 15.0,
    ) -> None:
        """`max_steps` gives the run back after that many (0: no limit), as `stopping` does, and a
        step that its plan does not have for at most `redispatch_s`. `leaving`: as `Executor`.
        """
        self._plan, self._lease = plan, lease
        self._run_id = lease.run.run_id
        self._boundaries = Boundaries(plan, self._run_id, max_event_bytes=max_event_bytes)
        self._steps_left = max_steps or -1
        self._stopping, self._leaving = stopping, leaving
        self._redispatch_s = redispatch_s
        self.undoes = False
        """It asks for nothing more: the run is undone, by another execution."""
        self._last_ts_ms = 0
        """Of the last event that was read, by the clock of Postgres."""
        self._read_events = 0

    def requests(self) -> Requests:
        """All that is to be done, in order. Each request must be answered before the next.

        Raises Unstorable, and the error of a Stopped.
        """
        try:
            yield from self._work()
        except Unread as error:
            yield from self._settle(self._boundaries.unread(str(error)))

    def _work(self) -> Requests:
        progress = yield from self._resume()
        while progress is not None and progress.step is not None:
            if isinstance(progress.step, Wait):
                progress = yield from self._wait(progress, progress.step)
            else:
                progress = yield from self._take_storable_step(progress, progress.step)

    def _resume(self) -> Part:
        if self._lease.begun and not self._lease.unreadable:
            return Progress(step=self._plan.first, starts=1)
        progress = yield from self._fold()
        self._boundaries.undoes |= progress.begun_undos
        self.undoes = progress.undoing or (progress.begun_undos and self._lease.cancelled)
        if self.undoes:
            return None
        if self._lease.cancelled:
            progress.cancel(self._plan.on_cancel)
        if self._lease.late and not progress.compensating:
            yield from self._settle(self._boundaries.overdue())
            return None
        if self._lease.unreadable and not progress.compensating:
            yield from self._settle(self._boundaries.unreadable())
            return None
        if self._read_events >= long_history.MAX_EVENTS and not progress.compensating:
            yield from self._settle(self._boundaries.too_long())
            return None
        return (yield from self._begin_attempt(progress, self._ran_out(progress)))

    def _ran_out(self, progress: Progress) -> list[NewEvent]:
        """The event about the attempt in flight if its lease ran out: it does not count."""
        if not (self._lease.ran_out and progress.in_flight):
            return []
        trace = self._boundaries.ran_out(progress)
        progress.uncounted()
        progress.ran_out += 1
        return [trace]

    def _fold(self) -> Generator[Request, Any, Progress]:
        """The progress of the run, folded from the journal."""
        events: list[Event] = []
        yield from read_pages(events.extend)
        self._read_events, self._last_ts_ms = len(events), events[-1].ts
        return folded(partial(fold, self._plan), events)

    def _begin_attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Part:
        """Start and count the next attempt of where the run is; None if there is none to start."""
        if (lacking := progress.unknown) is not None:  # a worker with another version goes on
            reason = str(UnknownStep(self._plan.name, lacking))
            released = self._released(progress, lacking, UNKNOWN_STEP, reason, before)
            yield from self._settle(released)
            return None
        if progress.step is None:
            yield from self._settle(self._boundaries.completed(progress.result))
            return None
        if isinstance(progress.step, Wait):
            return (yield from self._begin_wait(progress, progress.step, before))
        if progress.is_deadly(progress.step.retry.max_crashes):
            yield from self._settle(self._boundaries.crashed(progress))
            return None
        if progress.step.limits or self._lease.limited_step:
            return (yield from self._begin_limited(progress, progress.step, before))
        progress.starts += 1
        started = yield from self._settle(self._boundaries.started(progress, before))
        return None if started.cancelled and not progress.compensating else progress

    def _begin_limited(self, progress: Progress, step: Step, before: Sequence[NewEvent]) -> Part:
        """Start an attempt with the slots of its limits; without one the run waits for it."""
        try:
            limits = _limits_of(self._lease.run, progress, step)
        except BadPayload as error:
            yield from self._settle(self._boundaries.broken(error, before))
            return None
        parked = self._boundaries.released(progress, NEVER_S, "limit", before)
        progress.starts += 1
        reply: Committed | NoSlot | Unstorable = yield CommitWithSlots(
            settlement=self._boundaries.started(progress, before), limits=limits, parked=parked
        )
        if isinstance(reply, Unstorable):
            raise reply
        if isinstance(reply, NoSlot):
            logger.info(
                "run waits for a limit of its next step",
                extra={
                    "action": "limited",
                    "run_id": self._run_id,
                    "step": progress.occurrence,
                    "limit": reply.limit,
                },
            )
            return None
        return None if reply.cancelled and not progress.compensating else progress

    def _begin_wait(self, progress: Progress, wait: Wait, before: Sequence[NewEvent]) -> Part:
        """Begin the wait at which the run is, unless it has begun.

        In the commit with which it leaves the worker, if nothing is known that may end it.
        """
        if progress.key in progress.inbox.waits:
            return progress
        sleeps = wait.kind is WaitKind.SLEEP
        if sleeps or not (progress.inbox.signals or progress.inbox.decisions):
            parked = self._boundaries.wait_parked(progress, wait, before)
            reply: Committed | Signalled = yield CommitIfQuiet(settlement=parked, sleeps=sleeps)
            if isinstance(reply, Committed):
                return None
            for event in reply.events:
                progress.inbox.note(event)
        begun = yield from self._settle(self._boundaries.wait_begun(progress, wait, before))
        if begun.cancelled:
            return None
        progress.begin_wait(wait, begun.last_seq)
        return progress

    def _wait(self, progress: Progress, wait: Wait) -> Part:
        """End the wait at which the run is if its signal or its time has come, or leave it.

        Goes on with the same wait if signals have come instead of the boundary.
        """
        opened = progress.inbox.waits[progress.key]
        if self._lease.late:
            yield from self._settle(self._boundaries.overdue())
            return None
        signal = progress.inbox.oldest(opened)
        if problem := opened.problem_with(signal, wait.form):
            yield from self._settle(self._released(progress, progress.key, CHANGED_CALL, problem))
            return None
        if signal is None and not opened.ended(self._lease.now_ms):
            parked = self._boundaries.parked(progress)
            sleeps = opened.kind is WaitKind.SLEEP
            if sleeps:
                parked = parked.due_in(_seconds_left(wait, opened, self._lease.now_ms))
            reply: Committed | Signalled = yield CommitIfQuiet(
                settlement=parked, waits=[opened.seq], sleeps=sleeps
            )
            if isinstance(reply, Committed):
                return None
        else:
            conclusion = self._waited(progress, wait, opened, signal)
            if signal is not None or opened.kind is WaitKind.SLEEP:  # which no signal ends
                reply = yield from self._settle(conclusion.settlement)
            else:
                reply = yield CommitIfQuiet(settlement=conclusion.settlement)
            if isinstance(reply, Committed):
                return self._after_wait(progress, wait, signal, conclusion, reply)
        for event in reply.events:
            progress.inbox.note(event)
        return progress

    def _waited(
        self, progress: Progress, wait: Wait, opened: OpenWait, signal: Received | None
    ) -> Conclusion:
        """The commit for the end of a wait, with all that follows from it."""
        return self._boundaries.waited(progress, wait, opened, signal, gives_back=self._stopping())

    def _after_wait(
        self,
        progress: Progress,
        wait: Wait,
        signal: Received | None,
        conclusion: Conclusion,
        end: Committed,
    ) -> Progress | None:
        normal = conclusion.settlement.normal
        if end.cancelled or normal.state is not RunState.RUNNING:
            return None
        routed = signal is None and wait.on_timeout is not None
        progress.inbox.end(progress.key, None if signal is None else signal.seq)
        progress.passed(wait.name, signal, routed=routed)
        self._begin_next(progress, conclusion.following, end)
        return progress

    def _begin_next(self, progress: Progress, following: Element | None, begun: Committed) -> None:
        """The commit that ended a step or a wait has begun this one."""
        progress.go_on(following)
        if isinstance(following, Wait):
            progress.begin_wait(following, begun.last_seq)
        elif following is None or not following.limits:
            progress.starts = 1

    def _released(
        self,
        progress: Progress,
        step: str,
        action: str,
        reason: str,
        before: Sequence[NewEvent] = (),
    ) -> Settlement:
        """The run is left to a worker with another version: at once, then less and less often."""
        waited = (self._lease.now_ms - self._last_ts_ms) / 1000
        delay = min(max(waited / 2, UNKNOWN_STEP_S), self._redispatch_s)
        logger.warning(
            "run released: its plan has another version than this worker's",
            extra={
                "action": action,
                "run_id": self._run_id,
                "step": step,
                "retry_in": delay,
                "reason": reason,
            },
        )
        return self._boundaries.released(progress, delay, action, before)

    def _take_storable_step(self, progress: Progress, step: Step) -> Part:
        """`_take_step`, for any outcome or failure; or begin it, if the last commit did not."""
        if not progress.starts:
            return (yield from self._begin_attempt(progress))
        try:
            return (yield from self._take_step(progress, step))
        except Unstorable as error:
            logger.error(
                "step's outcome cannot be stored, its run fails",
                extra={
                    "action": "unstorable",
                    "run_id": self._run_id,
                    "step": progress.occurrence,
                    "reason": str(error),
                },
            )
            yield from self._settle(self._boundaries.unstorable(progress, str(error)))
            return None

    def _take_step(self, progress: Progress, step: Step) -> Part:
        """Run one attempt."""
        end = yield self._body(progress, step)
        if isinstance(end, Returned):
            conclusion = self._gone_on(progress, end.conclusion)
            end = yield Commit(settlement=conclusion.settlement)
            if isinstance(end, Committed):
                return self._go_on(progress, step, conclusion, end)
        match end:
            case TransactionLost():
                return (yield from self._after_lost_transaction(progress, end))
            case CommitFailed():
                return (yield from self._after_failed_commit(progress, step, end))
            case Raised(error):
                return (yield from self._fail(progress, step, error))
            case Cancelled():
                yield from self._settle(self._boundaries.stopped(progress))
            case HandedBack():
                yield from self._settle(self._boundaries.handed_back(progress))
            case Stopped(error):
                yield from self._settle(self._boundaries.unfinished(progress))
                if error is not None:
                    raise error from None
        return None

    def _body(self, progress: Progress, step: Step) -> RunBody:
        """The call of the body of an attempt that has begun."""

        def conclude(value: Any) -> Conclusion:
            return self._boundaries.concluded(
                progress,
                step,
                value,
                late=self._lease.late,
                gives_back=self._stopping() or self._steps_left == 1,
            )

        return RunBody(
            step=step,
            occurrence=progress.occurrence,
            key=f"{self._run_id}:{progress.key}",
            attempt=progress.starts,
            results=progress.shown_results(self._plan),
            compensating=progress.compensating,
            deaths=progress.suspicions,
            conclude=conclude,
            interrupted=lambda reason: self._interrupted(progress, step, reason),
        )

    def _gone_on(self, progress: Progress, conclusion: Conclusion) -> Conclusion:
        """The commit for a body that has returned, with all that follows from it."""
        del progress
        return conclusion

    def _go_on(
        self, progress: Progress, step: Step, conclusion: Conclusion, end: Committed
    ) -> Progress | None:
        normal = conclusion.settlement.normal
        if end.cancelled or normal.state is not RunState.RUNNING:
            return None
        self._steps_left -= 1
        finished = as_stored(normal.events[0])
        progress.finished(step.name, finished["result"], routed="next" in finished)
        self._begin_next(progress, conclusion.following, end)
        return progress

    def _interrupted(self, progress: Progress, step: Step, reason: Exception) -> Commit:
        match reason:
            case RunCancelled():
                return Commit(settlement=self._boundaries.stopped(progress))
            case WorkerStops():
                return Commit(settlement=self._boundaries.unfinished(progress))
        return self._failed(progress, step, reason)

    def _failed(self, progress: Progress, step: Step, error: BaseException) -> Commit:
        failure = self._boundaries.failed(progress, step, error, late=self._lease.late)
        return Commit(settlement=failure.settlement, failure=failure)

    def _fail(self, progress: Progress, step: Step, error: BaseException) -> Part:
        yield from self._commit(self._failed(progress, step, error))
        return None

    def _after_lost_transaction(self, progress: Progress, lost: TransactionLost) -> Part:
        """Go on if it was committed all the same, else make the attempt again.

        The first time in a row at once, for Postgres can be reached again; then it is given time.
        """
        recovered: Recovered = yield Recover()
        if recovered.ended:
            return None
        progress = yield from self._fold()
        if recovered.committed:
            self._steps_left -= 1
            return progress
        logger.warning(
            "transaction lost, the step is retried",
            extra={
                "action": "transaction_lost",
                "run_id": self._run_id,
                "step": progress.occurrence,
                "refused": lost.refused,
                "reason": lost.reason,
            },
        )
        if not lost.refused and progress.lost + 1 >= MAX_LOSSES:
            yield from self._settle(self._boundaries.lost(progress, lost.reason))
            return None
        trace = self._boundaries.connection_lost(progress, refused=lost.refused)
        losses = progress.lost + progress.refused
        progress.lose(refused=lost.refused)
        if not losses:
            return (yield from self._begin_attempt(progress, [trace]))
        yield from self._settle(self._boundaries.disconnected(progress, trace, losses))
        return None

    def _after_failed_commit(self, progress: Progress, step: Step, failed: CommitFailed) -> Part:
        """Go on if it was committed all the same, else the step has failed."""
        recovered: Recovered = yield Recover()
        if recovered.ended:
            return None
        found = (yield from self._fold()) if recovered.committed else progress
        if failed.leaving:
            yield from self._settle(self._boundaries.unfinished(found))
            raise failed.error
        if recovered.committed:
            self._steps_left -= 1
            return found
        yield from self._commit(self._failed(progress, step, failed.error))
        return None

    def _settle(self, settlement: Settlement) -> Generator[Request, Any, Committed]:
        return (yield from self._commit(Commit(settlement=settlement)))

    def _commit(self, commit: Commit) -> Generator[Request, Any, Committed]:
        """Raises Unstorable."""
        reply: Committed | Unstorable = yield commit
        if isinstance(reply, Unstorable):
            raise reply
        return reply


def read_pages(take: Callable[[Sequence[Event]], None]) -> Generator[Request, Any, None]:
    """Read the journal, a page at a time. Raises UnreadableEvent and UnfitRow."""
    page: CheckpointPage | None = None
    while page is None or not page.last:
        page = yield ReadJournal(behind=page)
        if page.unfit:
            raise UnfitRow(page.unfit)
        for event in page.events:
            if is_unreadable(event):
                raise UnreadableEvent(event)
        take(page.events)


def _seconds_left(wait: Wait, opened: OpenWait, now_ms: float) -> float:
    """Seconds until the end of a sleep; all of them if it has begun in this claim."""
    if opened.until_ms is None:
        return wait.seconds or 0.0
    return max(0.0, (opened.until_ms - now_ms) / 1000)


def _limits_of(run: Run, progress: Progress, step: Step) -> Sequence[RunLimit]:
    """The limits of a step of a run, with those of its namespace. Raises BadPayload."""
    namespace, mark, _ = run.run_id.rpartition("~")
    prefix = f"{namespace}{mark}"
    return limits_of(step.limits, run.input, prefix=prefix, step=progress.occurrence)
