"""Executes one run: claim it, fold its journal, run what is left, commit each boundary."""

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from decimal import Decimal
from functools import cache
from typing import Any, NoReturn, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import (
    BadPayload,
    DeadlineExceeded,
    Fatal,
    LeaseLost,
    RunCancelled,
    RunNotFound,
    StepEnded,
    StepTimeout,
    WorkerStops,
)
from beatless.orchestrator.events import EventType, NewEvent, encode
from beatless.orchestrator.failure import MESSAGE_LIMIT, describe, is_a, storable_text, text_of
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.journal import Appended, Journal, Settlement, cancel_error
from beatless.orchestrator.lease import Connection, Lease, Leases, LeaseStatus
from beatless.orchestrator.observer import Claimed, NotClaimed, Settled, StepCommitted, TakenOver
from beatless.orchestrator.plan import Finish, Goto, Plan, Snooze, Step, occurrence
from beatless.orchestrator.progress import (
    CONNECTION_LOST,
    FOLDED,
    FOLLOWING,
    GIVEN_BACK,
    ON_CANCEL,
    RENAMED_FROM,
    SNOOZED,
    UNKNOWN_STEP,
    Progress,
    UnknownStep,
    fold,
    known_step,
)
from beatless.orchestrator.state import RunState
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.faults import CrashPoints, SimulatedCrash
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.queries import Caller

logger = logging.getLogger(__name__)

ShownError = Callable[[dict[str, Any]], dict[str, Any]]

Scope = Callable[[Lease, str | None, int], AbstractContextManager[str | None]]
"""Entered around the work on a run (no step) and around each attempt of a step (its occurrence).

Gives the W3C `traceparent` of the work, if somebody traces it.
"""

T = TypeVar("T")

UNKNOWN_STEP_S = 1.0
"""Seconds that it waits at first: most workers of a rolling deploy have the step, or none."""

BETWEEN_LOSSES = Backoff(initial=1.0, cap=60.0)
"""Between attempts whose transactions were lost, from the second in a row on."""

MAX_LOSSES = 20
"""Transactions of a step that are lost in a row until the run fails: a quarter of an hour.

A statement that crashes its server would else do so each minute for ever. Those that were refused
have done nothing, and do not count.
"""

TOO_SLOW = (psycopg.errors.IdleInTransactionSessionTimeout, psycopg.errors.TransactionTimeout)
"""How Postgres ends the connection of a transaction that took too long: a failure of the step."""

WATCHDOG_PATIENCE_S = 0.02
"""How long the watchdog waits for a run's row, while the limits of other runs wait for it."""

FAILURE_BYTES = 262_144
"""Above what any failure can need, see `orchestrator.failure`."""

AWAY = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction)
"""Postgres cannot take a write now: gone, full, or a primary no more. Worth trying again."""

NEVER = (psycopg.errors.ProgramLimitExceeded, psycopg.errors.StatementTooComplex)
"""What psycopg counts among them, and no waiting will change."""


def no_scope(_lease: Lease, _step: str | None, _attempt: int) -> AbstractContextManager[str | None]:
    """The scope of an executor whose work nobody follows."""
    return nullcontext()


def no_limit(_attempt: Attempt, body: Callable[[], Any]) -> Any:
    """The time limit of an executor that cannot end a step: none."""
    return body()


class BodyFailed(Exception):
    """Carries what a step's body raised, apart from what writing its outcome may raise."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class BodyLost(BodyFailed):
    """The same, after the connection of its transaction broke: it was not the body that failed."""


class ProcessLeaves(Exception):
    """Carries what was raised in a body to end its process: it was not the body that failed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class NoConnection(Exception):
    """There is none for a transactional step now: its body was not called."""


