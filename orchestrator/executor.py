"""Executes runs, one at a time: claims each, and performs the requests of its `Execution`.

Long, because each kind of request is performed here.
"""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Any, TypeVar

import psycopg
from sqlalchemy import exc

from beatless.orchestrator.async_context import AsyncStepContext
from beatless.orchestrator.attempt_end import AttemptEnded, end_of_body, may_have_struck
from beatless.orchestrator.bodies import Beside, Bodies, ThreadsBeside
from beatless.orchestrator.body import call_body
from beatless.orchestrator.boundaries import Conclusion
from beatless.orchestrator.child_calls import has_reads, without_reads
from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.claims import Ahead
from beatless.orchestrator.connections import Connections, OneConnection
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.errors import DeadlineExceeded, LeaseLost, StepTimeout
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.executions import requests_of
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Connection, Lease, Leases
from beatless.orchestrator.limited_writer import LimitedWriter, log_unclaimed
from beatless.orchestrator.loop_thread import LoopThread, Together
from beatless.orchestrator.observer import Claimed, NotClaimed, StepCommitted, TakenOver
from beatless.orchestrator.output_thread import OutputThread
from beatless.orchestrator.pace import Pace
from beatless.orchestrator.plan import Plan, Step
from beatless.orchestrator.plan_versions import PlanVersions
from beatless.orchestrator.read_ahead import ReadAhead, has_waits
from beatless.orchestrator.records import Appended, NewRun
from beatless.orchestrator.requests import (
    AwaitBody,
    BeginBody,
    BodyEnded,
    Commit,
    CommitFailed,
    CommitIfQuiet,
    Committed,
    CommitWithSlots,
    EndBody,
    HandedBack,
    Raised,
    ReadJournal,
    Recover,
    Recovered,
    Reply,
    Request,
    Requests,
    Returned,
    RunBody,
    Signalled,
    Stopped,
    TransactionLost,
    Unstorable,
)
from beatless.orchestrator.run_report import RunReport, ShownError
from beatless.orchestrator.scope import Scope, no_scope
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.step_output import StepOutput
from beatless.orchestrator.step_transaction import (
    NoConnection,
    StepTransaction,
    Transactions,
    check_transaction,
)
from beatless.orchestrator.sure_writer import AWAY, NEVER, SureWriter
from beatless.orchestrator.turns import HAND_BACK, IN_DOUBT, Answer, Turn, Turns
from beatless.orchestrator.watchdog import Attempt, no_limit
from beatless.outbox.clock import monotonic
from beatless.outbox.faults import CrashPoints, SimulatedCrash
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.pending import prepare_anew

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKLOG_S = 0.1
"""Seconds that a run has waited if others wait behind it: the next one does not come alone."""

GOES_ON_S = 2.0
"""Seconds after a message in which runs are claimed with the ends of others: then tasks of others,
which may be in the same broker, have their turn."""

BEHIND_S = 1.0
"""The same, at most, of runs that have waited for nothing but a worker."""

BEHIND_PLACE_S = 0.2
"""The same for each place of the worker: so the 64 messages of a queue that are in the broker come
within 13 s, before the relay looks for the first of them."""


