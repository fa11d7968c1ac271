"""Executes many runs at once in one process: async bodies in its loop, the others in threads.

One thread does the rest of the work on all runs, in turns (`SwitchThread`), and commits boundaries
that are ready together in one statement. Runs whose messages have come together are claimed in one
too. What may wait for a row goes to another thread.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import psycopg

from beatless.orchestrator.bodies import Beside, CallBody
from beatless.orchestrator.body import call_body
from beatless.orchestrator.claims import Behind, Claim
from beatless.orchestrator.connections import ConnectionOfThread
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.executor import BACKLOG_S, Executor
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.held_rows import RowHeld, giving_way
from beatless.orchestrator.lease import Connection, Lease
from beatless.orchestrator.loop_thread import Together
from beatless.orchestrator.loop_watch import PlanWatch
from beatless.orchestrator.plan import Plan, Step
from beatless.orchestrator.requests import BodyEnded, RunBody, Stopped
from beatless.orchestrator.shared_claims import SharedClaims
from beatless.orchestrator.shared_commits import SharedCommits
from beatless.orchestrator.shared_traces import SharedTrace, SharedTraces
from beatless.orchestrator.sure_writer import SureWriter
from beatless.orchestrator.suspects import BodiesInFlight
from beatless.orchestrator.switch_thread import SwitchThread
from beatless.orchestrator.turns import HAND_BACK, Answer, Turn, Turns
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.threads import submitted

T = TypeVar("T")

SYNC_BODIES = 64
"""Bodies that are not async, or are transactional, at once: each has a thread or a connection."""

WAITING_WRITES = 8
"""Statements that may wait for a row, at once: each has a thread and a connection. None waits for
long (`HELD_ROW_WAIT_S`): it is made again, while others have the thread."""

FURTHER_RUNS = 15
"""Runs that a message has executed behind its own, one after the other, at most: then messages of
others, and those that are in the broker, have their turn."""

FURTHER_S = 1.0
"""Seconds after its claim in which it has such runs begun."""

BETWEEN_TRIES = Backoff(initial=0.05, cap=2.0)
"""Seconds between two tries to write to a row that another transaction holds."""


class Places:
    """A number of places, taken in the order in which they are asked for. Of one thread."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: deque[Future[None]] = deque()

    def take(self) -> Future[None]:
        """Done once there is a place, which is to be left."""
        place: Future[None] = Future()
        self._waiting.append(place)
        self._admit()
        return place

    def leave(self) -> None:
        self._free += 1
        self._admit()

    def _admit(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().set_result(None)


class GreenletsBeside:
    """Bodies of one run in greenlets of their own, in the thread that has the run."""

    def __init__(
        self, thread: SwitchThread, call: Callable[[Lease, RunBody, CallBody], BodyEnded]
    ) -> None:
        """`call` calls one, when it may."""
        self._thread = thread
        self._call = call

    def begin(self, lease: Lease, body: RunBody, call: CallBody) -> Future[BodyEnded]:
        ended: Future[BodyEnded] = Future()

        def work() -> None:
            try:
                ended.set_result(self._call(lease, body, call))
            except BaseException as error:  # of whoever waits for it
                ended.set_exception(error)

        self._thread.spawn(work)
        return ended

    def wait(self, ended: Future[None], timeout_s: float | None) -> None:
        self._thread.wait_for(ended, timeout_s)

    def close(self) -> None:
        return None


class ConcurrentExecutor(Executor):
    """Executes runs in the calls of its own thread: see `spawn`."""

    def __init__(
        self, *, connect: Callable[[], Connection], further_runs: int = 0, **options: Any
    ) -> None:
        """A message may have so many `further_runs` executed behind its own: see `go_on`."""
        super().__init__(connect=connect, **options)
        self.connections = self._connections = ConnectionOfThread(connect)
        statement = GroupCommit(self.journal.schema)
        self._commits = SharedCommits(statement, self.connection)
        self._traces = SharedTraces(self.journal, statement, self.connection, self.disconnect)
        self._in_flight = BodiesInFlight(self.heartbeat)
        self._first_steps = {
            name: first
            for name, plan in self.plans.items()
            for first in [self.first_step(plan)]
            if first is not None
        }
        self.further_runs = further_runs if self._first_steps else 0
        self._thread = SwitchThread(self._when_idle, observer=self.observer)
        self._claims = SharedClaims(self._claim_together, self._thread.soon)
        self._bodies = ThreadPoolExecutor(SYNC_BODIES, thread_name_prefix="beatless-body")
        self._places = Places(SYNC_BODIES)
        self._asides = ThreadPoolExecutor(WAITING_WRITES, thread_name_prefix="beatless-aside")
        self._within = ThreadPoolExecutor(SYNC_BODIES, thread_name_prefix="beatless-transaction")
        self._plan_watch = PlanWatch(
            self._thread,
            ends_after_s=self.leases.seconds,
            end=self._end_process,
            observer=self.observer,
        )

    def start(self) -> None:
        self._thread.start()
        self._plan_watch.start()
        self.loop.watch(ends_after_s=self.leases.seconds, end=self._end_process)

    def _when_idle(self) -> float | None:
        """Seconds until it is to be called again."""
        self._claims.flush()
        waits = [
            each for each in (self._commits.flush(), self._in_flight.tick()) if each is not None
        ]
        return min(waits, default=None)

    def _end_process(self, task: str) -> None:
        self._in_flight.blame(task)
        os.kill(os.getpid(), signal.SIGKILL)

    def execute(self, plan: Plan, run_id: str, dispatch: int, *, max_steps: int = 0) -> bool:
        self._thread.name(f"{run_id} {plan.name}")
        return super().execute(plan, run_id, dispatch, max_steps=max_steps)

    def spawn(self, call: Callable[[], Any]) -> None:
        """Make a call in which `execute` may be called."""
        self._thread.spawn(call)

    def stop(self) -> None:
        """Return when the work on all runs has ended."""
        self._thread.stop()
        self._plan_watch.stop()
        self._claims.stop()
        self._traces.stop()
        for pool in (self._bodies, self._asides, self._within):
            pool.shutdown(wait=False)
        self._connections.close_all()

    @property
    def in_flight(self) -> int:
        """How many calls have begun and not ended."""
        return self._thread.calls

    def first_step(self, plan: Plan) -> str | None:
        """As there, but of a plan whose first step may be begun once only.

        After a death between a claim and the note of its lease nobody knows that the body was not
        called. For others that is an attempt which does not count.
        """
        first = plan.first
        once = isinstance(first, Step) and first.retry.max_crashes == 1
        return None if once else super().first_step(plan)

    def claim(self, plan: Plan, run_id: str, dispatch: int) -> Lease | None:
        """As there, together with other runs whose messages have come."""
        lease = None
        if not plan.limits:
            claim = Claim(
                run_id=run_id,
                plan=plan.name,
                first_step=self.first_step(plan),
                dispatch=dispatch,
                reads_ahead=self.ahead(plan, dispatch) is not None,
            )
            lease = self._thread.wait(self._claims.put(claim))
        return super().claim(plan, run_id, dispatch) if lease is None else lease

    def go_on(self, ended: Lease) -> None:
        """Execute runs that come next in the queue of this one, without their messages.

        Where runs wait there: one that has come at once asks for no other.
        """
        until = ended.claimed_at + FURTHER_S
        for _ in range(self.further_runs):
            if ended.lost or (ended.waited or 0.0) < BACKLOG_S:
                return
            if self.stopping.is_set() or monotonic() >= until:
                return
            lease = self._thread.wait(self._claims.put(ended))
            if lease is None:
                return
            self.faults.reach("claim.committed")
            self._thread.name(f"{lease.run.run_id} {lease.run.plan}")
            self.drive(lease, self.turns(self.plans[lease.run.plan], lease))
            ended = lease

    def _claim_together(self, claims: Sequence[Claim], behind: Sequence[Behind]) -> Sequence[Lease]:
        try:
            return self.claimed(
                lambda connection: self.leases.claim_together(
                    connection,
                    claims,
                    behind,
                    worker=self.worker,
                    first_steps=self._first_steps,
                    ahead=self._read_ahead.send,
                )
            )
        except psycopg.Error:
            self.disconnect()  # which of its statements are prepared is not known
            raise

    def turns(self, plan: Plan, lease: Lease, max_steps: int = 0) -> Turns:
        lease.uncalled = True  # but for a body that is alone: see `suspects`
        return super().turns(plan, lease, max_steps)

    def drive(self, lease: Lease, turns: Turns) -> None:
        answer: Answer = None
        try:
            while True:
                turn = turns.send(answer)
                while isinstance(turn, RunBody):
                    turn = self._call(lease, turns, turn)
                answer = self._thread.wait(self._commits.put(turn))
        except StopIteration:
            return
        finally:
            turns.close()

    def _call(self, lease: Lease, turns: Turns, body: RunBody) -> Turn:
        """Let a run call its body when it has a place: before its time begins.

        For its thread, if it is not async; for its connection to Postgres, if it is transactional.
        """
        if body.step.is_async and not body.step.transactional:
            return self._call_beside_others(lease, turns, body)
        self._thread.wait(self._places.take())
        try:
            return self._call_beside_others(lease, turns, body)
        finally:
            self._places.leave()

    def _call_beside_others(self, lease: Lease, turns: Turns, body: RunBody) -> Turn:
        """Let a run call its body when it may; its next turn."""
        entered = self._in_flight.enter(lease, body.deaths)
        try:
            self._thread.wait(entered.may_run)
            return turns.send(HAND_BACK if self._is_too_late(lease, body) else None)
        finally:
            self._in_flight.leave(entered)

    def _is_too_late(self, lease: Lease, body: RunBody) -> bool:
        """Whether a body is not to be called: it may have waited for its turn for hours."""
        too_late = lease.late and not body.compensating
        return too_late or lease.lost or self.stopping.is_set()

    def share(self, writer: SureWriter, attempt: Attempt, event: NewEvent) -> Together:
        trace = SharedTrace(writer=writer, attempt=attempt, event=event)
        return partial(self._traces.put, trace)

    def beside(self) -> Beside:
        return GreenletsBeside(self._thread, self._call_one)

    def _call_one(self, lease: Lease, body: RunBody, call: CallBody) -> BodyEnded:
        """Call a body of a run beside others of that run."""
        place = None if body.step.is_async else self._places.take()
        entered = None
        try:
            if place is not None:
                self._thread.wait(place)
            entered = self._in_flight.enter(lease, body.deaths)
            self._thread.wait(entered.may_run)
            if self._is_too_late(lease, body):
                return BodyEnded(occurrence=body.occurrence, outcome=Stopped())
            return call(body)
        finally:
            if entered is not None:
                self._in_flight.leave(entered)
            if place is not None:
                self._places.leave()

    def call(self, step: Step, context: StepContext, attempt: Attempt) -> Any:
        def body() -> Any:
            return call_body(step, context, attempt, self.loop, self.wait)

        if step.is_async:
            return self.limit(attempt, body)
        own_context = copy_context()
        return self._thread.wait(
            submitted(self._bodies, own_context.run, self.limit, attempt, body)
        )

    def wait(self, future: Future[T]) -> T:
        found: T = self._thread.wait(future)
        return found

    def aside(self, act: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                done: Future[T] = submitted(self._asides, copy_context().run, giving_way, act)
                return self._thread.wait(done)
            except RowHeld:
                failures += 1
                self._thread.pause(BETWEEN_TRIES.delay(failures))

    def within(self, act: Callable[[], T]) -> T:
        done: Future[T] = submitted(self._within, copy_context().run, act)
        return self._thread.wait(done)