class Executor:
    """Executes runs, one at a time. Keeps one connection; make one executor for each thread."""

    def __init__(
        self,
        *,
        journal: Journal,
        leases: Leases,
        connect: Callable[[], Connection],
        engine: sqlalchemy.Engine,
        heartbeat: Heartbeat,
        worker: str,
        stopping: threading.Event | None = None,
        leaving: Callable[[], bool] = lambda: False,
        limit: Callable[[Attempt, Callable[[], Any]], Any] = no_limit,
        faults: CrashPoints | None = None,
        observer: Observer = ignore,
        scope: Scope = no_scope,
        shown_error: ShownError | None = None,
        redispatch_s: float = 15.0,
    ) -> None:
        """`worker` is unique to this process for ever; `stopping` ends runs at their boundary.

        `leaving` tells whether somebody ends this process by what is raised in a body. A run that
        stands at a step which its plan does not have is given back for at most `redispatch_s`.
        `limit` calls a step's body and sees to it that it ends in time; see `Watchdog.call`.
        """
        self.journal = journal
        self.leases = leases
        self.engine = engine
        self.heartbeat = heartbeat
        self.worker = worker
        self.stopping = stopping or threading.Event()
        self.leaving = leaving
        self.limit = limit
        self.faults = faults or CrashPoints()
        self.observer = observer
        self.scope = scope
        self.shown_error = shown_error
        """What log lines may say of an error; None: all of it, with its traceback."""
        self.redispatch_s = redispatch_s
        self._connect = connect
        self._connection: Connection | None = None

    def connection(self) -> Connection:
        """This executor's autocommit connection, opened when it is first needed."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def disconnect(self) -> None:
        """Close the connection; the next use opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def execute(self, plan: Plan, run_id: str, dispatch: int, *, max_steps: int = 0) -> bool:
        """Execute the remaining steps of a run; False if it was not ours to execute.

        Another worker may hold it, or it has ended, waits, or its queue is paused: a second
        delivery is nothing. `max_steps` gives the run back after that many steps (0: no limit).
        """
        lease = self._claim(plan, run_id, dispatch)
        if lease is None:
            self.observer(NotClaimed(run_id=run_id))
            logger.info(
                "message dropped: the run is not to be executed now",
                extra={"action": "not_claimed", "run_id": run_id, "dispatch": dispatch},
            )
            return False
        self.faults.reach("claim.committed")
        try:
            self.heartbeat.hold(lease)
            with self.scope(lease, None, lease.run.attempt):
                self._work(plan, lease, max_steps)
        finally:
            self.heartbeat.release(lease)
        self.faults.reach("task.before_ack")
        return True

    def _work(self, plan: Plan, lease: Lease, max_steps: int) -> None:
        run = lease.run
        self.observer(Claimed(lease=lease))
        logger.info(
            "run claimed",
            extra={
                "action": "claimed",
                "run_id": run.run_id,
                "plan": run.plan,
                "claim": run.attempt,
                "seq": run.last_seq,
                "waited": lease.waited,
            },
        )
        try:
            Execution(self, plan, lease, max_steps).work()
        except LeaseLost as error:
            self.observer(TakenOver(run_id=run.run_id))
            logger.warning(
                "lease lost: another worker has the run, nothing was written",
                extra={"action": "lease_lost", "run_id": run.run_id, "token": error.token},
            )

    def _claim(self, plan: Plan, run_id: str, dispatch: int) -> Lease | None:
        """Claim the run, a second time on a new connection: the old one may have died in between.

        Whether a claim that failed was committed is unknown: then the lease brings the run back.
        """
        again = self._connection is not None
        while True:
            try:
                return self.leases.claim(
                    self.connection(),
                    run_id,
                    plan=plan.name,
                    worker=self.worker,
                    first_step=plan.first.name,
                    dispatch=dispatch,
                )
            except AWAY:
                self.disconnect()
                if not again:
                    raise
                again = False