class Executor:
    """Executes runs, one at a time. Keeps one connection; make one executor for each thread."""

    def __init__(
        self,
        *,
        journal: Journal,
        leases: Leases,
        connect: Callable[[], Connection],
        transactions: Transactions,
        heartbeat: Heartbeat,
        outputs: OutputThread,
        worker: str,
        plans: Mapping[str, Plan],
        stopping: threading.Event | None = None,
        leaving: Callable[[], bool] = lambda: False,
        limit: Callable[[Attempt, Callable[[], Any]], Any] = no_limit,
        faults: CrashPoints | None = None,
        observer: Observer = ignore,
        scope: Scope = no_scope,
        shown_error: ShownError | None = None,
        redispatch_s: float = 15.0,
        pace: Pace | None = None,
        loop: LoopThread | None = None,
    ) -> None:
        """`worker` is unique to this process for ever; `stopping` ends runs at their boundary.

        `leaving` returns true if an exception in a body is there to end this process. Runs may have
        children of these `plans`. A run that stands at a step which its plan does not have is given
        back for at most `redispatch_s`. `limit` calls a step's body and sees to it that it ends in
        time: see `Watchdog.call`. `pace` is told how long each takes. Async ones run in `loop`.
        """
        self.journal = journal
        self.children = ChildRuns(journal)
        self._read_ahead = ReadAhead(journal, leases.inbox)
        self.versions = PlanVersions(journal.schema)
        self.leases = leases
        self.transactions = transactions
        self.heartbeat = heartbeat
        self.outputs = outputs
        self.worker = worker
        self.plans = plans
        self.stopping = stopping or threading.Event()
        self.leaving = leaving
        self.limit = limit
        self.faults = faults or CrashPoints()
        self.observer = observer
        self.scope = scope
        self.shown_error = shown_error
        """Redacts the facts of an error for the log; None: all of them, with the traceback."""
        self.redispatch_s = redispatch_s
        self.pace = pace or Pace()
        self.goes_on_until = 0.0
        """Until when the end of a run that has waited for a slot claims the next one of its queue,
        by the monotonic clock."""
        self.behind_until = 0.0
        """The same of a run that has waited for a worker, and that is executed alone."""
        self.body_s = 0.0
        """Seconds of bodies, without their traces and looks for a cancel, which no group spares."""
        self.loop = loop or LoopThread(observer=observer)
        self.connections: Connections = OneConnection(connect)

    def connection(self) -> Connection:
        """This thread's autocommit connection, opened when it is first needed."""
        return self.connections.get()

    def disconnect(self) -> None:
        """Close the connection; the next use opens another."""
        self.connections.close()

    def drive(self, lease: Lease, turns: Turns) -> None:
        """Take all turns of a run."""
        del lease
        for _ in turns:
            pass

    def aside(self, act: Callable[[], T]) -> T:
        """Do what may wait for a run's row, while other runs go on if there are any.

        It is done again if the row is held, and others need the thread.
        """
        return act()

    def within(self, act: Callable[[], T]) -> T:
        """The same for the transaction of a step, which cannot be done again."""
        return act()

    def share(self, writer: SureWriter, attempt: Attempt, event: NewEvent) -> Together | None:
        """How an event of an async step is written together with those of other runs, if it is."""
        del writer, attempt, event
        return None

    def beside(self) -> Beside:
        """Has bodies of one run called at the same time."""
        return ThreadsBeside()

    def call(self, step: Step, context: StepContext, attempt: Attempt) -> Any:
        """The result of a body, within its limits of time."""
        return self.limit(attempt, lambda: call_body(step, context, attempt, self.loop, self.wait))

    def wait(self, future: Future[T]) -> T:
        """The result of a future, while other runs go on if there are any."""
        return future.result()

    def execute(self, plan: Plan, run_id: str, dispatch: int, *, max_steps: int = 0) -> bool:
        """Execute the remaining steps of a run; False if it was not ours to execute.

        Another worker may hold it, or it has ended, waits, or its queue is paused: a second
        delivery is nothing. `max_steps` gives the run back after that many steps (0: no limit).
        """
        lease = self.claim(plan, run_id, dispatch)
        if lease is None:
            self.ignore_message(run_id, dispatch)
            return False
        self.faults.reach("claim.committed")
        self.drive(lease, self.turns(plan, lease, max_steps))
        self.go_on(lease)
        self.faults.reach("task.before_ack")
        return True

    def claim(self, plan: Plan, run_id: str, dispatch: int) -> Lease | None:
        """The lease of the run of a message; None if it was not ours to execute."""
        return self.aside(
            lambda: self.claimed(
                lambda connection: self.leases.claim(
                    connection,
                    run_id,
                    plan=plan.name,
                    worker=self.worker,
                    first_step=self.first_step(plan),
                    dispatch=dispatch,
                    ahead=self.ahead(plan, dispatch),
                )
            )
        )

    def ahead(self, plan: Plan, dispatch: int) -> Ahead | None:
        """What is read with a claim: of a run that may have waited, for it was sent before."""
        return self._read_ahead.send if dispatch > 1 and has_waits(plan) else None

    def go_on(self, ended: Lease) -> None:
        """Execute the run that was claimed with the end of this one, if one was, and so on.

        Behind one that was parked the next one is claimed now, if others may wait.
        """
        while ended.following is not None or ended.next_wanted:
            lease = ended.following or self.claim_behind(ended)
            if lease is None:
                return
            self.faults.reach("claim.committed")
            self.drive(lease, self.turns(self.plans[lease.run.plan], lease))
            ended = lease

    def claim_behind(self, parked: Lease) -> Lease | None:
        """The lease of the run that comes next in the queue of one that was parked.

        None also if the claim fails: that is no fault of the run that was parked.
        """

        def claim(connection: Connection) -> Lease | None:
            try:
                with connection.pipeline():
                    claimed = self.claim_next(connection, parked)
            except psycopg.errors.LockNotAvailable:
                prepare_anew(connection)
                return None
            return claimed()

        try:
            return self.claimed(claim)
        except psycopg.Error as error:
            self.disconnect()  # which of its statements are prepared is not known
            log_unclaimed(parked.run.run_id, error)
            return None

    def claim_next(self, connection: Connection, ended: Lease) -> Callable[[], Lease | None]:
        """See `Leases.claim_next`."""
        return self.leases.claim_next(
            connection,
            ended,
            worker=self.worker,
            first_steps={
                name: self.first_step(plan)
                for name, plan in self.plans.items()
                if ended.let_in or not self.pace.suits_groups(plan)
            },
            redispatch_s=self.redispatch_s,
        )

    def first_step(self, plan: Plan) -> str | None:
        """The step that a claim begins, of a run that was never claimed; None: it begins none."""
        return plan.first_step

    def ignore_message(self, run_id: str, dispatch: int) -> None:
        """Announce that the run of a message was not ours to execute."""
        self.observer(NotClaimed(run_id=run_id))
        logger.info(
            "message ignored: the run is finished, leased, delayed, paused or of another database",
            extra={"action": "not_claimed", "run_id": run_id, "dispatch": dispatch},
        )

    def turns(self, plan: Plan, lease: Lease, max_steps: int = 0) -> Turns:
        """All work on a claimed run under its lease, with pauses for others: see `Turns`."""
        try:
            self.heartbeat.hold(lease)
            with self.scope(lease, None, lease.run.attempt):
                yield from self._work(plan, lease, max_steps)
        finally:
            self.heartbeat.release(lease)

    def _work(self, plan: Plan, lease: Lease, max_steps: int) -> Turns:
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
            yield from RunDriver(self, plan, lease, max_steps).turns()
        except LeaseLost as error:
            self.observer(TakenOver(run_id=run.run_id))
            logger.warning(
                "lease lost: another worker has the run, nothing was written",
                extra={"action": "lease_lost", "run_id": run.run_id, "token": error.token},
            )

    def claimed(self, claim: Callable[[Connection], T]) -> T:
        """Claim, a second time on a new connection: the old one may have died in between.

        Whether a claim that failed was committed is unknown: then the lease brings the run back.
        """
        again = self.connections.current is not None
        while True:
            try:
                return claim(self.connection())
            except AWAY:
                self.disconnect()
                if not again:
                    raise
                again = False


