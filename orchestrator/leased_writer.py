"""Writes the events of one run under its lease: of its boundaries, and of its step's threads."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import sqlalchemy

from beatless.orchestrator.child_calls import ChildEnd, ChildrenTurn, Tends
from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.errors import LeaseLost, RunNotFound, StepEnded
from beatless.orchestrator.events import Event, EventType, NewEvent, encode
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.held_rows import GIVES_WAY, RowHeld
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import (
    LOCK_TIMEOUT_S,
    Connection,
    Lease,
    Leases,
)
from beatless.orchestrator.lease_status import LeaseStatus
from beatless.orchestrator.open_waits import DATA_BYTES
from beatless.orchestrator.progress import FOLDED, SNOOZED, SUSPECT
from beatless.orchestrator.records import Appended, CheckpointPage, NewRun
from beatless.orchestrator.settlement import Proposal, Settlement
from beatless.orchestrator.state import RunState
from beatless.orchestrator.step_output import Portion, StepOutput
from beatless.orchestrator.sure_writer import Find, SureWriter
from beatless.orchestrator.unfit_run import unfit_page
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.queries import Caller

WATCHDOG_LOCK_TIMEOUT_S = 0.02
"""How long the watchdog waits for a run's row, while the limits of other runs wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Why a run was not parked: the facts that have come before."""

    events: Sequence[Event]
    """The SignalReceived that were not told."""
    turns: Sequence[ChildrenTurn] = ()