class Execution:
    """One worker's work on one run, from the claim to the end or to giving it back.

    1. fold the journal: what has finished is not done again
    2. start the next step's attempt (counted in Postgres before the body runs)
    3. call the body
    4. settle: the step's outcome and the next step's start are one commit
    5. go on at 3, until the run ends, waits, or the worker stops
    """

    def __init__(self, executor: Executor, plan: Plan, lease: Lease, max_steps: int) -> None:
        self._executor = executor
        self._journal = executor.journal
        self._plan = plan
        self._lease = lease
        self._run_id = lease.run.run_id
        self._last_seq = lease.run.last_seq
        self._last_ts = 0
        """Of the last event that was read, in milliseconds by the clock of Postgres."""
        self._steps_left = max_steps or -1
        self._began: float | None = None
        """When the attempt in flight was begun, by the monotonic clock."""
        self._exception: BaseException | None = None
        """What the body raised, until that is told."""
        self._traceparent: str | None = None
        self._in_doubt: Settlement | None = None
        """What a step's own transaction holds, until its commit is sure."""
        self._writing = threading.RLock()
        """Held by the one thread that writes: a step may have many."""
        self._speaking: Attempt | None = None
        """The attempt whose threads may write now."""

    def work(self) -> None:
        progress = self._resume()
        while progress is not None and progress.step is not None:
            with self._executor.scope(
                self._lease, progress.occurrence, progress.starts
            ) as self._traceparent:
                progress = self._take_storable_step(progress, progress.step)

    def _resume(self) -> Progress | None:
        if self._lease.begun:
            return Progress(step=self._plan.first, starts=1)
        progress = self._fold()
        if self._lease.cancelled and not progress.compensating:
            if self._plan.on_cancel is not None:
                progress.compensate(self._plan.on_cancel)
            elif progress.promised is not None:
                progress.lacks(progress.promised)
        if self._lease.late and not progress.compensating:
            self._settle(self._overdue([]))
            return None
        return self._attempt(progress)

    def _fold(self) -> Progress:
        """Where the journal says the run is."""
        try:
            events = self._patiently(
                lambda connection: self._journal.turns(
                    connection, self._run_id, names=FOLDED, rest=SNOOZED
                )
            )
        except RunNotFound as error:  # taken away by force
            raise LeaseLost(self._run_id, self._lease.token) from error
        self._last_seq = events[-1].seq
        self._last_ts = events[-1].ts
        return fold(self._plan, events)

    def _attempt(self, progress: Progress, before: Sequence[NewEvent] = ()) -> Progress | None:
        """Start the next attempt of where the run is; None if there is none to start."""
        if progress.unknown is not None:
            self._hand_back(progress, progress.unknown)
            return None
        if progress.step is None:
            self._settle(self._completed([], progress.result))
            return None
        if progress.crashes >= progress.step.retry.max_crashes:
            self._settle(self._poisoned(progress))
            return None
        return progress if self._start(progress, before) else None

    def _hand_back(self, progress: Progress, step: str) -> None:
        """The run stands at a step of another version of the plan: a worker that has it goes on.

        Looked for at once, and then less and less often.
        """
        claimed = self._lease.run.started_at
        waited = 0.0
        if claimed is not None:
            waited = claimed.timestamp() + self._lease.age - self._last_ts / 1000
        delay = min(max(waited / 2, UNKNOWN_STEP_S), self._executor.redispatch_s)
        logger.warning(
            "run given back: its plan is newer or older than this worker's",
            extra={
                "action": "unknown_step",
                "run_id": self._run_id,
                "step": step,
                "retry_in": delay,
                "reason": str(UnknownStep(self._plan.name, step)),
            },
        )
        returned = self._give_back(UNKNOWN_STEP, delay=delay)
        self._settle(regardless(returned) if progress.compensating else returned)

    def _start(self, progress: Progress, before: Sequence[NewEvent]) -> bool:
        """Count an attempt before its body runs; False if the run was cancelled instead."""
        progress.starts += 1
        renamed = {} if progress.key == progress.occurrence else {RENAMED_FROM: progress.key}
        started = self._event(EventType.STEP_STARTED, progress, **renamed)
        settlement = Settlement(
            events=[*before, started], state=RunState.RUNNING, **self._cancelled(before)
        )
        if progress.compensating:
            self._settle(regardless(settlement))
            return True
        return not self._settle(settlement).cancelled

    def _take_storable_step(self, progress: Progress, step: Step) -> Progress | None:
        """`_take_step`, of whatever its outcome or its failure consists."""
        try:
            return self._take_step(progress, step)
        except psycopg.DataError as error:
            self._settle(self._unstorable(progress, error))
            return None

    def _take_step(self, progress: Progress, step: Step) -> Progress | None:
        """Run one attempt; the progress to go on with, or None when the run leaves this worker."""
        executor = self._executor
        self._began = monotonic()
        executor.faults.reach("step.before")
        try:
            with self._transaction(step) as transaction:
                settlement, following = self._call(progress, step, transaction)
                executor.faults.reach("step.effect_done")
                appended = self._settle(settlement, transaction)
        except NoConnection as error:
            return self._after_lost_transaction(str(error), refused=True)
        except BodyLost as lost:
            return self._after_lost_transaction(text_of(lost.error))
        except BodyFailed as failure:
            if is_a(failure.error, (StepTimeout, DeadlineExceeded)):
                self._interrupted()
            self._settle(self._failed(progress, step, failure.error))
            return None
        except RunCancelled:
            if step.terminate_on_cancel:
                self._interrupted()
            self._settle(self._stopped(progress))
            return None
        except WorkerStops:
            self._interrupted()
            self._settle(self._unfinished(progress))
            return None
        except ProcessLeaves as leaves:
            self._interrupted()
            self._settle(self._unfinished(progress))
            raise leaves.error from None
        except exc.DBAPIError as error:
            # Not the body's: of our statement, or of a commit that may have happened.
            if error.connection_invalidated or isinstance(error, exc.OperationalError):
                return self._after_lost_transaction(str(error))
            self._settle(self._failed(progress, step, error))
            return None
        except (LeaseLost, SimulatedCrash):
            raise
        except BaseException as error:
            if isinstance(error, AWAY) and not isinstance(error, NEVER):
                raise  # the worker stops, and has waited for Postgres until then
            return self._after_failed_outcome(progress, step, error)
        # Only now: until the commit, what an interrupted transaction wrote is not sure.
        self._last_seq = appended.last_seq
        if step.transactional:
            self._committed(settlement, appended)
        executor.faults.reach("step.committed")
        executor.observer(StepCommitted(run_id=self._run_id, step=progress.occurrence))
        if appended.cancelled or settlement.state is not RunState.RUNNING:
            return None
        stored = _stored(settlement.events[0])
        progress.finished(step.name, stored["result"], routed="next" in stored)
        progress.go_on(following)
        progress.starts = 1
        return progress

    def _call(
        self, progress: Progress, step: Step, transaction: sqlalchemy.Connection | None
    ) -> tuple[Settlement, Step | None]:
        """Call the body and decide what its outcome writes. Raises BodyFailed, BodyLost.

        Whatever the body raises is its failure, and be it SystemExit: only what we have raised in
        it, or who ends this process, is not.
        """
        attempt = self._limited(progress, step)
        context = self._context(progress, transaction, attempt)
        self._speaking = attempt
        try:
            outcome = self._executor.limit(attempt, lambda: in_one_process(step, context))
            check_transaction(step, transaction)
            return self._outcome(progress, step, outcome)
        except SimulatedCrash:
            raise
        except BaseException as error:
            if self._told(attempt, error):
                raise
            if not isinstance(error, Exception) and self._executor.leaving():
                raise ProcessLeaves(error) from error
            if transaction_lost(error, transaction):
                raise BodyLost(error) from error
            raise BodyFailed(error) from error
        finally:
            with self._writing:
                self._speaking = None

    def _told(self, attempt: Attempt, error: BaseException) -> bool:
        """Whether the body passes on what it was told, and has not made it up."""
        if is_a(error, LeaseLost):
            return self._lease.lost
        if is_a(error, WorkerStops):
            return error is attempt.reason
        if is_a(error, RunCancelled):
            return error is attempt.reason or self._lease.cancelled or self._cancel_requested()
        return False

    def _limited(self, progress: Progress, step: Step) -> Attempt:
        """The attempt as the watchdog sees it."""
        ends_at = None if step.timeout is None else monotonic() + step.timeout
        late: Exception = StepTimeout(progress.occurrence, step.timeout or 0.0)
        deadline = None if progress.compensating else self._lease.deadline
        if deadline is not None and (ends_at is None or deadline < ends_at):
            ends_at, late = deadline, DeadlineExceeded(self._run_id)

        @cache  # it may take the watchdog more than one try
        def settlement_of(reason: Exception) -> Settlement:
            match reason:
                case RunCancelled():
                    return self._stopped(progress)
                case WorkerStops():
                    return self._unfinished(progress)
            return self._failed(progress, step, reason)

        def settle(connection: Connection, reason: Exception) -> bool:
            settlement, token = settlement_of(reason), self._lease.token
            with self._executor.leases.impatient(connection, WATCHDOG_PATIENCE_S):
                appended = self._journal.settle(
                    connection, self._run_id, token, settlement, self._last_seq
                )
            if appended is not None:
                self._committed(settlement, appended)
            return appended is not None

        return Attempt(
            lease=self._lease,
            ends_at=ends_at,
            late=late,
            terminate_on_cancel=step.terminate_on_cancel,
            gentle=not step.transactional,
            settle=settle,
        )

    def _interrupted(self) -> None:
        """An exception struck anywhere in the body: in the middle of a trace's commit, perhaps."""
        self._executor.disconnect()
        self._last_seq = self._patiently(self._look).last_seq

    @contextmanager
    def _transaction(self, step: Step) -> Iterator[sqlalchemy.Connection | None]:
        if not step.transactional:
            yield None
            return
        try:
            connection = self._executor.engine.connect()
        except (exc.DBAPIError, exc.TimeoutError, *AWAY) as error:
            raise NoConnection(str(error)) from error
        with connection, connection.begin():
            yield connection

    def _context(
        self, progress: Progress, transaction: sqlalchemy.Connection | None, attempt: Attempt
    ) -> StepContext:
        occurrence = progress.occurrence  # which the progress leaves before the last thread does
        return StepContext(
            lease=self._lease,
            step=occurrence,
            key=f"{self._run_id}:{progress.key}",
            attempt=progress.starts,
            results=progress.results,
            journal=self._journal,
            append=lambda event: self._append(attempt, event),
            check_cancel=lambda: self._cancel_noticed(attempt, occurrence),
            connection=transaction,
            cancellable=not progress.compensating,
            traceparent=self._traceparent,
        )

    # What a boundary writes

    def _outcome(
        self, progress: Progress, step: Step, outcome: Any
    ) -> tuple[Settlement, Step | None]:
        """The settlement of what the step returned, and the step that follows."""
        if step.outcomes and not isinstance(outcome, tuple(step.outcomes)):
            raise Fatal(
                f"step {step.name} returned a {type(outcome).__name__}; it is annotated to return "
                f"only {', '.join(sorted(kind.__name__ for kind in step.outcomes))}"
            )
        match outcome:
            case Snooze(seconds):
                note = self._event(EventType.DEBUG_TRACE, progress, name=SNOOZED, seconds=seconds)
                snoozed = Settlement(
                    events=[note],
                    state=RunState.QUEUED,
                    delay=seconds,
                    reason="snooze",
                    **self._cancelled([]),
                )
                return regardless(snoozed) if progress.compensating else snoozed, step
            case Finish():
                following = None
                data = {"result": outcome.result, "next": None}
            case Goto(target):
                if not self._plan.may_go(step.name, target):
                    raise Fatal(
                        f"step {step.name} returned Goto({target!r}), which plan "
                        f"{self._plan.name} does not declare in its routes"
                    )
                following = known_step(self._plan, target)
                data = {"result": outcome.result, "next": following.name}
            case _:
                following = progress.after(self._plan, step.name)
                data = {"result": outcome}
        self._steps_left -= 1
        late = self._lease.late
        gives_back = self._executor.stopping.is_set() or self._steps_left == 0
        if progress.compensating:
            data[ON_CANCEL] = True
        elif (late or gives_back) and following is not None and "next" not in data:
            data[FOLLOWING] = following.name
        finished = self._event(EventType.STEP_FINISHED, progress, **data)
        if progress.compensating:
            ended = self._ended(RunState.CANCELLED, [finished], cancel_error(None))
            return regardless(ended), None
        if following is None:
            return self._completed([finished], data["result"]), None
        if late:
            return self._overdue([finished]), None
        if gives_back:
            return self._give_back("shutdown", [finished]), following
        visit = progress.visits[following.name] + 1 + (following is step)
        started = NewEvent(
            type=EventType.STEP_STARTED, step=occurrence(following.name, visit), attempt=1
        )
        return (
            Settlement(
                events=[finished, started],
                state=RunState.RUNNING,
                **self._cancelled([finished]),
            ),
            following,
        )

    def _completed(self, events: Sequence[NewEvent], result: Any) -> Settlement:
        text = self._encode(result, "result")
        ended = NewEvent(
            type=EventType.RUN_FINISHED, data=f'{{"outcome":"completed","result":{text}}}'
        )
        return Settlement(
            events=[*events, ended],
            state=RunState.COMPLETED,
            result=text,
            **self._cancelled(events),
        )

    def _failed(self, progress: Progress, step: Step, error: BaseException) -> Settlement:
        """Try again later, or end the run as failed."""
        delay = step.retry.delay(progress.failures + 1)
        if is_a(error, (Fatal, BadPayload)):
            delay = None
        if is_a(error, DeadlineExceeded) and self._lease.late:
            delay = None
        facts = describe(error, progress.occurrence)
        self._exception = error
        told = {
            "action": "step_failed",
            "run_id": self._run_id,
            "step": progress.occurrence,
            "attempt": progress.starts,
            "retry_in": delay,
        }
        shown = facts
        if self._executor.shown_error is not None:
            shown = self._executor.shown_error(facts)
            told["reason"] = f"{shown.get('type')}: {shown.get('message')}"
        try:
            logger.warning("step failed", extra=told, exc_info=error if shown is facts else None)
        except Exception:  # of a handler that looks at the error; it is the user's, and may raise
            told["reason"] = f"{shown.get('type')}: {shown.get('message')}"
            logger.warning("step failed, with an error that cannot be logged", extra=told)
        failed = self._failure(progress, facts)
        if delay is None:
            return self._given_up(progress, failed, facts)
        again = Settlement(
            events=[failed],
            state=RunState.QUEUED,
            delay=delay,
            reason="retry",
            **self._cancelled([failed]),
        )
        return regardless(again) if progress.compensating else again

    def _given_up(self, progress: Progress, failed: NewEvent, facts: dict[str, Any]) -> Settlement:
        """The step has failed for good. A run whose `on_cancel` step fails is cancelled still."""
        if not progress.compensating:
            return self._ended(RunState.FAILED, [failed], facts)
        error = cancel_error(None) | {"on_cancel": facts}
        return regardless(self._ended(RunState.CANCELLED, [failed], error))

    def _overdue(self, events: Sequence[NewEvent]) -> Settlement:
        """The run has reached its deadline."""
        error = DeadlineExceeded(self._run_id)
        facts = {"type": type(error).__name__, "message": str(error)}
        return self._ended(RunState.FAILED, events, facts)

    def _poisoned(self, progress: Progress) -> Settlement:
        facts = {
            "type": "StepCrashed",
            "message": f"step {progress.occurrence} ended its process {progress.crashes} times",
            "step": progress.occurrence,
        }
        failed = self._failure(progress, facts)
        return self._given_up(progress, failed, facts)

    def _unstorable(self, progress: Progress, error: Exception) -> Settlement:
        """Postgres refuses what the step gave, or how it failed: no other attempt will do better.

        Told in ASCII, which a database in any encoding can hold.
        """
        text = f"what step {progress.occurrence} gave cannot be stored in this database: {error}"
        facts = {
            "type": "BadPayload",
            "message": text[:MESSAGE_LIMIT].encode("ascii", "backslashreplace").decode(),
            "step": progress.occurrence,
        }
        logger.error(
            "step's outcome cannot be stored, its run fails",
            extra={
                "action": "unstorable",
                "run_id": self._run_id,
                "step": progress.occurrence,
                "reason": str(error),
            },
        )
        failed = self._failure(progress, facts)
        return self._given_up(progress, failed, facts)

    def _lost(self, progress: Progress, reason: str) -> Settlement:
        """Postgres took back one transaction of the step after the other."""
        last = storable_text(reason[:MESSAGE_LIMIT])
        facts = {
            "type": "TransactionLost",
            "message": f"step {progress.occurrence} lost the connection of its transaction "
            f"{progress.lost + 1} times in a row, the last time: {last}",
            "step": progress.occurrence,
        }
        failed = self._failure(progress, facts)
        return self._given_up(progress, failed, facts)

    def _stopped(self, progress: Progress) -> Settlement:
        """The body itself noticed the cancel."""
        facts = cancel_error(None) | {"step": progress.occurrence}
        failed = self._failure(progress, facts)
        if progress.compensating:
            return self._given_up(progress, failed, facts)
        if self._plan.on_cancel is None:
            return self._ended(RunState.CANCELLED, [failed], facts)
        return regardless(Settlement(events=[failed], state=RunState.QUEUED, reason="cancel"))

    def _unfinished(self, progress: Progress) -> Settlement:
        """The worker stops in the middle of a step: another one makes this attempt again."""
        note = self._event(EventType.DEBUG_TRACE, progress, name=GIVEN_BACK)
        returned = self._give_back("shutdown", [note])
        return regardless(returned) if progress.compensating else returned

    def _ended(
        self, state: RunState, events: Sequence[NewEvent], facts: dict[str, Any]
    ) -> Settlement:
        text = _failure_text(facts)
        ended = NewEvent(
            type=EventType.RUN_FINISHED, data=f'{{"outcome":"{state.value}","error":{text}}}'
        )
        return Settlement(
            events=[*events, ended], state=state, error=text, **self._cancelled(events)
        )

    def _give_back(
        self, reason: str, events: Sequence[NewEvent] = (), delay: float = 0.0
    ) -> Settlement:
        return Settlement(
            events=events,
            state=RunState.QUEUED,
            delay=delay,
            reason=reason,
            **self._cancelled(events),
        )

    def _cancelled(self, events: Sequence[NewEvent]) -> dict[str, Any]:
        """The other way of a settlement: the step in flight commits, then the run is over.

        If the plan has an `on_cancel` step the run is given back instead, and is due at once: the
        next claim begins with that step.
        """
        if self._plan.on_cancel is not None:
            return {"if_cancelled": events, "state_if_cancelled": RunState.QUEUED}
        text = _failure_text(cancel_error(None))
        ended = NewEvent(
            type=EventType.RUN_FINISHED, data=f'{{"outcome":"cancelled","error":{text}}}'
        )
        return {"if_cancelled": [*events, ended], "error_if_cancelled": text}

    def _event(self, type: EventType, progress: Progress, **data: Any) -> NewEvent:
        return self._journal.new_event(
            type,
            step=progress.occurrence,
            attempt=progress.starts,
            where=f"step {progress.occurrence}:",
            data=data,
        )

    def _failure(self, progress: Progress, facts: dict[str, Any]) -> NewEvent:
        return NewEvent(
            type=EventType.STEP_FAILED,
            step=progress.occurrence,
            attempt=progress.starts,
            data=f'{{"error":{_failure_text(facts)}}}',
        )

    def _encode(self, value: Any, what: str) -> str:
        return encode(
            value,
            where=f"the {what} of run {self._run_id}",
            limit=self._journal.max_event_bytes,
        )

    # Writing, and finding out whether it was written

    def _append(self, attempt: Attempt, event: NewEvent) -> None:
        """Commit one event in the middle of a step. Raises StepEnded to threads after it."""
        with self._writing:
            self._require(attempt, event.step)
            appended = self._write(
                lambda connection: self._journal.append(
                    connection, self._run_id, self._lease.token, [event], self._last_seq
                ),
                RunState.RUNNING,
            )
            self._lease.cancelled |= appended.cancelled

    def _require(self, attempt: Attempt, step: str | None) -> None:
        if self._speaking is not attempt:
            raise StepEnded(self._run_id, step or "")

    def _settle(
        self, settlement: Settlement, transaction: sqlalchemy.Connection | None = None
    ) -> Appended:
        def write(connection: Caller) -> Appended | None:
            return self._journal.settle(
                connection, self._run_id, self._lease.token, settlement, self._last_seq
            )

        if transaction is None:
            with self._writing:
                appended = self._write(write, settlement.state)
            self._committed(settlement, appended)
            return appended
        found = write(transaction)
        if found is None:
            raise LeaseLost(self._run_id, self._lease.token)
        self._in_doubt = settlement
        return found

    def _committed(self, settlement: Settlement, appended: Appended) -> None:
        """Tell what is now in the journal."""
        cancelled, self._in_doubt = appended.cancelled, None
        state = settlement.state_if_cancelled if cancelled else settlement.state
        events = settlement.if_cancelled if cancelled else settlement.events
        began, seconds = self._began, None
        if began is not None:
            seconds = monotonic() - began
        self._executor.observer(
            Settled(
                lease=self._lease,
                events=events,
                state=state,
                reason=settlement.reason,
                last_seq=appended.last_seq,
                duration_s=seconds,
                exception=self._exception,
            )
        )
        self._began = self._exception = None
        facts = {"run_id": self._run_id, "plan": self._plan.name, "seq": appended.last_seq}
        if state.final:
            logger.info(
                "run finished",
                extra={
                    "action": "finished",
                    "state": state.value,
                    "seconds": round(self._lease.seconds, 6),
                    **facts,
                },
            )
        elif state is RunState.QUEUED:
            delay = settlement.delay_if_cancelled if cancelled else settlement.delay
            logger.info(
                "run waits",
                extra={
                    "action": "waits",
                    "state": state.value,
                    "reason": "cancel" if cancelled else settlement.reason,
                    "delay": delay or 0.0,
                    **facts,
                },
            )

    def _write(
        self, write: Callable[[Connection], Appended | None], intended: RunState
    ) -> Appended:
        """Write once, whatever happens to the connection. Raises LeaseLost.

        A commit whose answer was lost may have happened. Only the owner of the lease writes as a
        worker, so one look at the journal tells.
        """
        tried = False

        def act(connection: Connection) -> Appended | None:
            nonlocal tried
            if tried:
                self._renew(connection)
                seen = self._look(connection)
                if seen.committed_since:
                    cancelled = seen.state is not intended
                    return Appended(last_seq=seen.last_seq, cancelled=cancelled)
            tried = True
            return write(connection)

        appended = self._patiently(act)
        if appended is None:
            self._lease.lost = True
            raise LeaseLost(self._run_id, self._lease.token)
        self._last_seq = appended.last_seq
        return appended

    def _patiently(self, act: Callable[[Connection], T]) -> T:
        """Do it as soon as Postgres can be reached, unless the worker stops first."""
        backoff, failures = Backoff(initial=0.05, cap=5.0), 0
        while True:
            try:
                return act(self._executor.connection())
            except NEVER:
                raise
            except AWAY as error:
                self._executor.disconnect()
                failures += 1
                delay = backoff.delay(failures)
                logger.warning(
                    "Postgres is away, will try again",
                    extra={
                        "action": "postgres_away",
                        "run_id": self._run_id,
                        "retry_in": delay,
                        "reason": str(error),
                    },
                )
                if self._executor.stopping.wait(delay):
                    raise

    def _renew(self, connection: Connection) -> None:
        self._executor.leases.renew_token(connection, self._lease)
        self._executor.heartbeat.hold(self._lease)

    def _look(self, connection: Connection) -> LeaseStatus:
        return self._executor.leases.inspect(connection, self._lease, self._last_seq)

    def _after_lost_transaction(self, reason: str, *, refused: bool = False) -> Progress | None:
        """The connection broke in a transactional step: go on if it was committed, else again.

        The first time in a row at once, for Postgres can be reached again; then it is given time.
        """
        seen = self._find_out()
        if seen is None:
            return None
        progress = self._fold()
        if seen.committed_since:
            return progress
        logger.warning(
            "transaction lost, the step is tried again",
            extra={
                "action": "transaction_lost",
                "run_id": self._run_id,
                "step": progress.occurrence,
                "refused": refused,
                "reason": reason,
            },
        )
        if not refused and progress.lost + 1 >= MAX_LOSSES:
            self._settle(self._lost(progress, reason))
            return None
        facts = {"refused": True} if refused else {}
        lost = self._event(EventType.DEBUG_TRACE, progress, name=CONNECTION_LOST, **facts)
        again = progress.lost + progress.refused
        progress.lose(refused=refused)
        if not again:
            return self._attempt(progress, [lost])
        returned = self._give_back("connection", [lost], BETWEEN_LOSSES.delay(again))
        self._settle(regardless(returned) if progress.compensating else returned)
        return None

    def _after_failed_outcome(
        self, progress: Progress, step: Step, error: BaseException
    ) -> Progress | None:
        """Something was raised after the body had returned: go on if it was committed all the same.

        By Postgres, which cannot store what the step returned; by what somebody has hung on commits
        of SQLAlchemy; by who ends this process.
        """
        self._executor.disconnect()
        seen = self._find_out()
        if seen is None:
            return None
        found = self._fold() if seen.committed_since else progress
        if not isinstance(error, Exception) and self._executor.leaving():
            self._settle(self._unfinished(found))
            raise error
        if seen.committed_since:
            return found
        self._settle(self._failed(progress, step, error))
        return None

    def _find_out(self) -> LeaseStatus | None:
        """What has become of a commit whose answer is unknown; None if the run has ended with it.

        Raises LeaseLost.
        """
        self._patiently(self._renew)
        seen = self._patiently(self._look)
        if seen.committed_since and self._in_doubt is not None:
            cancelled = seen.state is not self._in_doubt.state
            self._committed(self._in_doubt, Appended(last_seq=seen.last_seq, cancelled=cancelled))
        self._in_doubt = None
        if seen.state.final:
            return None
        if not seen.held:
            raise LeaseLost(self._run_id, self._lease.token)
        return seen

    def _cancel_noticed(self, attempt: Attempt, step: str) -> bool:
        """For the threads of a step. Raises StepEnded to one that outlived it."""
        with self._writing:
            self._require(attempt, step)
            return self._cancel_requested()

    def _cancel_requested(self) -> bool:
        self._patiently(self._look)
        return self._lease.cancelled


