"""Executes several runs in one thread: one body at a time, and their boundaries in one commit.

A group is the run of a message and others that wait in its queue, claimed together. In each round
the runs take turns: the body of each one's next step is called. Then the boundaries of all are
committed in one statement. So it is worth while, and fair, only where bodies are short.

No run is worse off than alone. Whose step turns out to be long goes on alone, and the others are
given to other processes. Whose values, row or lease keep it from the statement writes by itself.
"""

import gc
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import psycopg

from beatless.orchestrator.executor import (
    BACKLOG_S,
    BEHIND_PLACE_S,
    BEHIND_S,
    GOES_ON_S,
    Executor,
)
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.lease import Connection, Lease
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.requests import RunBody
from beatless.orchestrator.settlement import Proposal
from beatless.orchestrator.sure_writer import may_be_committed
from beatless.orchestrator.turns import HAND_BACK, IN_DOUBT, Answer, Turn, Turns
from beatless.orchestrator.turnstile import Turnstile
from beatless.outbox.clock import monotonic
from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.orchestrator.executor")

ROUND_S = 0.02
"""Seconds of bodies after which the boundaries of those that have returned are committed."""

GROUP_S = 0.16
"""Seconds that one body of each run of a group takes at most, as far as is known: the shorter they
are, the more runs are in it."""

LULL_S = 0.02
"""Seconds after a message after which the next one is taken for one that comes alone."""

BUSY_S = 0.2
"""Seconds of one turn after which the other runs are handed back."""

VERY_SHORT_S = 0.001
"""Seconds below which a body has no time to wait for anything."""

CHECK_INTERVAL_S = 0.025
"""Seconds between two checks for turns that last."""