class LeasedWriter(SureWriter):
    """The one writer of a run among the workers, and among the threads of its step."""

    def __init__(
        self,
        lease: Lease,
        *,
        journal: Journal,
        children: ChildRuns,
        leases: Leases,
        heartbeat: Heartbeat,
        connection: Callable[[], Connection],
        disconnect: Callable[[], None],
        stopping: threading.Event,
        on_commit: Callable[[Settlement, Appended], None],
        announce: Callable[[StepOutput, bool], None],
    ) -> None:
        """`connection` gives an autocommit connection, a new one after `disconnect`.

        `stopping` ends the waiting for Postgres. `on_commit` is called once for each settlement, as
        soon as it is known to be committed. `announce` has output written, see `OutputThread`.
        """
        super().__init__(
            lease,
            leases=leases,
            heartbeat=heartbeat,
            connection=connection,
            disconnect=disconnect,
            stopping=stopping,
        )
        self._journal = journal
        self._children = children
        self._on_commit = on_commit
        self._announce = announce
        self._ahead, lease.ahead = lease.ahead, ()
        self._claimed_seq = lease.run.last_seq
        self._told_seq = 0
        """The seq up to which the signals of the run were told to its execution."""
        self._in_doubt: Settlement | None = None
        """The boundary in a step's own transaction, until its commit is sure."""

    def read(self, behind: CheckpointPage | None) -> CheckpointPage:
        """A page of the events that give the place of the run. Raises LeaseLost if it was removed.

        Behind this one; None: the first.
        """
        ahead, self._ahead = self._ahead, ()
        try:
            if ahead and behind is None and self._last_seq == self._claimed_seq:
                page = CheckpointPage.of_rows(ahead)  # nothing was written since
            else:
                page = self.patiently(
                    lambda connection: self._journal.checkpoint_page(
                        connection, self._run_id, names=FOLDED, rest=SNOOZED, behind=behind
                    )
                )
        except RunNotFound:  # taken away by force, or its row contradicts its journal
            page = self.patiently(partial(unfit_page, self._journal.schema, self._lease))
        self._last_seq = self._told_seq = page.events[-1].seq
        return page

    def read_ends(self, first: int, last: int) -> Sequence[ChildEnd]:
        """The children of the run with these numbers that have ended."""
        return self.patiently(
            lambda connection: self._children.ends(connection, self._run_id, first, last)
        )

    # Settlements

    def proposal(self, settlement: Settlement) -> Proposal:
        """The boundary, for a statement that commits those of several runs; then see `confirm`."""
        return Proposal(
            run_id=self._run_id,
            token=self._lease.token,
            after=self._last_seq,
            settlement=settlement,
        )

    def settle(self, settlement: Settlement, *, tried: bool = False) -> Appended:
        """Commit a boundary. Raises LeaseLost.

        `tried`: it may have been committed already, by a statement whose answer was lost.
        """

        def write(connection: Connection) -> Appended | None:
            with self._statement(connection):
                return self._settle(connection, settlement)

        with self._alone(settlement):
            self._write_tried(settlement)
            state, find = settlement.normal.state, partial(self._find_settled, settlement)
            appended = self._write(write, state, what=settlement, tried=tried, find=find)
        self._in_doubt = None
        self._on_commit(settlement, appended)
        self._take_in(appended)
        return appended

    def settle_if_quiet(
        self, settlement: Settlement, waits: Sequence[int], tends: Sequence[Tends], *, sleeps: bool
    ) -> Appended | Needed:
        """Commit a boundary unless the run has received signals that were not told; or those.

        They are looked for once the run's row is locked, in statements that begin after that: a
        signal that is committed later finds the boundary, and so does the end of a child. With
        `waits`, the seqs of open waits, the run is due when the first of them ends. With `tends`
        children of calls are started as there are places, and the run is parked until some need
        it. A run that `sleeps` is parked in one round trip if it has no signal. Raises LeaseLost.
        """
        needed: Needed | None = None
        told_seq, chosen = self._told_seq, settlement

        def write(connection: Connection) -> Appended | None:
            nonlocal needed, told_seq, chosen
            if sleeps and (parked := self._park(connection, settlement)) is not None:
                return parked
            with self._transaction(connection):
                look = self._leases.inbox.take_in(
                    connection, self._run_id, self._lease.token, seen=self._told_seq, waits=waits
                )
                if look is None:
                    return None
                told_seq, needed = look.last_seq, None
                tended = [self._children.tend(connection, self._run_id, each) for each in tends]
                if look.events or any(each.needs_parent for each in tended):
                    needed = Needed(events=look.events, turns=[each.turn for each in tended])
                    return Appended(last_seq=look.last_seq, cancelled=False)
                if waits or tends:
                    chosen = settlement.due_in(look.delay_s)
                appended = self._settle(connection, chosen)
                if tended:
                    self._children.wait(connection, self._run_id, tended)
                return appended

        with self._alone(settlement):
            self._write_tried(settlement)
            state, find = settlement.normal.state, partial(self._find_settled, settlement)
            appended = self._write(write, state, what=settlement, find=find)
        self._told_seq = told_seq
        if needed is not None:
            return needed
        self._on_commit(chosen, appended)
        return appended

    def _park(self, connection: Connection, settlement: Settlement) -> Appended | None:
        """Have the run sleep; None if it has signals, or slots of a step to give back."""
        if self._lease.limited_step:
            return None
        run_id, token, after = self._run_id, self._lease.token, self._last_seq
        send = partial(self._leases.inbox.behind_lock, connection, run_id, token)
        with self._statement(connection):
            return self._journal.settle(
                connection, run_id, token, settlement, after, send=send, if_unsignalled=True
            )

    def settle_with_children(self, settlement: Settlement, runs: Sequence[NewRun]) -> Appended:
        """Commit a boundary and children of the run; no children if it is cancelled.

        Raises LeaseLost.
        """

        def write(connection: Connection) -> Appended | None:
            with self._transaction(connection):
                appended = self._settle(connection, settlement)
                if appended is not None and not appended.cancelled:
                    self._children.start(connection, self._run_id, runs)
                return appended

        with self._alone(settlement):
            self._write_tried(settlement)
            state, find = settlement.normal.state, partial(self._find_settled, settlement)
            appended = self._write(write, state, what=settlement, find=find)
        self._on_commit(settlement, appended)
        self._take_in(appended)
        return appended

    def settle_within(self, transaction: sqlalchemy.Connection, settlement: Settlement) -> Appended:
        """Write a boundary in the transaction of a step, which commits it. Raises LeaseLost.

        It is in doubt until `confirm` or `recover`.
        """
        appended = self._settle(transaction, settlement)
        if appended is None:
            raise LeaseLost(self._run_id, self._lease.token)
        self._in_doubt = settlement
        return appended

    def confirm(self, settlement: Settlement, appended: Appended) -> None:
        """Somebody else's commit has happened: of the step's transaction, or of several runs."""
        # Only now: until the commit, the writes of an interrupted transaction are not sure.
        self._last_seq, self._in_doubt = appended.last_seq, None
        self._on_commit(settlement, appended)
        self._take_in(appended)

    def _take_in(self, settled: Appended) -> None:
        """Take signals into the journal that have come before a boundary."""
        if settled.signalled:
            self.patiently(
                lambda connection: self._leases.take_in(connection, self._lease, LOCK_TIMEOUT_S)
            )

    def settle_once(self, connection: Connection, settlement: Settlement) -> bool:
        """Commit a boundary on another thread's connection; False if the lease is gone.

        Raises psycopg.errors.LockNotAvailable, soon, if another transaction holds the run's row.
        """
        with self._leases.with_lock_timeout(connection, WATCHDOG_LOCK_TIMEOUT_S):
            appended = self._settle(connection, settlement)
        if appended is None:
            return False
        self._on_commit(settlement, appended)
        return True

    def recover(self) -> LeaseStatus:
        """Find out whether a commit happened whose answer is unknown. Raises LeaseLost.

        The lease is still held unless the run has ended with that commit.
        """
        self.patiently(self._renew)
        status = self.patiently(self._inspect)
        if status.committed_since and self._in_doubt is not None:
            cancelled = status.state is not self._in_doubt.normal.state
            self._on_commit(self._in_doubt, Appended(last_seq=status.last_seq, cancelled=cancelled))
        self._in_doubt = None
        if not status.state.final and not status.held:
            raise LeaseLost(self._run_id, self._lease.token)
        return status

    # For the threads of a step

    def open(self, attempt: Attempt, step: str, number: int) -> StepOutput:
        """Let the threads of this attempt write; returns its output."""
        output = self._outputs[id(attempt)] = StepOutput(
            run_id=self._run_id,
            step=step,
            attempt=number,
            max_event_bytes=self._journal.max_event_bytes,
            writer=self,
            announce=self._announce,
        )
        return output

    def close(self, attempt: Attempt) -> None:
        """Let them write no more, once the one that writes has written. Raises RowHeld."""
        output = self._outputs.get(id(attempt))
        if output is None:
            return
        with self._locked():
            if self._is_doubtful(output):
                self._forgo_doubt()
            del self._outputs[id(attempt)]

    def close_now(self, attempt: Attempt) -> bool:
        """The same if none writes, and nothing of theirs is doubtful; else False."""
        if not self._writing.acquire(blocking=False):
            return False
        output = self._outputs.get(id(attempt))
        sure = output is None or not self._is_doubtful(output)
        if sure:
            self._outputs.pop(id(attempt), None)
        self._writing.release()
        return sure

    def append(self, attempt: Attempt, event: NewEvent) -> None:
        """Commit one event in the middle of a step. Raises LeaseLost, and StepEnded after it."""
        with self._asking(attempt, event.step, event):
            if self._doubtful is None or self._doubtful != event:
                self._write_tried(event)
                self._write_output(self._outputs[id(attempt)])
            self._append([event], what=event)

    def note_suspect(self, step: str, attempt: int) -> None:
        """Tell whoever notices the death of the whole worker what its board would have told.

        Raises LeaseLost.
        """
        data = encode(
            {"name": SUSPECT, "alone": self._lease.alone}, where=SUSPECT, limit=DATA_BYTES
        )
        note = NewEvent(type=EventType.DEBUG_TRACE, step=step, attempt=attempt, data=data)
        with self._alone(note):
            self._append([note], what=note)

    def write_output(self, output: StepOutput) -> None:
        """Commit what an attempt has emitted.

        Raises RowHeld, LeaseLost, StepEnded. Not in `asked_s`: it may be another thread's time.
        """
        with self._alone(output):
            if not self._is_open(output):
                raise StepEnded(self._run_id, output.step)
            self._write_tried(output)
            self._write_output(output)

    def begin_portion(self, output: StepOutput) -> Portion | None:
        """What an attempt has emitted, for a statement that commits it with that of others.

        None if there is nothing, if it is `in_doubt` or that of another step of the run is, and if
        a thread writes just now, for which this one does not wait. Raises LeaseLost, and StepEnded
        after the attempt's end. See `OutputWriter`.
        """
        if self._lease.lost:
            raise LeaseLost(self._run_id, self._lease.token)
        output.in_doubt = False
        if not self._writing.acquire(blocking=False):
            return None
        outputs = list(self._outputs.values())
        is_open = self._is_open(output)
        sure = self._doubtful in (None, output) and not any(
            each.tried for each in outputs if each is not output
        )
        output.in_doubt = is_open and output.tried
        events = output.pending(output.added) if is_open and sure and not output.tried else ()
        if not events:
            self._writing.release()
            if not is_open:
                raise StepEnded(self._run_id, output.step)
            return None
        output.tried = True  # until the answer is known
        return Portion(
            run_id=self._run_id,
            token=self._lease.token,
            after=self._last_seq,
            events=events,
            connection=self._connection,
            disconnect=self._disconnect,
        )

    def end_portion(self, output: StepOutput, appended: Appended | None, *, in_doubt: bool) -> None:
        """It was written, or not, or it is not known whether it was; others may write again."""
        if appended is not None:
            self._last_seq = appended.last_seq
            self._lease.cancelled |= appended.cancelled
            output.written()
        elif not in_doubt:
            output.tried = False
        self._writing.release()

    def _write_tried(self, what: object) -> None:
        """Write the output that may have been written, before this: or it would pass for it.

        Not if this itself is in doubt.
        """
        if self._doubtful is not None and self._doubtful == what:
            return
        for output in list(self._outputs.values()):
            if output.tried or self._doubtful is output:
                self._write_output(output)

    def _write_output(self, output: StepOutput) -> None:
        added = output.added
        while events := output.pending(added):
            # Another write of the step's threads may be in doubt too: this one is looked for.
            tried, output.tried = output.tried, True
            find = partial(self._find_output, output.step, output.first)
            try:
                self._append(events, what=output, tried=tried, find=find)
            except RowHeld:
                # Nothing was written: the next try need not look for it.
                output.tried = tried or self._doubtful is output
                raise
            output.written()

    def _find_output(self, step: str, first: int, connection: Connection) -> Appended | None:
        status = self._inspect(connection)
        after = self._last_seq
        if not status.held or not self._journal.has_output(
            connection, self._run_id, after, step, first
        ):
            return None
        return Appended(last_seq=status.last_seq, cancelled=self._lease.cancelled)

    def _append(
        self,
        events: Sequence[NewEvent],
        *,
        what: object,
        tried: bool = False,
        find: Find | None = None,
    ) -> None:
        def write(connection: Connection) -> Appended | None:
            token, after, gives_way = self._lease.token, self._last_seq, GIVES_WAY.get()
            appended = self._journal.append(
                connection, self._run_id, token, events, after, if_free=gives_way
            )
            if appended is None and gives_way:
                status = self._inspect(connection)
                if status.held and status.last_seq >= after:
                    raise RowHeld(self._run_id)
            return appended

        appended = self._write(write, RunState.RUNNING, what=what, tried=tried, find=find)
        self._lease.cancelled |= appended.cancelled

    def _settle(self, connection: Caller, settlement: Settlement) -> Appended | None:
        return self._journal.settle(
            connection, self._run_id, self._lease.token, settlement, self._last_seq
        )