def regardless(settlement: Settlement) -> Settlement:
    """The same whether or not somebody asked to cancel: for a run that is cancelled already."""
    return replace(
        settlement,
        if_cancelled=settlement.events,
        state_if_cancelled=settlement.state,
        error_if_cancelled=settlement.error,
        delay_if_cancelled=settlement.delay or 0.0,
    )


def in_one_process(step: Step, context: StepContext) -> Any:
    """Call a body. A copy of the process that it forks ends with it: the run is not the copy's."""
    pid = os.getpid()
    try:
        return step.function(context)
    finally:
        if os.getpid() != pid:
            leave_copy(sys.exception())


def leave_copy(error: BaseException | None) -> NoReturn:
    """End as a process ends whose program is over, without what belongs to the one it copies."""
    status: object = 0
    if isinstance(error, SystemExit):
        status = error.code or 0
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)


def check_transaction(step: Step, transaction: sqlalchemy.Connection | None) -> None:
    """Raises what the step's own handling of its connection may have hidden."""
    if transaction is None or (transaction.in_transaction() and not transaction.invalidated):
        return
    if transaction.invalidated:
        reason = ConnectionError("the connection was lost, and the step went on")
        raise exc.DBAPIError(None, None, reason, connection_invalidated=True)
    raise Fatal(
        f"step {step.name} ended the transaction of ctx.connection: leave commit and rollback to "
        "beatless, so that they include StepFinished"
    )


def transaction_lost(error: BaseException, transaction: sqlalchemy.Connection | None) -> bool:
    """Whether a body raised because the connection of its transaction broke.

    What Postgres says of a statement is the step's to bear: a lock that was not to be had, a
    deadlock, a limit. So is what happens to connections of the step's own.
    """
    if transaction is None or not transaction.invalidated:
        return False
    if is_a(error, exc.DBAPIError) and isinstance(getattr(error, "orig", None), TOO_SLOW):
        return False
    return not is_a(error, (Fatal, BadPayload, StepTimeout, DeadlineExceeded))


def _stored(finished: NewEvent) -> dict[str, Any]:
    """What a resumed run would read: of the text that was stored, and not of the value again."""
    data: dict[str, Any] = json.loads(finished.data or "{}", parse_float=_as_jsonb)
    return data


def _as_jsonb(number: str) -> float | int:
    """A float as Postgres gives it back: jsonb writes 1e+16 as 10000000000000000."""
    return int(Decimal(number)) if "e+" in number else float(number)


def _failure_text(facts: dict[str, Any]) -> str:
    """Facts of ours as JSON. The limit on users' data must not keep a failure from being told."""
    return encode(facts, where="the error", limit=FAILURE_BYTES)