class RunDriver:
    """Performs the requests of one execution, one turn after the other."""

    def __init__(self, executor: Executor, plan: Plan, lease: Lease, max_steps: int) -> None:
        self._executor = executor
        self._plan = plan
        self._lease = lease
        self._run_id = lease.run.run_id
        self._report = RunReport(
            plan, lease, observer=executor.observer, shown_error=executor.shown_error
        )
        self._writer = LimitedWriter(
            lease,
            journal=executor.journal,
            children=executor.children,
            leases=executor.leases,
            heartbeat=executor.heartbeat,
            connection=executor.connection,
            disconnect=executor.disconnect,
            stopping=executor.stopping,
            on_commit=self._report.committed,
            announce=executor.outputs.announce,
        )
        self._requests = requests_of(
            plan,
            lease,
            plans=executor.plans,
            read_ends=self._writer.read_ends,
            read_steps=partial(self._writer.patiently, executor.versions.reader(plan, lease.run)),
            max_event_bytes=executor.journal.max_event_bytes,
            max_steps=max_steps,
            stopping=executor.stopping.is_set,
            leaving=executor.leaving,
            redispatch_s=executor.redispatch_s,
        )
        self._bodies = Bodies(lease, executor.beside, executor.leaving)
        self._has_next = lease.let_in or (lease.waited is not None and lease.waited > BACKLOG_S)
        """Whether others may wait for a slot that its end frees, or for a worker."""

    def turns(self) -> Turns:
        """Until the run has ended, waits, or is given back. Raises LeaseLost."""
        scope = self._executor.scope
        with closing(self._bodies), closing(self._requests) as requests:
            request = yield from self._until_body(requests, None)
            while request is not None:
                if isinstance(request, BeginBody):
                    self._bodies.begin(request.body, self._call_beside)
                    request = yield from self._until_body(requests, None)
                    continue
                with scope(self._lease, request.occurrence, request.attempt) as traceparent:
                    reply = yield from self._attempt(requests, request, traceparent)
                    request = yield from self._until_body(requests, reply)

    def _until_body(
        self, requests: Requests, reply: Reply | None
    ) -> Generator[Turn, Answer, RunBody | BeginBody | None]:
        """Do all that comes before the next body; None if there is none."""
        try:
            request = requests.send(reply)
            while not isinstance(request, RunBody | BeginBody):
                request = requests.send((yield from self._perform(request)))
        except StopIteration:
            return None
        return request

    def _perform(self, request: Request) -> Generator[Turn, Answer, Reply | None]:
        match request:
            case ReadJournal(behind=behind):
                page = self._writer.read(behind)
                self._report.read(page, first=behind is None)
                return page
            case Recover():
                status = self._executor.aside(self._writer.recover)
                return Recovered(committed=status.committed_since, ended=status.state.final)
            case Commit():
                return (yield from self._commit(request))
            case CommitIfQuiet():
                return self._executor.aside(lambda: self._commit_if_quiet(request))
            case CommitWithSlots():
                return self._executor.aside(lambda: self._writer.begin_step(request))
            case AwaitBody(timeout_s=timeout_s):
                return self._bodies.await_one(timeout_s)
            case EndBody(occurrence=occurrence):
                self._bodies.end(occurrence)
                return None
            case RunBody() | BeginBody():
                raise TypeError("a body is called within the scope of its attempt")

    def _commit(self, commit: Commit) -> Generator[Turn, Answer, Committed | Unstorable]:
        self._report.failed(commit.failure)
        try:
            if commit.children:
                appended = self._executor.aside(
                    lambda: self._start_children(commit.settlement, commit.children)
                )
            else:
                appended = yield from self._settle(commit.settlement)
        except psycopg.DataError as error:
            return Unstorable(str(error))
        return Committed.of(appended)

    def _commit_if_quiet(self, commit: CommitIfQuiet) -> Committed | Signalled:
        self._executor.faults.reach("wait.before")
        found = self._writer.settle_if_quiet(
            commit.settlement, commit.waits, commit.tends, sleeps=commit.sleeps
        )
        parked = isinstance(found, Appended)
        leaves = parked and commit.settlement.normal.state is RunState.QUEUED
        wanted = leaves and self._has_next and not self._lease.let_in
        self._lease.next_wanted = wanted and self._has_time
        self._executor.faults.reach("wait.committed" if parked else "wait.signalled")
        if isinstance(found, Appended):
            return Committed.of(found)
        return Signalled(found.events, found.turns)

    def _start_children(self, settlement: Settlement, runs: Sequence[NewRun]) -> Appended:
        self._executor.faults.reach("children.before")
        appended = self._writer.settle_with_children(settlement, runs)
        self._executor.faults.reach("children.started")
        return appended

    def _settle(self, settlement: Settlement) -> Generator[Turn, Answer, Appended]:
        executor, writer, beside = self._executor, self._writer, self._bodies.used
        if beside:
            executor.faults.reach("beside.before")
        # While bodies run they write too, and each write must know of the one before: no proposal.
        alone = self._bodies.running or self._lease.limited_step
        answer = None if alone else (yield writer.proposal(settlement))
        if isinstance(answer, Appended):
            writer.confirm(settlement, answer)
            appended = answer
        elif self._has_next and answer is None and settlement.normal.state.final and self._has_time:
            appended = writer.settle_and_claim(settlement, executor.claim_next)
        else:
            appended = executor.aside(lambda: writer.settle(settlement, tried=answer is IN_DOUBT))
        if beside:
            executor.faults.reach("beside.committed")
        return appended

    @property
    def _has_time(self) -> bool:
        """Whether another run is claimed with the end of this one.

        Not behind one of short steps, whose messages bring others, which are executed in a group.
        """
        executor = self._executor
        if executor.stopping.is_set():
            return False
        if self._lease.let_in:
            return monotonic() < executor.goes_on_until
        return monotonic() < executor.behind_until and not executor.pace.suits_groups(self._plan)

    def _attempt(
        self, requests: Requests, request: RunBody, traceparent: str | None
    ) -> Generator[Turn, Answer, Reply]:
        """Call the body and commit its value."""
        executor, step = self._executor, request.step
        if (yield request) is HAND_BACK:
            return Stopped() if executor.stopping.is_set() else HandedBack()
        self._begin(request)
        try:
            with executor.transactions.of(step, executor) as transaction:
                conclusion = self._call(request, traceparent, transaction)
                executor.faults.reach("step.effect_done")
                commit = requests.send(Returned(conclusion))
                assert isinstance(commit, Commit)  # noqa: S101 - as `RunBody` has it
                if transaction is None:
                    appended = yield from self._settle(commit.settlement)
                else:
                    settle = partial(self._writer.settle_within, settlement=commit.settlement)
                    appended = transaction.act(settle)
        except AttemptEnded as ended:
            if may_have_struck(step, ended.reply):
                self._writer.reconnect()
            return ended.reply
        except NoConnection as error:
            return TransactionLost(str(error), refused=True)
        except exc.DBAPIError as error:
            # Not the body's: of our statement, or of a commit that may have happened.
            if error.connection_invalidated or isinstance(error, exc.OperationalError):
                return TransactionLost(str(error))
            return Raised(error)
        except (LeaseLost, SimulatedCrash, GeneratorExit):
            raise
        except BaseException as error:
            if isinstance(error, AWAY) and not isinstance(error, NEVER):
                raise  # the worker stops, and has waited for Postgres until then
            if getgeneratorstate(requests) == GEN_CLOSED:
                raise  # a signal struck there: the lease brings the run back
            executor.disconnect()
            leaving = not isinstance(error, Exception) and executor.leaving()
            return CommitFailed(error, leaving)
        if transaction is not None:
            self._writer.confirm(commit.settlement, appended)
        executor.faults.reach("step.committed")
        executor.observer(StepCommitted(run_id=self._run_id, step=request.occurrence))
        return Committed.of(appended)

    def _begin(self, request: RunBody) -> None:
        if request.deaths:
            note = partial(self._writer.note_suspect, request.occurrence, request.attempt)
            self._executor.aside(note)
        self._report.begin(request.occurrence)
        self._executor.faults.reach("step.before")

    def _call_beside(self, request: RunBody) -> BodyEnded:
        """Call a body beside others of the run, in a thread or greenlet of its own."""
        name = request.occurrence
        with self._executor.scope(self._lease, name, request.attempt) as traceparent:
            self._begin(request)
            try:
                conclusion = self._call(request, traceparent, None)
            except AttemptEnded as ended:
                return BodyEnded(occurrence=name, outcome=ended.reply)
            self._executor.faults.reach("step.effect_done")
            return BodyEnded(occurrence=name, outcome=Returned(conclusion))

    def _call(
        self, request: RunBody, traceparent: str | None, transaction: StepTransaction | None
    ) -> Conclusion:
        """Call the body and conclude from its value. Raises AttemptEnded."""
        attempt = self._limited(request)
        output = self._writer.open(attempt, request.occurrence, request.attempt)
        context = self._context(request, traceparent, transaction, attempt, output)
        taken_s, asked_s = 0.0, self._writer.asked_s
        try:
            self._bodies.note_attempt(request.occurrence, attempt)
            try:
                value = self._executor.call(request.step, context, attempt)
            finally:
                taken_s = max(0.0, attempt.taken_s - (self._writer.asked_s - asked_s))
            check_transaction(request.step, transaction)
            self._stored(output, output.finish)
            return request.conclude(value)
        except SimulatedCrash:
            raise
        except BaseException as error:
            reply = end_of_body(
                attempt,
                error,
                transaction,
                leaving=self._executor.leaving,
                cancel_requested=self._writer.cancel_requested,
            )
            if attempt.interruptible and may_have_struck(request.step, reply):
                self._executor.disconnect()
            self._stored(output, output.abandon)
            raise AttemptEnded(reply) from error
        finally:
            self._bodies.forget_attempt(request.occurrence)
            if not self._writer.close_now(attempt):
                self._executor.aside(partial(self._writer.close, attempt))
            self._executor.body_s += taken_s
            self._executor.pace.note(self._plan, request.step, taken_s)

    def _stored(self, output: StepOutput, store: Callable[[], None]) -> None:
        """Have the last of an output stored; others wait for that only if there was any."""
        output.close()
        if output.added:
            self._executor.aside(store)

    def _limited(self, request: RunBody) -> Attempt:
        """The attempt as the watchdog sees it."""
        step = request.step
        ends: list[tuple[float, Exception]] = []
        if step.timeout is not None:
            ends.append((monotonic() + step.timeout, StepTimeout(request.occurrence, step.timeout)))
        if self._lease.deadline is not None and not request.compensating:
            ends.append((self._lease.deadline, DeadlineExceeded(self._run_id)))
        ends_at, late = min(ends, key=lambda end: end[0], default=(None, None))
        return Attempt(
            lease=self._lease,
            ends_at=ends_at,
            late=late,
            terminate_on_cancel=step.terminate_on_cancel,
            interruptible=not step.transactional,
            settle=partial(self._settle_interrupted, request, {}),
        )

    def _settle_interrupted(
        self, request: RunBody, made: dict[Exception, Settlement], on: Connection, why: Exception
    ) -> bool:
        """As `Attempt.settle`. It is made once: it may take the watchdog more than one try."""
        if why not in made:
            commit = request.interrupted(why)
            self._report.failed(commit.failure)
            made[why] = commit.settlement
        return self._writer.settle_once(on, made[why])

    def _context(
        self,
        request: RunBody,
        traceparent: str | None,
        transaction: StepTransaction | None,
        attempt: Attempt,
        output: StepOutput,
    ) -> StepContext:
        executor, step, results = self._executor, request.step, request.results
        kind: Callable[..., StepContext] = StepContext
        if step.is_async:
            share = partial(executor.share, self._writer, attempt)
            kind = partial(AsyncStepContext, lane=executor.loop.lane(), share=share)
            if has_reads(results):  # nothing in the loop must wait for Postgres
                results = executor.aside(partial(without_reads, results))
        return kind(
            lease=self._lease,
            step=request.occurrence,
            key=request.key,
            attempt=request.attempt,
            results=results,
            journal=executor.journal,
            append=lambda event: self._writer.append(attempt, event),
            output=output,
            check_cancel=lambda: self._writer.cancel_noticed(attempt, request.occurrence),
            connection=None if transaction is None else transaction.connection,
            cancellable=not request.compensating,
            traceparent=traceparent,
        )