RETRY_INTERVAL_S = 0.5
"""Seconds until the next try to hand those back that could not be written."""


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A run of a group."""

    plan: Plan
    lease: Lease
    turns: Turns
    turn: Turn | None = None
    """The next turn; None before the first, and after the last."""
    alone: bool = False
    """Its boundary is not for a statement of several runs: one of theirs was refused."""
    in_doubt: bool = False
    """Neither, for it may have been committed: it is not written again before that is found out."""
    context: Context = field(default_factory=copy_context)
    """The context of its turns: they alternate with those of other runs."""

    def take(self, answer: Answer) -> None:
        """Take the next turn. Raises StopIteration at the end, and the errors of the work."""
        self.turn, self.alone, self.in_doubt = None, False, False
        self.turn = self.context.run(self.turns.send, answer)

    def leave(self) -> None:
        """Leave the run to the end of its lease, as after a crash."""
        self.context.run(self.turns.close)


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection of garbage in this block, if there is any outside.

    What is made for all runs of a group in their turns is used until they end: to look through it
    finds nothing. Not around bodies, whose garbage is their own.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Group:
    """The runs that one thread executes together.

    The thread holds the lock, except during a turn. While that lasts, another thread may write the
    boundaries of the other runs and hand them back: see `relieve`.
    """

    def __init__(
        self,
        executor: Executor,
        statement: GroupCommit,
        members: Sequence[Member],
        *,
        own_work: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_long: Callable[[], None] = lambda: None,
    ) -> None:
        """`own_work` is around what is done for all runs without calling a body.

        `on_long` is called when one of them goes on alone, perhaps for long.
        """
        self._executor = executor
        self._statement = statement
        self._members = list(members)
        self._own_work = own_work
        self._on_long = on_long
        self._lock = threading.Lock()
        self._acting: Member | None = None
        self._relieve_at = 0.0
        """When the others are handed back, by the monotonic clock, if it acts still."""
        self._error: Exception | None = None
        """The first error of a run, raised when all have left."""

    def work(self) -> None:
        """Until every run has ended, waits, or is given back. Raises the first error of a run."""
        with self._lock:
            try:
                with self._own_work():
                    for member in list(self._members):
                        self._advance(member, None)
                while self._members:
                    self._round()
            except BaseException as error:
                if not isinstance(error, SimulatedCrash):
                    self._hand_back(self._members, self._executor.connection)
                for member in self._members:
                    member.leave()
                raise
        if self._error is not None:
            raise self._error

    def relieve(self, connect: Callable[[], Connection], *, held_up_s: float = 0.0) -> None:
        """Hand back the other runs if a turn lasts; called in another thread.

        It does not last for as long as the process was held up, since the last call: others wait
        for the interpreter, or the processor, and it is no body that takes so long. A run that
        cannot be written at once stays, and is tried again a little later.
        """
        self._relieve_at += held_up_s
        if monotonic() < self._relieve_at or not self._lock.acquire(blocking=False):
            return
        try:
            others = [each for each in self._members if each is not self._acting]
            if self._acting is not None:
                self._on_long()
            if self._acting is None or all(member.alone for member in others):
                return
            self._relieve_at = monotonic() + RETRY_INTERVAL_S
            with closing(connect()) as connection:
                self._hand_back(others, lambda: connection)
        finally:
            self._lock.release()

    def _round(self) -> None:
        """One turn of each run whose step is short, and their commit."""
        executor = self._executor
        if executor.stopping.is_set():
            self._hand_back(self._members, executor.connection)
        began = executor.body_s
        for member in list(self._members):
            turn = member.turn
            if isinstance(turn, RunBody) and executor.pace.is_short(member.plan, turn.step):
                self._act(member, None)
                if executor.body_s - began >= ROUND_S:
                    break
        written = self._commit(self._members, executor.connection)
        if not written or any(member.alone for member in self._members):
            self._act_alone()

    def _act_alone(self) -> None:
        """No run can go on beside others: one does by itself.

        First those whose statement was refused or in doubt. Then one whose step is unknown. Then
        one whose step is long: the others of these are handed back. Then one whose row is held: it
        waits.
        """
        apart = [member for member in self._members if member.alone]
        if not apart:
            bodies = [member for member in self._members if isinstance(member.turn, RunBody)]
            unknown = [member for member in bodies if not self._is_known(member)]
            if not unknown:
                self._on_long()
                self._hand_back(bodies[1:], self._executor.connection)
            apart = [*unknown, *bodies, *self._members][:1]
        for member in apart:
            self._act(member, IN_DOUBT if member.in_doubt else None)

    def _is_known(self, member: Member) -> bool:
        """Whether its next turn is the body of a step that this process has seen."""
        turn = member.turn
        return isinstance(turn, RunBody) and self._executor.pace.is_known(member.plan, turn.step)

    def _hand_back(self, members: Sequence[Member], connection: Callable[[], Connection]) -> None:
        """Commit the boundaries that are ready, and then give the runs back."""
        leaving = list(members)
        self._commit(leaving, connection)
        for member in leaving:
            if isinstance(member.turn, RunBody):
                self._advance(member, HAND_BACK)
        self._commit(leaving, connection)

    def _commit(self, members: Sequence[Member], connection: Callable[[], Connection]) -> bool:
        """Commit the boundaries that are ready in one statement; whether one was written.

        Those that it leaves out are in the next one too, but of a cancelled run: it is written
        alone.
        """
        ready = {
            member.turn.run_id: (member, member.turn)
            for member in members
            if isinstance(member.turn, Proposal) and not member.alone
        }
        if not ready:
            return False
        waiting = [member for member, _ in ready.values()]
        for member in waiting:  # until the answer is known, whatever strikes here
            member.alone = member.in_doubt = True
        try:
            written = self._statement.settle(
                connection(), [proposal for _, proposal in ready.values()]
            )
        except psycopg.Error as error:
            self._separate(waiting, error)
            return False
        for run_id, (member, _) in ready.items():
            if written.get(run_id) is None:
                member.alone, member.in_doubt = run_id in written, False
        ends: list[BaseException] = []
        with self._own_work():
            for run_id, appended in written.items():
                if appended is None:
                    continue
                try:
                    self._advance(ready[run_id][0], appended)
                except SimulatedCrash:
                    raise
                except BaseException as error:  # ends the process: once all know their answers
                    ends.append(error)
        if ends:
            raise ends[0]
        return any(written.values())

    def _separate(self, members: Sequence[Member], error: psycopg.Error) -> None:
        """Let each be written alone: so the one whose values are refused fails alone.

        If the answer was lost, each looks first whether it was written.
        """
        lost = may_be_committed(error)
        logger.warning(
            "a commit of several runs failed, each is written alone",
            extra={
                "action": "group_failed",
                "runs": len(members),
                "in_doubt": lost,
                "reason": str(error),
            },
        )
        for member in members:
            member.alone, member.in_doubt = True, lost

    def _act(self, member: Member, answer: Answer) -> None:
        """Let a run take a turn that may last: a body, or a write by itself."""
        self._acting, self._relieve_at = member, monotonic() + BUSY_S
        self._lock.release()
        try:
            self._advance(member, answer)
        finally:
            self._lock.acquire()
            self._acting = None

    def _advance(self, member: Member, answer: Answer) -> None:
        """Let a run go on to its next turn."""
        note_uncalled = self._executor.heartbeat.note_uncalled
        try:
            if member.lease.uncalled:
                note_uncalled(member.lease, uncalled=False)
            member.take(answer)
            if isinstance(member.turn, RunBody):
                note_uncalled(member.lease, uncalled=True)
        except StopIteration:
            self._members.remove(member)
        except Exception as error:
            self._members.remove(member)
            self._error = self._error or error
        except BaseException:
            self._members.remove(member)
            raise


class GroupGuard:
    """A thread that looks after the groups of this process, and hands runs back that would wait.

    1. sleep until there is a group
    2. while there is one, check each 25 ms whether one of its turns lasts, and `relieve` it
    """

    def __init__(self, connect: Callable[[], Connection], *, observer: Observer = ignore) -> None:
        self._connect = connect
        self._observer = observer
        self._groups: list[Group] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._resting = False
        self._thread: LastingThread | None = None

    @contextmanager
    def watching(self, group: Group) -> Iterator[None]:
        """Look after this group."""
        with self._changed:
            self._groups.append(group)
            if self._thread is None:
                thread = LastingThread("group", self._run, observer=self._observer)
                thread.start()
                self._thread = thread  # one that could not be started is started with the next
            elif self._resting:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._groups.remove(group)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def _run(self, thread: LastingThread) -> None:
        while True:
            with self._changed:
                self._resting = True
                self._changed.wait_for(lambda: self._groups or self._stopping)
                self._resting = False
                began = monotonic()
                self._changed.wait_for(lambda: self._stopping, CHECK_INTERVAL_S)
                if self._stopping:
                    return
                groups = list(self._groups)
            # With many threads that wait for the interpreter this one is late as they are.
            held_up_s = max(0.0, monotonic() - began - CHECK_INTERVAL_S)
            for group in groups:
                try:
                    group.relieve(self._connect, held_up_s=held_up_s)
                    thread.works()
                except Exception as error:
                    thread.failed()
                    logger.warning(
                        "runs beside a long step could not be handed back, will retry",
                        extra={"action": "hand_back_failed", "reason": str(error)},
                        exc_info=None if isinstance(error, psycopg.Error) else error,
                    )


class GroupExecutor:
    """Executes the run of a message, and others of its queue with it where that is worth while."""

    def __init__(
        self,
        executor: Executor,
        plans: Mapping[str, Plan],
        *,
        max_runs: int,
        goes_on: bool,
        places: int,
        guard: GroupGuard,
        turnstile: Turnstile,
        own_work: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`max_runs` is how many runs a group has at most, and `plans` may be in one.

        `goes_on`: ends of runs that have waited for a slot claim the next ones, for `GOES_ON_S`; of
        runs that have waited for a worker, if a message may bring more than one, for `BEHIND_S`,
        or less if the worker executes few messages at once (`places`).
        `own_work` is as of `Group`. Guard and turnstile are those of the process.
        """
        self.executor = executor
        self.statement = GroupCommit(executor.journal.schema)
        self._plans = plans
        self._max_runs = max_runs
        self._goes_on = goes_on
        self._places = places
        self._guard = guard
        self._turnstile = turnstile
        self._own_work = own_work
        self._lull_at = 0.0
        """When a message is taken for one that comes alone, by the monotonic clock."""

    def execute(self, plan: Plan, run_id: str, dispatch: int) -> bool:
        """As `Executor.execute`, for the run of the message.

        Others are asked for only in a backlog: a run that comes alone does not pay for that.
        """
        now = monotonic()
        in_backlog = now < self._lull_at
        self._lull_at = 0.0
        self.executor.goes_on_until = now + GOES_ON_S if self._goes_on else 0.0
        behind = self._goes_on and self._max_runs > 1
        behind_s = min(BEHIND_S, self._places * BEHIND_PLACE_S)
        self.executor.behind_until = now + behind_s if behind else 0.0
        try:
            return self._execute(plan, run_id, dispatch, in_backlog=in_backlog)
        finally:
            self._lull_at = max(self._lull_at, monotonic() + LULL_S)

    def _execute(self, plan: Plan, run_id: str, dispatch: int, *, in_backlog: bool) -> bool:
        executor = self.executor
        first_steps = self._first_steps(plan)
        if plan.name not in first_steps:
            return executor.execute(plan, run_id, dispatch)
        with self._turnstile.passed(
            by=not (in_backlog and self._are_very_short(first_steps))
        ) as leave:
            takes_others = in_backlog and not executor.stopping.is_set()  # it may have waited
            return self._claim_and_work(
                plan,
                run_id,
                dispatch,
                first_steps=first_steps,
                places=self._most_runs(first_steps) - 1 if takes_others else 0,
                leave=leave,
            )

    def _claim_and_work(
        self,
        plan: Plan,
        run_id: str,
        dispatch: int,
        *,
        first_steps: dict[str, str],
        places: int,
        leave: Callable[[], None],
    ) -> bool:
        executor = self.executor
        leases = executor.claimed(
            lambda connection: executor.leases.claim_with_others(
                connection,
                run_id,
                plan=plan.name,
                worker=executor.worker,
                first_steps=first_steps,
                dispatch=dispatch,
                places=places,
                ahead=executor.ahead(plan, dispatch) if dispatch > 1 else None,
            )
        )
        if any(lease.waited is not None and lease.waited > BACKLOG_S for lease in leases):
            self._lull_at = math.inf
        claimed = bool(leases) and leases[0].run.run_id == run_id
        if not claimed:
            executor.ignore_message(run_id, dispatch)
        if leases:
            executor.faults.reach("claim.committed")
            self._work(leases, leave)
            executor.faults.reach("task.before_ack")
        return claimed

    def _work(self, leases: Sequence[Lease], leave: Callable[[], None]) -> None:
        members = [
            Member(plan=plan, lease=lease, turns=self.executor.turns(plan, lease))
            for lease in leases
            for plan in [self._plans[lease.run.plan]]
        ]
        if len(members) == 1:
            leave()
            for _ in members[0].turns:
                pass
            self.executor.go_on(members[0].lease)
            return
        # Nobody here would execute what an end has claimed.
        self.executor.goes_on_until = self.executor.behind_until = 0.0
        group = Group(
            self.executor, self.statement, members, own_work=self._own_work, on_long=leave
        )
        with self._guard.watching(group):
            group.work()

    def _are_very_short(self, names: Iterable[str]) -> bool:
        """Whether no body of these plans takes long enough to wait for anything."""
        return self._longest_s(names) < VERY_SHORT_S

    def _longest_s(self, names: Iterable[str]) -> float:
        """Seconds of the longest bodies of these plans."""
        return max(self.executor.pace.longest_s(self._plans[name]) for name in names)

    def _most_runs(self, names: Iterable[str]) -> int:
        """Of a group that may have runs of these plans."""
        longest_s = self._longest_s(names)
        return min(self._max_runs, max(1, int(GROUP_S / max(longest_s, GROUP_S / self._max_runs))))

    def _first_steps(self, plan: Plan) -> dict[str, str]:
        """The names of the first steps, by plan, of those that may be in a group now."""
        executor = self.executor
        if self._max_runs < 2 or executor.stopping.is_set():
            return {}
        if self._plans.get(plan.name) is not plan or not executor.pace.suits_groups(plan):
            return {}
        return {
            each.name: each.first_step
            for each in self._plans.values()
            if each.first_step is not None and executor.pace.suits_groups(each)
        }
